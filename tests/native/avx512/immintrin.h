// Stands before the compiler's own header where the AVX2 kernels are compiled with -Itests/native/avx512
// (scripts/test_native.sh): they then take every path that is meant for AVX-512, its vectors of 64 bytes and
// its larger micro-tiles, with these loops for its instructions, on a processor that has only AVX2.
#pragma once

#include_next <immintrin.h>

#if defined(__AVX2__) && !defined(__AVX512F__)
#define __AVX512F__ 1
#pragma GCC diagnostic ignored "-Wpsabi"  // no such vector passes from one file to another

namespace emulated {

#define EMULATED [[gnu::always_inline]] inline

typedef int Ints __attribute__((vector_size(64)));
typedef unsigned long long Quads __attribute__((vector_size(64)));

template <class V>
constexpr int kCount = sizeof(V) / sizeof(V{}[0]);

// The second operand where either is NaN, as the instructions do.
template <class V>
EMULATED V max(V a, V b) {
  for (int n = 0; n < kCount<V>; ++n) a[n] = a[n] > b[n] ? a[n] : b[n];
  return a;
}

template <class V>
EMULATED V min(V a, V b) {
  for (int n = 0; n < kCount<V>; ++n) a[n] = a[n] < b[n] ? a[n] : b[n];
  return a;
}

EMULATED __m512 sqrt(__m512 a) {
  for (int n = 0; n < 16; ++n) a[n] = __builtin_sqrtf(a[n]);
  return a;
}

EMULATED __m512d sqrt(__m512d a) {
  for (int n = 0; n < 8; ++n) a[n] = __builtin_sqrt(a[n]);
  return a;
}

// Halves are folded until one lane is left, as the compiler's header has it.
template <class V>
EMULATED auto reduce_add(V v) {
  for (int width = kCount<V> / 2; width > 0; width /= 2)
    for (int n = 0; n < width; ++n) v[n] += v[n + width];
  return v[0];
}

template <class V>
EMULATED auto reduce_max(V v) {
  for (int width = kCount<V> / 2; width > 0; width /= 2)
    for (int n = 0; n < width; ++n) v[n] = v[n] > v[n + width] ? v[n] : v[n + width];
  return v[0];
}

template <class V>
EMULATED unsigned compare(V a, V b, int how) {
  unsigned bits = 0;
  for (int n = 0; n < kCount<V>; ++n) bits |= static_cast<unsigned>(a[n] > b[n]) << n;
  return how == _CMP_GT_OQ ? bits : throw "only 'greater' is emulated";
}

template <class T, class V>
EMULATED __m512i widened(V packed) {
  T element[16];
  static_assert(sizeof(element) == sizeof(packed));
  __builtin_memcpy(element, &packed, sizeof(packed));
  Ints v;
  for (int n = 0; n < 16; ++n) v[n] = element[n];
  return (__m512i)v;
}

EMULATED __m512 join(__m256 low, __m256 high) {
  __m512 v;
  for (int n = 0; n < 8; ++n) v[n] = low[n], v[n + 8] = high[n];
  return v;
}

EMULATED __m512 insert_high(__m512 a, __m256 high) {
  for (int n = 0; n < 8; ++n) a[n + 8] = high[n];
  return a;
}

EMULATED __m512 from_halves(__m256i v) {
  return join(_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1)));
}

EMULATED __m512i mul_low(__m512i a, __m512i b) {
  return (__m512i)(((Quads)a & 0xFFFFFFFFu) * ((Quads)b & 0xFFFFFFFFu));
}

}  // namespace emulated

#define _mm512_max_ps emulated::max<__m512>
#define _mm512_max_pd emulated::max<__m512d>
#define _mm512_min_ps emulated::min<__m512>
#define _mm512_min_pd emulated::min<__m512d>
#define _mm512_sqrt_ps emulated::sqrt
#define _mm512_sqrt_pd emulated::sqrt
#define _mm512_reduce_add_ps emulated::reduce_add<__m512>
#define _mm512_reduce_add_pd emulated::reduce_add<__m512d>
#define _mm512_reduce_max_ps emulated::reduce_max<__m512>
#define _mm512_reduce_max_pd emulated::reduce_max<__m512d>
#undef _mm512_cmp_ps_mask
#undef _mm512_cmp_pd_mask
#define _mm512_cmp_ps_mask emulated::compare<__m512>
#define _mm512_cmp_pd_mask emulated::compare<__m512d>
#define _mm512_cvtepu8_epi32 emulated::widened<unsigned char, __m128i>
#define _mm512_cvtepu16_epi32 emulated::widened<unsigned short, __m256i>
#define _mm512_slli_epi32(a, count) ((__m512i)((emulated::Ints)(a) << (count)))
#define _mm512_cvtph_ps emulated::from_halves
#define _mm512_castps256_ps512(a) emulated::join(a, __m256{})
#undef _mm512_insertf32x8
#define _mm512_insertf32x8(a, b, half) emulated::insert_high(a, ((void)sizeof(char[(half) == 1 ? 1 : -1]), b))
#define _mm512_mul_epu32 emulated::mul_low
#define _mm512_set1_epi64(x) ((__m512i)(emulated::Quads{} + static_cast<unsigned long long>(x)))
#undef EMULATED
#endif

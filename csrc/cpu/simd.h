// Vectors of the width of the instruction set that this file is compiled for, on GCC and Clang vector
// extensions. Everything lives in a namespace per instruction set: an inline function shared between
// files compiled with different flags could be linked from the wrong one.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 header initialises its "undefined" vectors with themselves (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "../params.h"

#ifndef FASTATTN_ISA
#define FASTATTN_ISA generic
#endif

namespace fastattn::FASTATTN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};

template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <class T>
FASTATTN_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}

template <class T>
FASTATTN_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}

template <class T>
FASTATTN_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // unlike x + 0, x - 0 is x for -0 too, and folds to a broadcast
}

// The second operand where either is NaN, as the machine's instruction does.
template <class T>
FASTATTN_INLINE Vec<T> vmax(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_max_ps((__m512)a, (__m512)b);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_max_ps((__m256)a, (__m256)b);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm_max_ps((__m128)a, (__m128)b);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm_max_pd((__m128d)a, (__m128d)b);
#else
  return a > b ? a : b;
#endif
}

template <class T>
FASTATTN_INLINE Vec<T> vmin(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_min_ps((__m512)a, (__m512)b);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_min_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_min_ps((__m256)a, (__m256)b);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm256_min_pd((__m256d)a, (__m256d)b);
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm_min_ps((__m128)a, (__m128)b);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm_min_pd((__m128d)a, (__m128d)b);
#else
  return a < b ? a : b;
#endif
}

template <class T>
FASTATTN_INLINE Vec<T> vsqrt(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_sqrt_ps((__m512)x);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_sqrt_ps((__m256)x);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm256_sqrt_pd((__m256d)x);
#else
  for (int n = 0; n < kLanes<T>; ++n) x[n] = std::sqrt(x[n]);
  return x;
#endif
}

template <class T>
FASTATTN_INLINE Vec<T> vabs(Vec<T> a) {
  return vmax<T>(a, -a);
}

// Reductions in a fixed tree: halves are folded until one lane is left.
template <class T>
FASTATTN_INLINE T reduce_add(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps((__m512)v);
  if constexpr (sizeof(T) == 8) return _mm512_reduce_add_pd((__m512d)v);
#endif
  T lane[kLanes<T>];
  std::memcpy(lane, &v, sizeof(v));
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int n = 0; n < width; ++n) lane[n] += lane[n + width];
  return lane[0];
}

template <class T>
FASTATTN_INLINE T reduce_max(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_max_ps((__m512)v);
  if constexpr (sizeof(T) == 8) return _mm512_reduce_max_pd((__m512d)v);
#endif
  T lane[kLanes<T>];
  std::memcpy(lane, &v, sizeof(v));
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int n = 0; n < width; ++n) lane[n] = lane[n] > lane[n + width] ? lane[n] : lane[n + width];
  return lane[0];
}

template <class T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <class T>
using Int = typename IntOf<T>::type;

// Consecutive bytes, as integers of T's size.
template <class T>
FASTATTN_INLINE Vec<Int<T>> load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vec<Int<T>>)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return (Vec<Int<T>>)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#endif
  Vec<Int<T>> v;
  for (int n = 0; n < kLanes<T>; ++n) v[n] = p[n];
  return v;
}

// Below this, about, exp(x) is taken to be 0.
template <class T>
constexpr T kExpLowest = sizeof(T) == 8 ? static_cast<T>(-708.5) : static_cast<T>(-87.0);

// exp(x) for x from kExpLowest, where it is exactly 0, to about 88 (709 in double); NaN stays NaN.
// exp(x) = 2^n * 2^r with n = round(x log2 e); n by adding 1.5 * 2^23 (2^52), which rounds to an integer and
// leaves it in the low bits. 2^(n-1), made of those bits, is exactly 0 for the least n, so that neither the
// masked nor a NaN needs a select: the polynomial is that of 2 * 2^r, |r| <= 1/2.
// Unless kPrecise, log2 e is rounded to float: the result is off by up to |x| * 1.4e-8 of itself, a fourth of
// what rounding a score to float may have cost it.
template <class T, bool kPrecise>
FASTATTN_INLINE Vec<T> vexp_clamped(Vec<T> x) {
  constexpr bool kDouble = sizeof(T) == 8;
  constexpr T kLog2e = static_cast<T>(1.4426950408889634074);
  constexpr int kMantissa = kDouble ? 52 : 23;
  // The bias of an exponent less 1: the bits of 2^(n-1) are those of n + kBias.
  constexpr T kBias = kDouble ? static_cast<T>(1022.0) : static_cast<T>(126.0);
  constexpr T kRounder = (kDouble ? static_cast<T>(6755399441055744.0) : static_cast<T>(12582912.0)) + kBias;
  const Vec<T> shifted = x * kLog2e + kRounder;
  const Vec<T> n = shifted - kRounder;
  const Vec<T> scale = (Vec<T>)((Vec<Int<T>>)shifted << kMantissa);
  Vec<T> p;
  if constexpr (kDouble) {
    // Taylor's series of exp in x - n ln 2, whose ln 2 is in two parts, the first short enough for n * hi to
    // be exact.
    constexpr double kLn2Hi = 0.693147180369123816490, kLn2Lo = 1.90821492927058770002e-10;
    const Vec<T> r = (x - n * kLn2Hi) - n * kLn2Lo;
    p = splat<T>(2.0 / 6227020800.0);
    constexpr double kInverse[] = {1.0 / 479001600.0,
                                   1.0 / 39916800.0,
                                   1.0 / 3628800.0,
                                   1.0 / 362880.0,
                                   1.0 / 40320.0,
                                   1.0 / 5040.0,
                                   1.0 / 720.0,
                                   1.0 / 120.0,
                                   1.0 / 24.0,
                                   1.0 / 6.0,
                                   0.5,
                                   1.0,
                                   1.0};
    for (double c : kInverse) p = p * r + 2.0 * c;
  } else {
#if defined(__FMA__) || defined(__aarch64__)
    // The fused product is exact; log2 e beyond float's digits joins in a second step.
    [[maybe_unused]] constexpr float kLog2eLo = 1.92596301e-8f;
    Vec<T> r = x * kLog2e - n;
    if constexpr (kPrecise) r = x * kLog2eLo + r;
#else
    // n times the first of ln 2's two parts is exact, and so is the difference.
    constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
    const Vec<T> r = ((x - n * kLn2Hi) - n * kLn2Lo) * kLog2e;
#endif
    // Minimax, 2e-9.
    p = splat<T>(static_cast<T>(3.0706724e-4));
    constexpr float kCoefficient[] = {2.679775e-3f,    1.92368738e-2f, 1.110066473e-1f,
                                      4.804529548e-1f, 1.3862943649f,  2.0f};
    for (float c : kCoefficient) p = p * r + static_cast<T>(c);
  }
  return p * scale;
}

// exp(x) for x <= about 88 (709 in double): 0 below about -87 (-708), exact at -inf, NaN stays NaN.
template <class T>
FASTATTN_INLINE Vec<T> vexp(Vec<T> x) {
  return vexp_clamped<T, true>(vmax<T>(splat(kExpLowest<T>), x));  // NaN passes, as the second operand
}

// tanh(x) within 6 units in the last place, by a rational minimax function of one division.
FASTATTN_INLINE Vec<float> vtanh(Vec<float> x) {
  constexpr float kOne = 9.0f;                                 // from here on tanh rounds to 1
  x = vmin<float>(splat(kOne), vmax<float>(splat(-kOne), x));  // NaN passes: it is the second operand
  const Vec<float> z = x * x;
  const Vec<float> p =
      (((z * 1.3353413e-8f + 2.0608184e-5f) * z + 3.4955344e-3f) * z + 1.338098e-1f) * z + 1.0f;
  const Vec<float> q =
      (((z * 7.7760467e-7f + 3.2855463e-4f) * z + 2.587678e-2f) * z + 4.6714297e-1f) * z + 1.0f;
  return x * p / q;
}

// Near 0 x + x^3 P(x^2)/Q(x^2), minimax on |x| <= 0.625 to 2e-17; further out 1 - 2/(exp(2x) + 1), which
// cancels near 0.
FASTATTN_INLINE Vec<double> vtanh(Vec<double> x) {
  const Vec<double> z = x * x;
  const Vec<double> p =
      (z * -1.9918323875736797617e-4 - 2.0498917014195327445e-2) * z - 3.3333333333333332772e-1;
  const Vec<double> q =
      ((z * 2.0653930141019276548e-4 + 2.3291488228643405799e-2) * z + 4.6149675104258274962e-1) * z + 1.0;
  const Vec<double> small = p / q * (z * x) + x;
  const Vec<double> magnitude = x < 0.0 ? -x : x;
  const Vec<double> e = vexp<double>(vmin<double>(splat(80.0), magnitude + magnitude));
  const Vec<double> large = 1.0 - 2.0 / (e + 1.0);
  return magnitude < 0.625 ? small : (x < 0.0 ? -large : large);
}

// log(x) for a positive, normal x; -inf at 0 and below, NaN stays NaN. x = 2^e m with m in [sqrt(1/2),
// sqrt(2)), and log m = 2 artanh(s), s = (m - 1)/(m + 1), by its Taylor polynomial: exact to the last places
// also where x is close to 1.
template <class T>
FASTATTN_INLINE Vec<T> vlog(Vec<T> x) {
  constexpr bool kDouble = sizeof(T) == 8;
  constexpr int kMantissa = kDouble ? 52 : 23;
  constexpr int kTerms = kDouble ? 11 : 5;
  using Bits = std::make_unsigned_t<Int<T>>;  // what a negative x or a NaN leaves may wrap around
  constexpr Bits kSqrtHalf = static_cast<Bits>(kDouble ? 0x3FE6A09E667F3BCDull : 0x3F3504F3ull);
  constexpr Bits kExponent = ~((Bits{1} << kMantissa) - 1);
  const Vec<Bits> shifted = ((Vec<Bits>)x - kSqrtHalf) & kExponent;  // e << kMantissa
  const Vec<T> m = (Vec<T>)((Vec<Bits>)x - shifted);
  const Vec<T> e = __builtin_convertvector((Vec<Int<T>>)shifted >> kMantissa, Vec<T>);
  const Vec<T> s = (m - T{1}) / (m + T{1});
  const Vec<T> z = s * s;
  Vec<T> p = splat(T{1} / (2 * kTerms - 1));
#pragma GCC unroll 10
  for (int n = kTerms - 2; n >= 0; --n) p = p * z + T{1} / (2 * n + 1);
  const Vec<T> y = e * static_cast<T>(0.69314718055994530942) + (s + s) * p;
  return x > T{0} ? y : (x != x ? x : splat(-kInfinity<T>));
}

// Bit n of the result: whether a[n] > b[n].
template <class T>
FASTATTN_INLINE uint32_t greater_bits(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
  if constexpr (sizeof(T) == 8) return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ);
#elif defined(__AVX__)
  if constexpr (sizeof(T) == 4)
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)));
  if constexpr (sizeof(T) == 8)
    return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_GT_OQ)));
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4)
    return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpgt_ps((__m128)a, (__m128)b)));
  if constexpr (sizeof(T) == 8)
    return static_cast<uint32_t>(_mm_movemask_pd(_mm_cmpgt_pd((__m128d)a, (__m128d)b)));
#else
  uint32_t bits = 0;
  for (int n = 0; n < kLanes<T>; ++n) bits |= static_cast<uint32_t>(a[n] > b[n]) << n;
  return bits;
#endif
}

// v where bit n of bits is set, else otherwise, in lane n.
template <class T>
FASTATTN_INLINE Vec<T> select_bits(uint32_t bits, Vec<T> v, Vec<T> otherwise) {
  Vec<Int<T>> lane_bit;
  for (int n = 0; n < kLanes<T>; ++n) lane_bit[n] = Int<T>{1} << n;
  return (lane_bit & static_cast<Int<T>>(bits)) != 0 ? v : otherwise;
}

}  // namespace fastattn::FASTATTN_ISA

// Transpositions, and reductions of as many rows as a vector has lanes. Within 16 bytes a shuffle is one
// cheap instruction on every x86; between such pieces it is a slow one, so pieces are put in place by loads
// instead.
#pragma once

#include <cstdint>
#include <utility>

#include "simd.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FASTATTN_HAVE_SHUFFLE 1
#endif
#endif

namespace fastattn::FASTATTN_ISA {

// Elements of a piece, and a piece.
template <class T>
constexpr int kPiece = 16 / static_cast<int>(sizeof(T));

template <class T>
struct PieceOf {
  typedef T type __attribute__((vector_size(16)));
  typedef T unaligned __attribute__((vector_size(16), aligned(alignof(T)), may_alias));
};

template <class T>
using Piece = typename PieceOf<T>::type;

#if defined(FASTATTN_HAVE_SHUFFLE)

// The vector of piece_of(0), piece_of(1), ...
template <class T, class Of>
FASTATTN_INLINE Vec<T> join_pieces(const Of& piece_of) {
#if defined(__AVX512F__)
  const __m256 low = _mm256_set_m128((__m128)piece_of(1), (__m128)piece_of(0));
  const __m256 high = _mm256_set_m128((__m128)piece_of(3), (__m128)piece_of(2));
  return (Vec<T>)_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
#elif defined(__AVX__)
  return (Vec<T>)_mm256_set_m128((__m128)piece_of(1), (__m128)piece_of(0));
#else
  return piece_of(0);
#endif
}

// Of each kSpan elements of a and b the first half (the second where kHigh), alternately kUnit of a and of b.
template <class T, int kUnit, int kSpan, bool kHigh, int... kN>
FASTATTN_INLINE Vec<T> zip(Vec<T> a, Vec<T> b, std::integer_sequence<int, kN...>) {
  return __builtin_shufflevector(a, b,
                                 (kN / kSpan * kSpan + kN % kSpan / (2 * kUnit) * kUnit + kN % kUnit +
                                  (kHigh ? kSpan / 2 : 0) + (kN / kUnit % 2 == 0 ? 0 : kLanes<T>))...);
}

template <class T, int kUnit, int kSpan>
FASTATTN_INLINE Vec<T> zip_low(Vec<T> a, Vec<T> b) {
  return zip<T, kUnit, kSpan, false>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

template <class T, int kUnit, int kSpan>
FASTATTN_INLINE Vec<T> zip_high(Vec<T> a, Vec<T> b) {
  return zip<T, kUnit, kSpan, true>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

// columns[d][c] = piece_of(c)[d] for kLanes rows c and d < kPiece: rows that are kPiece apart share a vector,
// and zipping row m with row m + kPiece/2, log2(kPiece) times, transposes each of its pieces.
template <class T, class Of>
FASTATTN_INLINE void load_columns(const Of& piece_of, Vec<T>* columns) {
  constexpr int kE = kPiece<T>;
#pragma GCC unroll 4
  for (int r = 0; r < kE; ++r) columns[r] = join_pieces<T>([&](int l) { return piece_of(r + l * kE); });
#pragma GCC unroll 2
  for (int width = 1; width < kE; width *= 2) {
    Vec<T> next[kE];
#pragma GCC unroll 2
    for (int m = 0; m < kE / 2; ++m) {
      next[2 * m] = zip_low<T, 1, kE>(columns[m], columns[m + kE / 2]);
      next[2 * m + 1] = zip_high<T, 1, kE>(columns[m], columns[m + kE / 2]);
    }
#pragma GCC unroll 4
    for (int m = 0; m < kE; ++m) columns[m] = next[m];
  }
}

// Lane c of the result is row c's lanes combined in a fixed tree: the transposition of kLanes rows, combining
// two vectors where it would store both.
template <class T, class Combine>
FASTATTN_INLINE Vec<T> reduce_rows(Vec<T>* rows, const Combine& combine) {
  constexpr int kE = kPiece<T>, kN = kLanes<T>;
#pragma GCC unroll 4
  for (int first = 0; first < kN; first += kE)
#pragma GCC unroll 2
    for (int width = kE / 2; width > 0; width /= 2)
#pragma GCC unroll 2
      for (int m = first; m < first + width; ++m)
        rows[m] = combine(zip_low<T, 1, kE>(rows[m], rows[m + width]),
                          zip_high<T, 1, kE>(rows[m], rows[m + width]));
#pragma GCC unroll 2
  for (int width = kN / 2; width >= kE; width /= 2)
#pragma GCC unroll 2
    for (int m = 0; m < width; m += kE)
      rows[m] = combine(zip_low<T, kE, kN>(rows[m], rows[m + width]),
                        zip_high<T, kE, kN>(rows[m], rows[m + width]));
  return rows[0];
}

template <class T>
FASTATTN_INLINE Vec<T> sum_rows(Vec<T>* rows) {
  return reduce_rows<T>(rows, [](Vec<T> a, Vec<T> b) { return a + b; });
}

template <class T>
FASTATTN_INLINE Vec<T> max_rows(Vec<T>* rows) {
  return reduce_rows<T>(rows, [](Vec<T> a, Vec<T> b) { return vmax<T>(a, b); });
}

#else

template <class T>
FASTATTN_INLINE Vec<T> sum_rows(Vec<T>* rows) {
  Vec<T> sums;
  for (int c = 0; c < kLanes<T>; ++c) sums[c] = reduce_add<T>(rows[c]);
  return sums;
}

template <class T>
FASTATTN_INLINE Vec<T> max_rows(Vec<T>* rows) {
  Vec<T> maxima;
  for (int c = 0; c < kLanes<T>; ++c) maxima[c] = reduce_max<T>(rows[c]);
  return maxima;
}

#endif

}  // namespace fastattn::FASTATTN_ISA

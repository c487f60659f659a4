// Register-blocked matrix products: C[M, N] (+)= A[M, depth] B[depth, N].
//
// A micro-tile of kRows rows x up to kWidth vectors of columns stays in registers over the whole depth.
// AVX-512 has 32 registers: 6 x 4 accumulators + 4 of B + 1 of A. With 16 registers it is 6 x 2.
// Either is at least the 2 FMA ports x 4-5 cycles of latency that keep the units busy.
// A is read one scalar at a time, broadcast from memory; B a vector at a time, so B's rows must be
// readable up to a whole number of vectors: packed panels are, and rows of V, Q, K, dO are if their width
// is a multiple of the vector (else the caller copies them into padded rows).
#pragma once

#include <algorithm>

#include "simd.h"

namespace fastattn::FASTATTN_ISA {

constexpr int kRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kWidth = 4;
#else
constexpr int kWidth = 2;
#endif

// Columns of a packed panel: the widest micro-tile.
template <class T>
constexpr int64_t kPanel = kWidth * kLanes<T>;

template <class T>
constexpr int64_t round_to_lanes(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Element (m, k) of A lies at a[m * lda + k], or at a[m + k * lda] where kTransposed.
template <class T, bool kTransposed, int kM, int kN>
void micro_tile(const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t depth,
                bool accumulate) {
  Vec<T> acc[kM][kN];
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) acc[m][n] = Vec<T>{};
  // Four steps at a time: the loop's own instructions would cost 1-2% of the rate.
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> row[kN];
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) row[n] = load(b + k * ldb + n * kLanes<T>);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const Vec<T> x = splat(kTransposed ? a[m + k * lda] : a[m * lda + k]);
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) acc[m][n] += x * row[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
      T* p = c + m * ldc + n * kLanes<T>;
      store(p, accumulate ? load(p) + acc[m][n] : acc[m][n]);
    }
}

template <class T>
using MicroTile = void (*)(const T*, int64_t, const T*, int64_t, T*, int64_t, int64_t, bool);

template <class T, bool kTransposed, int kM>
constexpr MicroTile<T> micro_tile_of_width(int width) {
  constexpr MicroTile<T> table[] = {
      micro_tile<T, kTransposed, kM, 1>,
      micro_tile<T, kTransposed, kM, 2>,
#if defined(__AVX512F__) || defined(__aarch64__)
      micro_tile<T, kTransposed, kM, 3>,
      micro_tile<T, kTransposed, kM, 4>,
#endif
  };
  return table[width - 1];
}

template <class T, bool kTransposed>
MicroTile<T> micro_tile_of(int64_t rows, int64_t width) {
  const int w = static_cast<int>(width);
  switch (rows) {
    case 1:
      return micro_tile_of_width<T, kTransposed, 1>(w);
    case 2:
      return micro_tile_of_width<T, kTransposed, 2>(w);
    case 3:
      return micro_tile_of_width<T, kTransposed, 3>(w);
    case 4:
      return micro_tile_of_width<T, kTransposed, 4>(w);
    case 5:
      return micro_tile_of_width<T, kTransposed, 5>(w);
    default:
      return micro_tile_of_width<T, kTransposed, 6>(w);
  }
}

// Calls visit(first, width) for the strips, evenly wide, that `vectors` vectors of columns fall into.
template <class Visit>
FASTATTN_INLINE void for_each_strip_of(int64_t vectors, const Visit& visit) {
  const int64_t strips = (vectors + kWidth - 1) / kWidth;
  int64_t first = 0;
  for (int64_t strip = 0; strip < strips; ++strip) {
    const int64_t width = (vectors - first + strips - strip - 1) / (strips - strip);
    visit(first, width);
    first += width;
  }
}

// C[rows, columns of one strip] (+)= A B: `width` vectors of columns, whose first column b and c point to.
template <class T, bool kTransposed>
void gemm_strip(int64_t rows, int64_t width, int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb,
                T* c, int64_t ldc, bool accumulate) {
  for (int64_t m = 0; m < rows; m += kRows)
    micro_tile_of<T, kTransposed>(std::min<int64_t>(kRows, rows - m), width)(
        kTransposed ? a + m : a + m * lda, lda, b, ldb, c + m * ldc, ldc, depth, accumulate);
}

// C[rows, columns] (+)= A B, columns a multiple of the vector's lanes, C's rows ldc apart.
template <class T, bool kTransposed>
void gemm(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb,
          T* c, int64_t ldc, bool accumulate) {
  for_each_strip_of(columns / kLanes<T>, [&](int64_t first, int64_t width) {
    const int64_t column = first * kLanes<T>;
    gemm_strip<T, kTransposed>(rows, width, depth, a, lda, b + column, ldb, c + column, ldc, accumulate);
  });
}

// The same with B packed by pack_strips, for `capacity` rows of B of which row 0 of the product is `begin`.
template <class T>
void gemm_strips(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t lda, const T* strips,
                 int64_t capacity, int64_t begin, T* c, int64_t ldc) {
  for_each_strip_of(columns / kLanes<T>, [&](int64_t first, int64_t width) {
    const int64_t column = first * kLanes<T>, ldb = width * kLanes<T>;
    gemm_strip<T, false>(rows, width, depth, a, lda, strips + column * capacity + begin * ldb, ldb,
                         c + column, ldc, true);
  });
}

// C[rows, columns of panels begin..end) = A B for B packed by pack_panels: column n of C is key n.
// begin and end are multiples of the vector's lanes; C's column 0 is key 0 of the first panel.
template <class T>
void gemm_panels(int64_t rows, int64_t begin, int64_t end, int64_t depth, const T* a, int64_t lda,
                 const T* panels, T* c, int64_t ldc) {
  for (int64_t n = begin; n < end;) {
    const int64_t panel = n / kPanel<T>;
    const int64_t stop = std::min(end, (panel + 1) * kPanel<T>);
    const T* b = panels + panel * kPanel<T> * depth + n % kPanel<T>;
    for (int64_t m = 0; m < rows; m += kRows)
      micro_tile_of<T, false>(std::min<int64_t>(kRows, rows - m), (stop - n) / kLanes<T>)(
          a + m * lda, lda, b, kPanel<T>, c + m * ldc + n, ldc, depth, false);
    n = stop;
  }
}

}  // namespace fastattn::FASTATTN_ISA

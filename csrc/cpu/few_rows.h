// The two products where there are few query rows (decoding): K and V are read once, where they lie and in
// their own type. Packing or copying them would cost more than it saves.
#pragma once

#include "convert.h"

namespace fastattn::FASTATTN_ISA {

// Up to this many query rows packing K would cost more than the products it serves.
constexpr int64_t kDotRows = 4;

// s[c] = factor * x·row_of(c) for c in [0, columns rounded up to a vector): one query at a time, nothing
// packed. The padding repeats the last row.
template <class T, class RowOf>
void dot_rows(const T* x, const RowOf& row_of, DType dtype, int64_t columns, int64_t dim, T factor, T* s) {
  constexpr int64_t kN = kLanes<T>;
  with_source<T>(dtype, [&](auto* type) {
    using Source = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const Source* rows[kN];
    for (int64_t c0 = 0; c0 < columns; c0 += kN) {
      for (int64_t c = 0; c < kN; ++c)
        rows[c] = static_cast<const Source*>(row_of(std::min(c0 + c, columns - 1)));
      Vec<T> sums[kN];
#pragma GCC unroll 16
      for (int c = 0; c < kN; ++c) sums[c] = Vec<T>{};
      int64_t d = 0;
      for (; d + kN <= dim; d += kN) {
        const Vec<T> y = load(x + d);
#pragma GCC unroll 16
        for (int c = 0; c < kN; ++c) sums[c] += y * load_as<T>(rows[c] + d);
      }
      Vec<T> total = sum_rows<T>(sums);
      for (; d < dim; ++d)
        for (int64_t c = 0; c < kN; ++c) total[c] += x[d] * to_accumulator<T>(rows[c][d]);
      store(s + c0, total * factor);
    }
  });
}

// y[m][d0 + n] += sum over c of weights[m][c] * rows[c][d0 + n], for kM query rows and kN vectors.
template <class T, class Source, int kM, int kN>
void add_weighted(const T* weights, int64_t ldw, const Source* const* rows, int64_t count, int64_t d0, T* y,
                  int64_t ldy) {
  Vec<T> acc[kM][kN];
#pragma GCC unroll 4
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) acc[m][n] = Vec<T>{};
  for (int64_t c = 0; c < count; ++c) {
    const Source* row = rows[c] + d0;
    Vec<T> x[kN];
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) x[n] = load_as<T>(row + n * kLanes<T>);
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) {
      const Vec<T> weight = splat(weights[m * ldw + c]);
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) acc[m][n] += weight * x[n];
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
      T* out = y + m * ldy + d0 + n * kLanes<T>;
      store(out, load(out) + acc[m][n]);
    }
}

// Keys whose rows of V, up to 16 KB, are taken together: the strips of head_dim after the first find them in
// L1.
constexpr int64_t kFewKeys = 32;

// y[m][0, dim) += sum over c < count of weights[m][c] * row_of(c) for kM query rows. 8 accumulators keep two
// ports of 4 cycles' latency busy.
template <class T, int kM, class RowOf>
void add_weighted_rows(const T* weights, int64_t ldw, const RowOf& row_of, DType dtype, int64_t count,
                       int64_t dim, T* y, int64_t ldy) {
  constexpr int kN = kM == 1 ? 8 : kM == 2 ? 4 : 2;
  with_source<T>(dtype, [&](auto* type) {
    using Source = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const Source* rows[kFewKeys];
    for (int64_t c0 = 0; c0 < count; c0 += kFewKeys) {
      const int64_t keys = std::min(kFewKeys, count - c0);
      for (int64_t c = 0; c < keys; ++c) rows[c] = static_cast<const Source*>(row_of(c0 + c));
      const T* w = weights + c0;
      int64_t d = 0;
      for (; d + kN * kLanes<T> <= dim; d += kN * kLanes<T>)
        add_weighted<T, Source, kM, kN>(w, ldw, rows, keys, d, y, ldy);
      for (; d + kLanes<T> <= dim; d += kLanes<T>)
        add_weighted<T, Source, kM, 1>(w, ldw, rows, keys, d, y, ldy);
      for (; d < dim; ++d)
        for (int m = 0; m < kM; ++m) {
          T sum{0};
          for (int64_t c = 0; c < keys; ++c) sum += w[m * ldw + c] * to_accumulator<T>(rows[c][d]);
          y[m * ldy + d] += sum;
        }
    }
  });
}

// The same for up to kDotRows query rows.
template <class T, class RowOf>
void add_weighted_rows(int64_t query_rows, const T* weights, int64_t ldw, const RowOf& row_of, DType dtype,
                       int64_t count, int64_t dim, T* y, int64_t ldy) {
  switch (query_rows) {
    case 1:
      return add_weighted_rows<T, 1>(weights, ldw, row_of, dtype, count, dim, y, ldy);
    case 2:
      return add_weighted_rows<T, 2>(weights, ldw, row_of, dtype, count, dim, y, ldy);
    case 3:
      return add_weighted_rows<T, 3>(weights, ldw, row_of, dtype, count, dim, y, ldy);
    default:
      return add_weighted_rows<T, 4>(weights, ldw, row_of, dtype, count, dim, y, ldy);
  }
}

}  // namespace fastattn::FASTATTN_ISA

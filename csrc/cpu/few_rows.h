// The two products where there are few query rows (decoding): K and V are read once, where they lie and in
// their own type. Packing or copying them would cost more than it saves.
#pragma once

#include "convert.h"

namespace fastattn::FASTATTN_ISA {

// Up to this many query rows packing K would cost more than the products it serves.
constexpr int64_t kDotRows = 4;

// x·rows[c] in lane c.
template <class T, class Source>
Vec<T> dot_vector(const T* x, const Source* const* rows, int64_t dim) {
  constexpr int64_t kN = kLanes<T>;
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
  return total;
}

// s[m][c] = factor * query_of(m)·row_of(c) for m < query_rows and c in [0, columns rounded up to a vector),
// nothing packed. The padding repeats the last row. Rows of another type are converted for all queries at
// once, in copy [kLanes][dim].
template <class T, class QueryOf, class RowOf>
void dot_rows(int64_t query_rows, const QueryOf& query_of, const RowOf& row_of, DType dtype, int64_t columns,
              int64_t dim, T factor, T* s, int64_t lds, T* copy) {
  constexpr int64_t kN = kLanes<T>;
  with_source<T>(dtype, [&](auto* type) {
    using Source = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const Source* rows[kN];
    const T* converted[kN];
    for (int64_t c = 0; c < kN; ++c) converted[c] = copy + c * dim;
    for (int64_t c0 = 0; c0 < columns; c0 += kN) {
      for (int64_t c = 0; c < kN; ++c)
        rows[c] = static_cast<const Source*>(row_of(std::min(c0 + c, columns - 1)));
      if (std::is_same_v<Source, T> || query_rows == 1) {
        for (int64_t m = 0; m < query_rows; ++m)
          store(s + m * lds + c0, dot_vector<T>(query_of(m), rows, dim) * factor);
        continue;
      }
      for (int64_t c = 0; c < kN; ++c) load_row<T>(rows[c], dtype, dim, T{1}, copy + c * dim);
      for (int64_t m = 0; m < query_rows; ++m)
        store(s + m * lds + c0, dot_vector<T>(query_of(m), converted, dim) * factor);
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

// y[m][0, dim) += sum over c < keys of weights[m][c] * rows[c] for kM query rows. 8 accumulators keep two
// ports of 4 cycles' latency busy.
template <class T, class Source, int kM>
void add_few_keys(const T* w, int64_t ldw, const Source* const* rows, int64_t keys, int64_t dim, T* y,
                  int64_t ldy) {
  constexpr int kN = kM == 1 ? 8 : kM == 2 ? 4 : 2;
  int64_t d = 0;
  for (; d + kN * kLanes<T> <= dim; d += kN * kLanes<T>)
    add_weighted<T, Source, kM, kN>(w, ldw, rows, keys, d, y, ldy);
  for (; d + kLanes<T> <= dim; d += kLanes<T>) add_weighted<T, Source, kM, 1>(w, ldw, rows, keys, d, y, ldy);
  for (; d < dim; ++d)
    for (int m = 0; m < kM; ++m) {
      T sum{0};
      for (int64_t c = 0; c < keys; ++c) sum += w[m * ldw + c] * to_accumulator<T>(rows[c][d]);
      y[m * ldy + d] += sum;
    }
}

// The same for any number of query rows, four at a time.
template <class T, class Source>
void add_few_keys(int64_t query_rows, const T* w, int64_t ldw, const Source* const* rows, int64_t keys,
                  int64_t dim, T* y, int64_t ldy) {
  for (; query_rows >= 4; query_rows -= 4, w += 4 * ldw, y += 4 * ldy)
    add_few_keys<T, Source, 4>(w, ldw, rows, keys, dim, y, ldy);
  if (query_rows == 3) add_few_keys<T, Source, 3>(w, ldw, rows, keys, dim, y, ldy);
  if (query_rows == 2) add_few_keys<T, Source, 2>(w, ldw, rows, keys, dim, y, ldy);
  if (query_rows == 1) add_few_keys<T, Source, 1>(w, ldw, rows, keys, dim, y, ldy);
}

// y[m][0, dim) += sum over c < count of weights[m][c] * row_of(c) for m < query_rows. Rows of another type
// are converted once where that saves, in copy [kFewKeys][dim].
template <class T, class RowOf>
void add_weighted_rows(int64_t query_rows, const T* weights, int64_t ldw, const RowOf& row_of, DType dtype,
                       int64_t count, int64_t dim, T* y, int64_t ldy, T* copy) {
  with_source<T>(dtype, [&](auto* type) {
    using Source = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const Source* rows[kFewKeys];
    const T* converted[kFewKeys];
    for (int64_t c = 0; c < kFewKeys; ++c) converted[c] = copy + c * dim;
    for (int64_t c0 = 0; c0 < count; c0 += kFewKeys) {
      const int64_t keys = std::min(kFewKeys, count - c0);
      for (int64_t c = 0; c < keys; ++c) rows[c] = static_cast<const Source*>(row_of(c0 + c));
      if (std::is_same_v<Source, T> || query_rows <= 4) {
        add_few_keys<T>(query_rows, weights + c0, ldw, rows, keys, dim, y, ldy);
        continue;
      }
      for (int64_t c = 0; c < keys; ++c) load_row<T>(rows[c], dtype, dim, T{1}, copy + c * dim);
      add_few_keys<T>(query_rows, weights + c0, ldw, converted, keys, dim, y, ldy);
    }
  });
}

}  // namespace fastattn::FASTATTN_ISA

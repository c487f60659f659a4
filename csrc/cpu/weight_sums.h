// Sums of weights over queries: what each key receives, and the pooled grid. Each chunk of a head's rows has
// partial sums of its own, which are added in ascending order, whoever computed them.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "gemm.h"
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

template <class T>
FASTATTN_INLINE T sum_of(const T* x, int64_t n) {
  T total{0};
  int64_t c = 0;
  if (n >= kLanes<T>) {
    Vec<T> sum{};
    for (; c + kLanes<T> <= n; c += kLanes<T>) sum += load(x + c);
    total = reduce_add<T>(sum);
  }
  for (; c < n; ++c) total += x[c];
  return total;
}

// Larger, or NaN if either is.
template <class T>
FASTATTN_INLINE T max_or_nan(T a, T b) {
  return b > a || b != b ? b : a;
}

// Where a chunk's partial sums lie.
template <class T>
struct PartialSums {
  T* received;     // [Lk rounded up to vectors]
  double* pooled;  // [rows of the grid that the chunk touches, pool_cols]
  int64_t first_pool_row;
};

template <class T>
class WeightSums {
 public:
  WeightSums(const SummaryParams& p, const PartialSums<T>& partial, T* columns)
      : p_(p), partial_(partial), columns_(columns) {}

  // Adds factors[r] * weights[r * ldw + c] of rows i + r and keys j0 + c, begin <= c < end in whole vectors.
  void add(int64_t i, int64_t rows, int64_t j0, int64_t begin, int64_t end, const T* weights, int64_t ldw,
           const T* factors) const {
    T* received = partial_.received + j0;
    const int64_t stop = std::min(end, p_.seqlen_k - j0);
    for (int64_t r = 0; r < rows;) {
      int64_t row = 0, next = rows;  // of the grid; the rows that share it
      if (p_.pooled.data != nullptr) {
        row = cell_of(i + r, p_.pool_rows, p_.seqlen_q);
        next = std::min(rows, cell_begin(row + 1, p_.pool_rows, p_.seqlen_q) - i);
      }
      add_columns(next - r, begin, end, weights + r * ldw, ldw, factors + r);
      for (int64_t c = begin; c < end; c += kLanes<T>)
        store(received + c, load(received + c) + load(columns_ + c));
      if (p_.pooled.data != nullptr) {
        if (p_.pool_mode == PoolMode::kMax)
          max_columns(next - r, begin, end, weights + r * ldw, ldw, factors + r);
        pool(j0, begin, stop, partial_.pooled + (row - partial_.first_pool_row) * p_.pool_cols);
      }
      r = next;
    }
  }

 private:
  void add_columns(int64_t rows, int64_t begin, int64_t end, const T* weights, int64_t ldw,
                   const T* factors) const {
    int64_t c = begin;
    for (; c + 2 * kLanes<T> <= end; c += 2 * kLanes<T>) {  // two vectors share a factor
      Vec<T> sum{}, next{};
      for (int64_t r = 0; r < rows; ++r) {
        const Vec<T> factor = splat(factors[r]);
        sum += load(weights + r * ldw + c) * factor;
        next += load(weights + r * ldw + c + kLanes<T>) * factor;
      }
      store(columns_ + c, sum);
      store(columns_ + c + kLanes<T>, next);
    }
    for (; c < end; c += kLanes<T>) {
      Vec<T> sum{};
      for (int64_t r = 0; r < rows; ++r) sum += load(weights + r * ldw + c) * factors[r];
      store(columns_ + c, sum);
    }
  }

  void max_columns(int64_t rows, int64_t begin, int64_t end, const T* weights, int64_t ldw,
                   const T* factors) const {
    for (int64_t c = begin; c < end; c += kLanes<T>) {
      Vec<T> top = load(weights + c) * factors[0];
      for (int64_t r = 1; r < rows; ++r) {
        const Vec<T> x = load(weights + r * ldw + c) * factors[r];
        top = top != top ? top : vmax<T>(top, x);
      }
      store(columns_ + c, top);
    }
  }

  // One row of cells takes the columns [begin, stop).
  void pool(int64_t j0, int64_t begin, int64_t stop, double* row) const {
    CellWalk walk(j0 + begin, p_.pool_cols, p_.seqlen_k);
    for (int64_t c = begin; c < stop; walk.next()) {
      const int64_t next = std::min(stop, walk.end - j0);
      double& cell = row[walk.cell];
      if (p_.pool_mode == PoolMode::kMax) {
        for (; c < next; ++c) cell = max_or_nan(cell, static_cast<double>(columns_[c]));
      } else {
        cell += static_cast<double>(sum_of(columns_ + c, next - c));
        c = next;
      }
    }
  }

  const SummaryParams& p_;
  const PartialSums<T> partial_;
  T* columns_;
};

}  // namespace fastattn::FASTATTN_ISA

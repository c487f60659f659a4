// The weight matrix, for callers who ask for it beside the output: a task keeps its scores until it knows
// each row's maximum and sum, which make weights of them, by head or added up to the mean over the heads.
#pragma once

#include <algorithm>
#include <cmath>

#include "../params.h"
#include "buffer.h"
#include "gemm.h"
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

// x[0, padded) becomes exp(x - max) * factor.
template <class T>
void exponentiate(T* x, int64_t padded, T max, T factor) {
  for (int64_t n = 0; n < padded; n += kLanes<T>) store(x + n, vexp<T>(load(x + n) - max) * factor);
}

template <class T>
class WeightRows {
 public:
  // Of `rows` rows of one batch entry.
  WeightRows(const AttentionParams& p, int64_t batch, int64_t rows, Buffer<T>& scratch)
      : p_(p), batch_(batch), stride_(round_to_lanes<T>(p.seqlen_k)) {
    if (!wanted()) return;
    scores_ = scratch.ensure(rows * stride_);
    std::fill(scores_, scores_ + rows * stride_, -kInfinity<T>);
  }

  bool wanted() const { return p_.weights.data != nullptr; }

  // The scores of row r; nullptr where no weights are wanted. A hidden or dropped key has -inf.
  T* row(int64_t r) const { return wanted() ? scores_ + r * stride_ : nullptr; }

  // Takes in the scores s[0, n) of row r with the keys from j0 on.
  void keep(int64_t r, int64_t j0, int64_t n, const T* s) const { std::copy(s, s + n, row(r) + j0); }

  // Forgets those whose probability is now 0.
  void drop(int64_t r, int64_t j0, int64_t n, const T* probabilities) const {
    T* scores = row(r) + j0;
    for (int64_t c = 0; c < n; ++c) scores[c] = probabilities[c] == T{0} ? -kInfinity<T> : scores[c];
  }

  // Writes row i of a head, whose weights are now in row r. Where they are averaged, heads come in ascending
  // order.
  void write(int64_t r, int64_t head, int64_t i) const {
    const T* w = row(r);
    const bool mean = p_.average_weights;
    T* out = static_cast<T*>(p_.weights.data) + p_.weights.offset(batch_, mean ? 0 : head, i);
    const T factor = mean ? T{1} / static_cast<T>(p_.num_heads) : T{1};
    if (mean && head > 0) {
      for (int64_t j = 0; j < p_.seqlen_k; ++j) out[j] += w[j] * factor;
    } else {
      for (int64_t j = 0; j < p_.seqlen_k; ++j) out[j] = w[j] * factor;
    }
  }

 private:
  const AttentionParams& p_;
  const int64_t batch_, stride_;
  T* scores_ = nullptr;
};

}  // namespace fastattn::FASTATTN_ISA

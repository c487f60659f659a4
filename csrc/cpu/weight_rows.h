// The weight matrix, for callers who ask for it beside the output: a task's scores are kept until each row's
// lse is known, then turned into exp(score - lse), by head or added up to the mean over the heads.
#pragma once

#include <algorithm>
#include <cmath>

#include "../params.h"
#include "buffer.h"
#include "gemm.h"
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

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

  // Writes row i of a head, whose scores are row r. Heads come in ascending order where they are averaged.
  void write(int64_t r, int64_t head, int64_t i, T lse, T keep_scale) const {
    T* w = row(r);
    if (lse - lse == T{0}) {
      for (int64_t j = 0; j < stride_; j += kLanes<T>) store(w + j, vexp<T>(load(w + j) - lse));
    } else {
      for (int64_t j = 0; j < p_.seqlen_k; ++j) w[j] = w[j] == -kInfinity<T> ? T{0} : std::exp(w[j] - lse);
    }
    const bool mean = p_.average_weights;
    T* out = static_cast<T*>(p_.weights.data) + p_.weights.offset(batch_, mean ? 0 : head, i);
    const T factor = mean ? keep_scale / static_cast<T>(p_.num_heads) : keep_scale;
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

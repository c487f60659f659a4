// The definition, pair by pair, for rows whose fast result is not finite: an invisible pair takes no part at
// all, where the fast kernels multiply by a zero that an inf or NaN would turn into NaN.
#pragma once

#include <cmath>

#include "buffer.h"
#include "dropout.h"
#include "rows.h"
#include "score.h"

namespace fastattn::FASTATTN_ISA {

template <class T>
T dot(const T* a, const T* b, int64_t n) {
  T sum{0};
  for (int64_t d = 0; d < n; ++d) sum += a[d] * b[d];
  return sum;
}

template <class T>
Vector<T> load_vector(const void* row, DType dtype, int64_t n, double factor = 1.0) {
  Vector<T> x(n);
  load_row<T>(row, dtype, n, static_cast<T>(factor), x.data());
  return x;
}

template <class T>
class ExactPairs {
 public:
  ExactPairs(const AttentionParams& p, int64_t b, int64_t h)
      : p_(p),
        seq_(sequence_of(p, b)),
        rules_(p, b, h, seq_),
        q_(p, p.q, b, h, seq_.q_begin),
        k_(Rows::of_keys(p, p.k, b, h / (p.num_heads / p.num_heads_kv), seq_)),
        v_(Rows::of_keys(p, p.v, b, h / (p.num_heads / p.num_heads_kv), seq_)),
        dropout_(p),
        bh_(static_cast<uint32_t>(b * p.num_heads + h)) {}

  const Sequence& sequence() const { return seq_; }
  KeyRange row_keys(int64_t i) const { return rules_.row_keys(i); }
  Vector<T> query(int64_t i) const { return load_vector<T>(q_(i), p_.dtype, p_.head_dim); }
  Vector<T> key(int64_t j) const { return load_vector<T>(k_(j), p_.dtype, p_.head_dim); }
  Vector<T> value(int64_t j) const { return load_vector<T>(v_(j), p_.dtype, p_.head_dim_v); }

  // False where the mask, or a bias of -inf, hides key j from row i.
  bool visible(int64_t i, int64_t j) const { return rules_.visible(i, j); }

  // The score of a visible pair; slope, where not nullptr, gets its derivative by scale * q·k.
  T score(const T* query, int64_t i, int64_t j, T* slope = nullptr) const {
    const Vector<T> k = load_vector<T>(k_(j), p_.dtype, p_.head_dim, p_.scale);
    T lane[kLanes<T>] = {dot(query, k.data(), p_.head_dim)}, slopes[kLanes<T>] = {1};
    rules_.apply_pair(i, j, lane, slopes);
    if (slope != nullptr) *slope = slopes[0];
    return lane[0];
  }

  // 0 for a dropped pair, else what its probability is multiplied by.
  T kept(int64_t i, int64_t j) const {
    T x = dropout_.template keep_scale<T>();
    if (dropout_.active()) dropout_.drop(bh_, i, j, 1, &x);
    return x;
  }

 private:
  const AttentionParams& p_;
  const Sequence seq_;
  const ScoreRules<T> rules_;
  const Rows q_, k_, v_;
  const Dropout dropout_;
  const uint32_t bh_;
};

}  // namespace fastattn::FASTATTN_ISA

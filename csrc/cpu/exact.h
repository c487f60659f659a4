// The definition, for rows of out whose fast result is not finite: an invisible pair takes no part at all,
// where the fast kernel multiplies by a zero that an inf or NaN would turn into NaN; and weights are
// normalised before they meet V, where the fast kernel's unnormalised sums may overflow although their mean
// does not. exact_gradients.h has the backward pass's.
#pragma once

#include <cmath>

#include "buffer.h"
#include "dropout.h"
#include "rows.h"
#include "score.h"
#include "score_strips.h"

namespace fastattn::FASTATTN_ISA {

// sum of factor * x over many vectors x, in double: a chain over thousands of keys, where the fast kernels
// have a chain of chains.
class ExactSum {
 public:
  explicit ExactSum(int64_t size) : sums_(size, 0.0) {}

  template <class T>
  void add(T factor, const T* x) {
    for (size_t d = 0; d < sums_.size(); ++d)
      sums_[d] += static_cast<double>(factor) * static_cast<double>(x[d]);
  }

  // Nothing in it is finite, nor will be.
  bool lost() const {
    for (const double x : sums_)
      if (std::isfinite(x)) return false;
    return true;
  }

  template <class T>
  void store(T* out) const {
    for (size_t d = 0; d < sums_.size(); ++d) out[d] = static_cast<T>(sums_[d]);
  }

 private:
  Vector<double> sums_;
};

// One row's keys by index from keys.begin: which are visible, and their weights, 0 for the others.
template <class T>
struct ExactWeights {
  KeyRange keys;
  Vector<uint8_t> seen;
  Vector<T> weights;  // normalised, dropped and rescaled
  T lse;
};

template <class T>
ExactWeights<T> exact_weights(const AttentionParams& p, int64_t b, int64_t h, int64_t i) {
  const ScoreRules<T> rules(p, b, h, sequence_of(p, b));
  ExactWeights<T> row{rules.row_keys(i), {}, {}, -kInfinity<T>};
  const int64_t count = std::max<int64_t>(0, row.keys.end - row.keys.begin);
  row.seen.assign(count, 0);
  row.weights.assign(count, T{0});
  const bool has_sink = p.sinks != nullptr;
  const T sink = has_sink ? static_cast<const T*>(p.sinks)[h] : -kInfinity<T>;
  T max = sink;
  bool sees_any = false;
  for_each_strip<T>(p, rules, b, h, i, 1, [&](const Run& run, int64_t, const T* s, int64_t) {
    bool visible[kStrip];
    rules.mark_visible(run, i, run.begin, run.end - run.begin, visible);
    for (int64_t j = run.begin; j < run.end; ++j) {
      if (!visible[j - run.begin] || rules.hides(s[j - run.begin])) continue;
      sees_any = true;
      row.seen[j - row.keys.begin] = 1;
      row.weights[j - row.keys.begin] = s[j - run.begin];
      max = std::max(max, s[j - run.begin]);
    }
  });
  row.lse = sink;
  if (!sees_any) return row;
  double sum = has_sink ? std::exp(sink - max) : 0.0;
  for (int64_t n = 0; n < count; ++n)
    if (row.seen[n]) sum += row.weights[n] = std::exp(row.weights[n] - max);
  row.lse = max + static_cast<T>(std::log(sum));
  const Dropout dropout(p);
  const T factor = static_cast<T>(dropout.template keep_scale<double>() / sum);
  for (int64_t n = 0; n < count; ++n)
    if (row.seen[n]) row.weights[n] *= factor;  // 0 * NaN is not 0
  if (dropout.active())
    dropout.drop(static_cast<uint32_t>(b * p.num_heads + h), i, row.keys.begin, count, row.weights.data());
  return row;
}

// Writes row i of head h to out [head_dim_v] and its weights, where not nullptr, to [len_k]; returns its lse.
template <class T>
T exact_row(const AttentionParams& p, int64_t b, int64_t h, int64_t i, T* out, T* weights) {
  const ExactWeights<T> row = exact_weights<T>(p, b, h, i);
  if (weights != nullptr) {
    std::fill_n(weights, sequence_of(p, b).len_k, T{0});
    std::copy(row.weights.begin(), row.weights.end(), weights + row.keys.begin);
  }
  const Rows values = Rows::of_keys(p, p.v, b, p.head_kv(h), sequence_of(p, b));
  Vector<T> value(p.head_dim_v);
  ExactSum sum(p.head_dim_v);
  for (int64_t j = row.keys.begin; j < row.keys.end; ++j) {
    if (j % kMaskTile == 0 && sum.lost()) break;
    if (!row.seen[j - row.keys.begin]) continue;
    load_row<T>(values(j), p.dtype, p.head_dim_v, T{1}, value.data());
    sum.add(row.weights[j - row.keys.begin], value.data());
  }
  sum.store(out);
  return row.lse;
}

}  // namespace fastattn::FASTATTN_ISA

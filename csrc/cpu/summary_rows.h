// The results of finished rows of a summary, as many rows at a time as a vector has lanes.
#pragma once

#include <algorithm>
#include <cmath>

#include "../errors.h"
#include "isa.h"
#include "row_statistics.h"
#include "top_links.h"

namespace fastattn::FASTATTN_ISA {

// A given lse of this size has lost enough to rounding that the row's keys are asked again.
template <class T>
constexpr T kLargeLse{16};

// By how much the weights that a given lse makes may differ from 1 in all, and lse from what the keys tell
// (of a large one relative to its size): far from any rounding, but not from another mask.
template <class T>
constexpr T kTolerance = static_cast<T>(0.05);

template <class T>
class RowResults {
 public:
  RowResults(const SummaryParams& p, int64_t batch, int64_t head) : p_(p), batch_(batch), head_(head) {}

  T sink() const { return static_cast<const T*>(p_.sinks)[head_]; }

  // Whether the row's weights are made of a given lse: of one that makes them as precise as softmax would,
  // within 4 units in the last place. Of an infinite or NaN score it cannot tell which.
  bool uses_lse(int64_t i) const {
    if (!p_.lse_given) return false;
    const T lse = at<T>(p_.lse, i);
    return std::abs(lse) < kLargeLse<T> || lse == -kInfinity<T>;
  }

  Normaliser<T> given(int64_t i) const { return Normaliser<T>::of_lse(at<T>(p_.lse, i)); }

  // Rows [i, i + rows), up to kLanes, of which states are known where no lse is used. links_of(r) are the
  // largest links of row i + r; not called where none are wanted.
  template <class Of>
  void store_rows(int64_t i, int64_t rows, RowStatistics<T>* row, const RowState<T>* states,
                  const Of& links_of) const {
    T total[kLanes<T>], log_total[kLanes<T>], sum[kLanes<T>], entropy[kLanes<T>], distance[kLanes<T>];
    T log_weight[kLanes<T>], factor[kLanes<T>], weight[kLanes<T>];
    for (int64_t r = 0; r < kLanes<T>; ++r) {
      const int64_t n = std::min(r, rows - 1);
      total[r] = total_of(i + n, row[n], states[n]);
      sum[r] = row[n].sum;
      entropy[r] = row[n].entropy;
      distance[r] = row[n].distance;
      log_weight[r] = row[n].max - row[n].normaliser.shift;
    }
    const Vec<T> t = load(total), log_t = vlog<T>(t);
    store(log_total, log_t);
    // From sums over e to those over p = e / total.
    store(entropy, (load(entropy) + load(sum) * log_t) / t);
    store(distance, load(distance) / t);
    store(factor, T{1} / t);
    weights_of(log_weight, factor, weight);
    for (int64_t r = 0; r < rows; ++r) {
      const bool lost = row[r].lost();
      at<T>(p_.entropy, i + r) = entropy[r];
      at<T>(p_.distance, i + r) = distance[r];
      store_link(lost, weight[r], p_.top_k > 0 ? links_of(r).key(0) : row[r].max_index,
                 &at<T>(p_.max_weight, i + r), &at<int64_t>(p_.max_index, i + r));
      if (!uses_lse(i + r)) store_lse(i + r, states[r].max + log_total[r]);
      if (p_.top_k > 0) store_links(i + r, lost, row[r].normaliser.shift, factor[r], links_of(r));
    }
  }

 private:
  // What the row's e add up to, with the sink: 1 but for the rounding of lse where that was used.
  T total_of(int64_t i, const RowStatistics<T>& row, const RowState<T>& state) const {
    if (!uses_lse(i)) return row.is_empty() ? T{1} : state.sum;
    if (row.is_empty() && row.max == -kInfinity<T>) return T{1};
    T sum = row.sum;
    if (p_.sinks != nullptr && sink() != -kInfinity<T>) sum += std::exp(sink() - row.normaliser.shift);
    if (std::abs(sum - T{1}) > kTolerance<T>) throw_wrong_lse(batch_, head_, i, sum);
    return sum;
  }

  // weights = exp(log_weights) * factors, of kLanes each; the smallest too, which vexp takes for 0.
  static void weights_of(const T* log_weights, const T* factors, T* weights) {
    const Vec<T> x = load(log_weights);
    store(weights, vexp<T>(x) * load(factors));
    constexpr T kSmall = sizeof(T) == 8 ? static_cast<T>(-708) : static_cast<T>(-86);
    if (greater_bits<T>(splat(kSmall), x) == 0) return;
    for (int64_t n = 0; n < kLanes<T>; ++n)
      if (log_weights[n] < kSmall) weights[n] = std::exp(log_weights[n]) * factors[n];
  }

  // A row's lse, found from its keys, where none was given or that was not used.
  void store_lse(int64_t i, T found) const {
    T& lse = at<T>(p_.lse, i);
    if (p_.lse_given) {
      const T tolerance = kTolerance<T> * std::max(T{1}, std::abs(lse) / kLargeLse<T>);
      const bool is_near = std::isfinite(lse) && std::abs(lse - found) <= tolerance;
      const bool is_right = found == found ? is_near : !std::isfinite(lse);
      if (!is_right) throw_wrong_lse(batch_, head_, i, std::exp(found - lse));
    }
    lse = found;
  }

  void store_links(int64_t i, bool lost, T shift, T factor, const TopLinks<T>& top) const {
    T* weights = &at<T>(p_.topk_weights, i);
    int64_t* indices = &at<int64_t>(p_.topk_indices, i);
    T log_weight[kLanes<T>], factors[kLanes<T>], weight[kLanes<T>];
    store(factors, splat(factor));
    for (int64_t first = 0; first < p_.top_k; first += kLanes<T>) {
      const int64_t count = std::min<int64_t>(kLanes<T>, p_.top_k - first);
      for (int64_t n = 0; n < kLanes<T>; ++n)
        log_weight[n] = n < count ? top.scores()[first + n] - shift : T{0};
      weights_of(log_weight, factors, weight);
      for (int64_t n = 0; n < count; ++n)
        store_link(lost, weight[n], top.key(first + n), weights + first + n, indices + first + n);
    }
  }

  // A key of weight 0 is no link.
  static void store_link(bool lost, T weight, int64_t key, T* out, int64_t* index) {
    *out = lost ? kNaN<T> : weight;
    *index = !lost && weight > T{0} ? key : -1;
  }

  template <class E>
  E& at(const Tensor& t, int64_t i) const {
    return static_cast<E*>(t.data)[t.offset(batch_, head_, i)];
  }

  const SummaryParams& p_;
  const int64_t batch_, head_;
};

}  // namespace fastattn::FASTATTN_ISA

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

// One head's rows of a tensor with a number for each; of no tensor, nullptr.
template <class E>
struct Column {
  E* data;
  int64_t stride;

  Column(const Tensor& t, int64_t batch, int64_t head)
      : data(t.data == nullptr ? nullptr : static_cast<E*>(t.data) + t.offset(batch, head, 0)),
        stride(t.row) {}
  E& operator[](int64_t i) const { return data[i * stride]; }
};

template <class T>
class RowResults {
 public:
  RowResults(const SummaryParams& p, int64_t batch, int64_t head, WrongLse& wrong)
      : p_(p),
        batch_(batch),
        head_(head),
        given_(p.given, batch, head),
        lse_(p.lse, batch, head),
        entropy_(p.entropy, batch, head),
        distance_(p.distance, batch, head),
        max_weight_(p.max_weight, batch, head),
        max_index_(p.max_index, batch, head),
        wrong_(wrong) {}

  T sink() const { return static_cast<const T*>(p_.sinks)[head_]; }

  // Whether the row's weights are made of a given lse: of one that makes them as precise as softmax would,
  // within 4 units in the last place. Of an infinite or NaN score it cannot tell which.
  bool uses_lse(int64_t i) const {
    if (given_.data == nullptr) return false;
    return std::abs(given_[i]) < kLargeLse<T> || given_[i] == -kInfinity<T>;
  }

  Normaliser<T> given(int64_t i) const { return Normaliser<T>::of_lse(given_[i]); }

  // Rows [i, i + rows), up to kLanes: what is known of each, whether its lse was used, and its state where it
  // was not. links_of(r) are the largest links of row i + r; not called where none are wanted.
  template <class Of>
  void store_rows(int64_t i, int64_t rows, const RowStatistics<T>* row, const bool* is_known,
                  const RowState<T>* states, const Of& links_of) const {
    T total[kLanes<T>], log_total[kLanes<T>], sum[kLanes<T>], entropy[kLanes<T>], distance[kLanes<T>];
    T log_weight[kLanes<T>], factor[kLanes<T>], weight[kLanes<T>];
    for (int64_t r = 0; r < kLanes<T>; ++r) {
      const int64_t n = std::min(r, rows - 1);
      total[r] = is_known[n] ? known_total(i + n, row[n]) : row[n].is_empty() ? T{1} : states[n].sum;
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
      entropy_[i + r] = entropy[r];
      distance_[i + r] = distance[r];
      store_link(lost, weight[r], p_.top_k > 0 ? links_of(r).key(0) : row[r].max_index, &max_weight_[i + r],
                 &max_index_[i + r]);
      lse_[i + r] = is_known[r] ? given_[i + r] : found_lse(i + r, states[r].max + log_total[r]);
      if (p_.top_k > 0) store_links(i + r, lost, row[r].normaliser.shift, factor[r], links_of(r));
    }
  }

 private:
  // What the e that a given lse makes add up to, with the sink: 1 but for rounding.
  T known_total(int64_t i, const RowStatistics<T>& row) const {
    if (row.is_empty() && row.max == -kInfinity<T>) return T{1};
    T sum = row.sum;
    if (p_.sinks != nullptr && sink() != -kInfinity<T>) sum += std::exp(sink() - row.normaliser.shift);
    if (std::abs(sum - T{1}) > kTolerance<T>) wrong_.add(batch_, head_, i, sum);
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
  T found_lse(int64_t i, T found) const {
    if (given_.data != nullptr) {
      const T lse = given_[i];
      const T tolerance = kTolerance<T> * std::max(T{1}, std::abs(lse) / kLargeLse<T>);
      const bool is_near = std::isfinite(lse) && std::abs(lse - found) <= tolerance;
      const bool is_right = found == found ? is_near : !std::isfinite(lse);
      if (!is_right) wrong_.add(batch_, head_, i, std::exp(found - lse));
    }
    return found;
  }

  void store_links(int64_t i, bool lost, T shift, T factor, const TopLinks<T>& top) const {
    T* weights = &Column<T>(p_.topk_weights, batch_, head_)[i];
    int64_t* indices = &Column<int64_t>(p_.topk_indices, batch_, head_)[i];
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

  const SummaryParams& p_;
  const int64_t batch_, head_;
  const Column<const T> given_;
  const Column<T> lse_, entropy_, distance_, max_weight_;
  const Column<int64_t> max_index_;
  WrongLse& wrong_;
};

}  // namespace fastattn::FASTATTN_ISA

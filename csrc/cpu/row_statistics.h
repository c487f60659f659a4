// What summaries know of one query row: its normaliser, and the sums and maxima over its keys so far.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd.h"
#include "softmax.h"

namespace fastattn::FASTATTN_ISA {

template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

// p = exp(s - shift) * factor. With a row's largest score and sum, that is what softmax computes; with its
// lse, exp(s - lse). An empty row's shift is +inf, which makes its weights 0.
template <class T>
struct Normaliser {
  T shift = kInfinity<T>;
  T factor{1};

  // From a row's running maximum and sum.
  static Normaliser of(const RowState<T>& state) {
    if (state.max == -kInfinity<T>) return {};
    return {state.max, T{1} / state.sum};
  }

  // From its lse, which is finite or, of an empty row, -inf.
  static Normaliser of_lse(T lse) {
    if (lse == -kInfinity<T>) return {};
    return {lse, T{1}};
  }

  T weight(T s) const { return s == -kInfinity<T> ? T{0} : std::exp(s - shift) * factor; }
};

// Takes s[0, padded) into the maximum and sum of a row; false, and the state as it was, where a NaN is among
// them.
template <class T>
bool add_scores(const T* s, int64_t padded, RowState<T>& state) {
  Vec<T> top = load(s);
  for (int64_t n = kLanes<T>; n < padded; n += kLanes<T>) top = vmax<T>(top, load(s + n));
  const T max = std::max(state.max, reduce_max<T>(top));
  if (max == -kInfinity<T>) return !std::any_of(s, s + padded, [](T x) { return x != x; });
  Vec<T> sum{};
  for (int64_t n = 0; n < padded; n += kLanes<T>) sum += vexp<T>(load(s + n) - max);
  const T total = reduce_add<T>(sum);
  if (total != total) return false;
  const T rescale = max == state.max || state.max == -kInfinity<T> ? T{1} : std::exp(state.max - max);
  state.max = max;
  state.sum = state.sum * rescale + total;
  return true;
}

// The first index at which s, none of whose elements is larger, is `largest`.
template <class T>
int64_t first_of(const T* s, T largest) {
  constexpr uint32_t kAll = (1u << kLanes<T>)-1;
  for (int64_t n = 0;; n += kLanes<T>) {
    const uint32_t less = greater_bits<T>(splat(largest), load(s + n));
    if (less != kAll) return n + __builtin_ctz(~less);
  }
}

template <class T>
struct RowStatistics {
  Normaliser<T> normaliser;
  // Sums over e = exp(s - shift), of e, -e ln e and e |i + offset - j|.
  T sum{0}, entropy{0}, distance{0};
  T max = -kInfinity<T>;
  int64_t max_index = -1;

  // s[0, padded) are the scores with the keys from j0 on; `position` is i + offset. Weights get p.
  // Returns the largest score, or NaN, and the statistics as they were, where a weight is NaN.
  T add(const T* s, int64_t padded, int64_t j0, int64_t position, T* weights) {
    // Below this a weight is 0: of a hidden key 0 * -inf must not become NaN.
    constexpr T kLeast = static_cast<T>(-1000);
    Vec<T> e_sum{}, entropy_sum{}, distance_sum{}, top = load(s), away;
    for (int n = 0; n < kLanes<T>; ++n) away[n] = static_cast<T>(position - j0 - n);
    for (int64_t n = 0; n < padded; n += kLanes<T>) {
      const Vec<T> score = load(s + n);
      const Vec<T> log_e = score - normaliser.shift;
      const Vec<T> e = vexp<T>(log_e);
      store(weights + n, e * normaliser.factor);
      e_sum += e;
      entropy_sum -= e * vmax<T>(splat(kLeast), log_e);
      distance_sum += e * vabs<T>(away);
      away -= static_cast<T>(kLanes<T>);
      top = vmax<T>(top, score);
    }
    const T added = reduce_add<T>(entropy_sum);
    if (added != added) return added;
    entropy += added;
    sum += reduce_add<T>(e_sum);
    distance += reduce_add<T>(distance_sum);
    const T largest = reduce_max<T>(top);
    if (largest > max) {
      max = largest;
      max_index = j0 + first_of(s, largest);
    }
    return largest;
  }

  // From sums over e to those over p = e / total.
  void finish(T total) {
    normaliser.factor = T{1} / total;
    entropy = (entropy + sum * std::log(total)) / total;
    distance /= total;
  }

  bool is_empty() const { return normaliser.shift == kInfinity<T>; }
  void lose() { entropy = distance = kNaN<T>; }
  bool lost() const { return entropy != entropy; }
};

}  // namespace fastattn::FASTATTN_ISA

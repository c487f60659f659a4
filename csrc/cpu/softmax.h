// The online softmax of one row (Milakov and Gimelshein 2018): a running maximum and sum over key segments.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "shuffle.h"
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

template <class T>
struct RowState {
  T max = -kInfinity<T>;
  T sum{0};
};

// A sink is a key with a score and no value.
template <class T>
RowState<T> sink_state(T sink) {
  return {sink, sink == -kInfinity<T> ? T{0} : T{1}};
}

// s[0, padded) becomes exp(s - max) for the new maximum; returns what earlier sums must be multiplied by.
// A NaN among the scores always reaches the sums: that is how finish_row notices it.
template <class T>
T softmax_update(T* s, int64_t padded, RowState<T>& state) {
  Vec<T> top = load(s);
  for (int64_t n = kLanes<T>; n < padded; n += kLanes<T>) top = vmax<T>(top, load(s + n));
  const T max = std::max(state.max, reduce_max<T>(top));
  if (max == -kInfinity<T>) {  // nothing visible so far, or only NaN, which no maximum shows
    const bool nan = std::any_of(s, s + padded, [](T x) { return x != x; });
    if (nan) state.max = state.sum = std::numeric_limits<T>::quiet_NaN();
    std::fill(s, s + padded, nan ? state.max : T{0});
    return T{1};
  }
  // Before the first visible key there is nothing to rescale.
  const T rescale = max == state.max || state.max == -kInfinity<T> ? T{1} : std::exp(state.max - max);
  Vec<T> sum{};
  for (int64_t n = 0; n < padded; n += kLanes<T>) {
    const Vec<T> e = vexp<T>(load(s + n) - max);
    store(s + n, e);
    sum += e;
  }
  state.max = max;
  state.sum = state.sum * rescale + reduce_add<T>(sum);
  return rescale;
}

// The same for `rows` <= kLanes rows, `stride` apart, with exp(s - max) in e, which may be s: reductions and
// the states' arithmetic are done for all of them at once, a row in each lane. factors[r] is what earlier
// sums of row r must be multiplied by.
template <class T>
void softmax_update_lanes(const T* s, T* e, int64_t stride, int64_t rows, int64_t padded, RowState<T>* states,
                          T* factors) {
  constexpr int kN = kLanes<T>;
  Vec<T> row[kN];
  T lane[kN] = {}, sums[kN] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const T* x = s + r * stride;
    Vec<T> top = load(x);
    for (int64_t n = kN; n < padded; n += kN) top = vmax<T>(top, load(x + n));
    row[r] = top;
    lane[r] = states[r].max;
    sums[r] = states[r].sum;
  }
  for (int64_t r = rows; r < kN; ++r) row[r] = Vec<T>{};
  const Vec<T> old = load(lane), max = vmax<T>(max_rows<T>(row), old);
  // A row that sees nothing so far gets weights exp(-inf - 0).
  store(lane, max == -kInfinity<T> ? Vec<T>{} : max);
  for (int64_t r = 0; r < rows; ++r) {
    const T* x = s + r * stride;
    T* y = e + r * stride;
    Vec<T> sum{};
    for (int64_t n = 0; n < padded; n += kN) {
      const Vec<T> weight = vexp<T>(load(x + n) - lane[r]);
      store(y + n, weight);
      sum += weight;
    }
    row[r] = sum;
  }
  for (int64_t r = rows; r < kN; ++r) row[r] = Vec<T>{};
  const Vec<T> added = sum_rows<T>(row);
  // Before the first visible key there is nothing to rescale.
  const Vec<T> factor = max == old || old == -kInfinity<T> ? splat(T{1}) : vexp<T>(old - max);
  store(factors, factor);
  store(sums, load(sums) * factor + added);
  // Of a row that saw only NaN so far no maximum shows it.
  store(lane, max == -kInfinity<T> && added != added ? added : max);
  for (int64_t r = 0; r < rows; ++r) states[r] = {lane[r], sums[r]};
}

template <class T>
void scale_row(T* x, int64_t padded, T factor) {
  for (int64_t n = 0; n < padded; n += kLanes<T>) store(x + n, load(x + n) * factor);
}

// x * 0 is 0 for a finite x and NaN for any other.
template <class T>
bool all_finite(const T* x, int64_t padded) {
  Vec<T> sum{};
  for (int64_t n = 0; n < padded; n += kLanes<T>) sum += load(x + n) * T{0};
  return reduce_add<T>(sum) == T{0};
}

}  // namespace fastattn::FASTATTN_ISA

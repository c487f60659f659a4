// The online softmax of one row (Milakov and Gimelshein 2018): a running maximum and sum over key segments.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

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

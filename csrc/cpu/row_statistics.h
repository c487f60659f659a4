// What summaries know of query rows: their normalisers, and the sums and maxima over their keys so far.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "segment_scores.h"
#include "simd.h"
#include "softmax.h"

namespace fastattn::FASTATTN_ISA {

template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

// p = exp(s - shift) * factor. With a row's largest score and sum, that is what softmax computes; with its
// lse, exp(s - lse). An empty row's shift is +inf, which makes its weights 0; a lost row's is NaN.
template <class T>
struct Normaliser {
  T shift = kInfinity<T>;
  T factor{1};

  // From a row's running maximum and sum.
  static Normaliser of(const RowState<T>& state) {
    if (state.max == -kInfinity<T>) return {};
    if (state.sum != state.sum) return {state.max, T{1}};  // 0 * factor must stay 0
    return {state.max, T{1} / state.sum};
  }

  // From its lse, which is finite or, of an empty row, -inf.
  static Normaliser of_lse(T lse) {
    if (lse == -kInfinity<T>) return {};
    return {lse, T{1}};
  }
};

// The first index at which s[0, padded), none of whose elements is larger, is `largest`.
template <class T>
int64_t first_of(const T* s, int64_t padded, T largest) {
  for (int64_t base = 0;; base += 64) {  // the place is chance: a branch for 64 keys, not for each vector
    uint64_t found = 0;
    for (int64_t n = base; n < std::min(padded, base + 64); n += kLanes<T>) {
      const uint32_t less = greater_bits<T>(splat(largest), load(s + n));
      found |= static_cast<uint64_t>(less ^ ((1u << kLanes<T>)-1)) << (n - base);
    }
    if (found != 0) return base + __builtin_ctzll(found);
  }
}

// |position - j| for a block of rows and the keys of a segment: one table, of which each row reads a stretch.
template <class T, int64_t kBlock>
class Distances {
 public:
  // For `rows` rows, whose first stands at `position` among the keys, and the keys from s0 on.
  void start(int64_t position, int64_t rows, int64_t s0) {
    const auto ahead = static_cast<Int<T>>(position - s0 + kBlock - 1);  // of T's size: converted by vectors
    for (auto n = static_cast<Int<T>>(kBlock - rows); n < kSize; ++n)
      table_[n] = static_cast<T>(std::abs(ahead - n));
  }

  // Those of the block's row r: element c belongs to key s0 + c. Those of the next row begin one before.
  const T* row(int64_t r) const { return table_ + kBlock - 1 - r; }

 private:
  static constexpr int64_t kSize = kBlock - 1 + kSegmentKeys;
  T table_[kSize];
};

// Of up to kLanes rows, a row in each lane: sums over e = exp(s - shift) of e, -e ln e and e |position - j|,
// and the largest score. Where an e is NaN, so is the entropy.
template <class T>
class SegmentSums {
 public:
  T sum[kLanes<T>], entropy[kLanes<T>], distance[kLanes<T>], largest[kLanes<T>];

  // Scores s and weights e have rows `stride` apart; `distances` is the first row's. Where kWeigh, e is
  // written, else it is there already.
  template <bool kWeigh>
  static SegmentSums of(const T* s, T* e, int64_t stride, int64_t rows, int64_t padded, const T* shifts,
                        const T* distances) {
    SegmentSums found;
    Vec<T> sums[4][kLanes<T>];
    for (int n = 0; n < 4; ++n)
      for (int64_t r = rows; r < kLanes<T>; ++r) sums[n][r] = Vec<T>{};
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2)
      add_rows<kWeigh, 2>(r, s + r * stride, e + r * stride, stride, padded, shifts + r, distances - r, sums);
    if (r < rows)
      add_rows<kWeigh, 1>(r, s + r * stride, e + r * stride, stride, padded, shifts + r, distances - r, sums);
    store(found.sum, sum_rows<T>(sums[0]));
    store(found.entropy, sum_rows<T>(sums[1]));
    store(found.distance, sum_rows<T>(sums[2]));
    store(found.largest, max_rows<T>(sums[3]));
    return found;
  }

 private:
  // Rows from `first` on, side by side: each addition waits for the one before it in its row.
  template <bool kWeigh, int kRowsAtOnce>
  static FASTATTN_INLINE void add_rows(int64_t first, const T* s, T* e, int64_t stride, int64_t padded,
                                       const T* shifts, const T* distances, Vec<T> (*out)[kLanes<T>]) {
    Vec<T> sums[kRowsAtOnce] = {}, entropies[kRowsAtOnce] = {}, lengths[kRowsAtOnce] = {}, tops[kRowsAtOnce];
    for (int r = 0; r < kRowsAtOnce; ++r) tops[r] = splat(-kInfinity<T>);
    for (int64_t n = 0; n < padded; n += kLanes<T>)
#pragma GCC unroll 2
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const Vec<T> score = load(s + r * stride + n);
        // Clamped, so that of a hidden key 0 * -inf does not become NaN.
        const Vec<T> x = vmax<T>(splat(kExpLowest<T>), score - shifts[r]);
        Vec<T> weight;
        if constexpr (kWeigh) {
          weight = vexp_clamped<T, false>(x);
          store(e + r * stride + n, weight);
        } else {
          weight = load(e + r * stride + n);
        }
        sums[r] += weight;
        entropies[r] -= weight * x;
        lengths[r] += weight * load(distances - r + n);
        tops[r] = vmax<T>(tops[r], score);
      }
    for (int r = 0; r < kRowsAtOnce; ++r) {
      out[0][first + r] = sums[r];
      out[1][first + r] = entropies[r];
      out[2][first + r] = lengths[r];
      out[3][first + r] = tops[r];
    }
  }
};

template <class T>
struct RowStatistics {
  Normaliser<T> normaliser;
  // Sums over e = exp(s - shift), of e, -e ln e and e |position - j|.
  T sum{0}, entropy{0}, distance{0};
  T max = -kInfinity<T>;
  int64_t max_index = -1;  // not kept where the largest links are

  // One segment's sums, of this lane.
  void add(const SegmentSums<T>& segment, int64_t lane) {
    sum += segment.sum[lane];
    entropy += segment.entropy[lane];
    distance += segment.distance[lane];
  }

  bool is_empty() const { return normaliser.shift == kInfinity<T>; }
  void lose() { entropy = distance = kNaN<T>; }
  bool lost() const { return entropy != entropy; }
};

}  // namespace fastattn::FASTATTN_ISA

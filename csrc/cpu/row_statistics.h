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
    const int64_t ahead = position - s0 + kBlock - 1;
    for (int64_t n = kBlock - rows; n < kSize; ++n) table_[n] = static_cast<T>(std::abs(ahead - n));
  }

  // Those of the block's row r: element c belongs to key s0 + c. Those of the next row begin one before.
  const T* row(int64_t r) const { return table_ + kBlock - 1 - r; }

 private:
  static constexpr int64_t kSize = kBlock - 1 + kSegmentKeys;
  T table_[kSize];
};

// e[0, padded) = exp(s - shift). A pass of its own: what waits for an exponential in the same loop takes the
// places in the scheduler in which the next exponentials would start.
template <class T>
void weigh(const T* s, int64_t padded, T shift, T* e) {
  for (int64_t n = 0; n < padded; n += kLanes<T>) store(e + n, vexp<T>(load(s + n) - shift));
}

// Of up to kLanes rows, a row in each lane: sums over e of e, -e ln e and e |position - j|, and the largest
// score. Where an e is NaN, so is the entropy.
template <class T>
class SegmentSums {
 public:
  T sum[kLanes<T>], entropy[kLanes<T>], distance[kLanes<T>], largest[kLanes<T>];

  // Scores s and e = exp(s - shift) have rows `stride` apart; `distances` is the first row's.
  SegmentSums(const T* s, const T* e, int64_t stride, int64_t rows, int64_t padded, const T* shifts,
              const T* distances) {
    for (int64_t r = rows; r < kLanes<T>; ++r) sums_[r] = entropies_[r] = distances_[r] = tops_[r] = Vec<T>{};
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2)
      add_rows<2>(r, s + r * stride, e + r * stride, stride, padded, shifts + r, distances - r);
    if (r < rows) add_rows<1>(r, s + r * stride, e + r * stride, stride, padded, shifts + r, distances - r);
    store(sum, sum_rows<T>(sums_));
    store(entropy, sum_rows<T>(entropies_));
    store(distance, sum_rows<T>(distances_));
    store(largest, max_rows<T>(tops_));
  }

 private:
  // Rows from `first` on, side by side: each addition waits for the one before it in its row.
  template <int kRowsAtOnce>
  FASTATTN_INLINE void add_rows(int64_t first, const T* s, const T* e, int64_t stride, int64_t padded,
                                const T* shifts, const T* distances) {
    // Below this an e is 0: of a hidden key 0 * -inf must not become NaN.
    constexpr T kLeast = static_cast<T>(-1000);
    Vec<T> sums[kRowsAtOnce] = {}, entropies[kRowsAtOnce] = {}, lengths[kRowsAtOnce] = {}, tops[kRowsAtOnce];
    for (int r = 0; r < kRowsAtOnce; ++r) tops[r] = splat(-kInfinity<T>);
    for (int64_t n = 0; n < padded; n += kLanes<T>)
#pragma GCC unroll 2
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const Vec<T> score = load(s + r * stride + n), weight = load(e + r * stride + n);
        sums[r] += weight;
        entropies[r] -= weight * vmax<T>(splat(kLeast), score - shifts[r]);
        lengths[r] += weight * load(distances - r + n);
        tops[r] = vmax<T>(tops[r], score);
      }
    for (int r = 0; r < kRowsAtOnce; ++r) {
      sums_[first + r] = sums[r];
      entropies_[first + r] = entropies[r];
      distances_[first + r] = lengths[r];
      tops_[first + r] = tops[r];
    }
  }

  Vec<T> sums_[kLanes<T>], entropies_[kLanes<T>], distances_[kLanes<T>], tops_[kLanes<T>];
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

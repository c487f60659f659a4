// The largest scores of one query row and their keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "gemm.h"
#include "segment_scores.h"
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

// The k largest scores of a row, descending, and their keys. Keys arrive in ascending order and only a larger
// score displaces, so that of equal ones the first stays in front.
template <class T>
class TopLinks {
 public:
  TopLinks(T* scores, int32_t* keys, int64_t k) : scores_(scores), keys_(keys), k_(k) {}

  void clear() const {
    std::fill(scores_, scores_ + k_, -kInfinity<T>);
    std::fill(keys_, keys_ + k_, -1);
  }

  // s[0, padded), of no more than a segment, belong to the keys from j0 on; `largest` is their maximum.
  void add(const T* s, int64_t padded, int64_t j0, T largest) const {
    T least = scores_[k_ - 1];
    if (!(largest > least)) return;
    if (least == -kInfinity<T>) least = bound(s, padded);
    int16_t chosen[kSegmentKeys];
    const int64_t count = find_greater(s, padded, least, chosen);
    const int64_t held = scores_[0] == -kInfinity<T> ? 0 : k_;
    if (held + count <= kRanked) return rank(s, j0, chosen, count, held);
    for (int64_t n = 0; n < count; ++n) {
      const T score = s[chosen[n]];
      if (!(score > least)) continue;
      insert(score, static_cast<int32_t>(j0 + chosen[n]));
      least = std::max(least, scores_[k_ - 1]);
    }
  }

  const T* scores() const { return scores_; }
  int32_t key(int64_t n) const { return keys_[n]; }

 private:
  static constexpr int64_t kRanked = 64;  // a bit for each

  // Something below the k-th largest score, which spares most candidates for a list that is not full: the
  // largest scores of each lane, of so many strips that they are k or more, are k scores that are no less.
  T bound(const T* s, int64_t padded) const {
    const int64_t strips = (k_ + kLanes<T> - 1) / kLanes<T>;
    if (strips * 4 * kLanes<T> > padded) return -kInfinity<T>;  // too short to tell
    const int64_t step = padded / kLanes<T> / strips * kLanes<T>;
    Vec<T> low = splat(kInfinity<T>);
    for (int64_t strip = 0; strip < strips; ++strip) {
      Vec<T> top = load(s + strip * step);
      for (int64_t n = kLanes<T>; n < step; n += kLanes<T>) top = vmax<T>(top, load(s + strip * step + n));
      low = vmin<T>(low, top);
    }
    T lane[kLanes<T>];
    store(lane, low);
    int64_t count = kLanes<T>;
    for (; strips == 1 && count / 2 >= k_; count /= 2)
      for (int64_t n = 0; n < count / 2; ++n) lane[n] = std::max(lane[n], lane[n + count / 2]);
    const T least = *std::min_element(lane, lane + count);
    // Below it by no less than a normal number: a smaller one is 0 where the processor flushes.
    return std::min(std::nextafter(least, -kInfinity<T>), least - std::numeric_limits<T>::min());
  }

  // The places of the scores above `least`, ascending, and their number. Bits are gathered before they are
  // looked at: where they are is chance, which branches on each vector would guess wrong.
  static int64_t find_greater(const T* s, int64_t padded, T least, int16_t* chosen) {
    int64_t count = 0;
    for (int64_t base = 0; base < padded; base += 64) {
      const int64_t keys = std::min<int64_t>(64, padded - base);
      uint64_t bits = 0;
      for (int64_t n = 0; n < keys; n += kLanes<T>)
        bits |= static_cast<uint64_t>(greater_bits<T>(load(s + base + n), splat(least))) << n;
      for (; bits != 0; bits &= bits - 1)
        chosen[count++] = static_cast<int16_t>(base + __builtin_ctzll(bits));
    }
    return count;
  }

  // Takes in the chosen scores together with those that are held, each put where as many others go before
  // it: no branch depends on the scores.
  void rank(const T* s, int64_t j0, const int16_t* chosen, int64_t count, int64_t held) const {
    T score[kRanked], sorted[kRanked + 1];
    int32_t key[kRanked], sorted_key[kRanked + 1];
    std::copy(scores_, scores_ + held, score);
    std::copy(keys_, keys_ + held, key);
    const int64_t total = held + count, padded = round_to_lanes<T>(total);
    for (int64_t n = held; n < total; ++n) {
      score[n] = s[chosen[n - held]];
      key[n] = static_cast<int32_t>(j0 + chosen[n - held]);
    }
    std::fill(score + total, score + padded, -kInfinity<T>);
    const int64_t last = std::min(k_, kRanked);
    std::fill(sorted, sorted + last, -kInfinity<T>);
    std::fill(sorted_key, sorted_key + last, -1);
    for (int64_t n = 0; n < total; ++n) {
      const Vec<T> mine = splat(score[n]);
      uint64_t greater = 0, less = 0;
      for (int64_t c = 0; c < padded; c += kLanes<T>) {
        greater |= static_cast<uint64_t>(greater_bits<T>(load(score + c), mine)) << c;
        less |= static_cast<uint64_t>(greater_bits<T>(mine, load(score + c))) << c;
      }
      const uint64_t equal_before = ~(greater | less) & ((uint64_t{1} << n) - 1);
      const int64_t place = std::min<int64_t>(__builtin_popcountll(greater | equal_before), last);
      sorted[place] = score[n];
      sorted_key[place] = key[n];
    }
    std::copy(sorted, sorted + last, scores_);
    std::copy(sorted_key, sorted_key + last, keys_);
  }

  void insert(T score, int32_t key) const {
    int64_t n = k_ - 1;
    for (; n > 0 && scores_[n - 1] < score; --n) {
      scores_[n] = scores_[n - 1];
      keys_[n] = keys_[n - 1];
    }
    scores_[n] = score;
    keys_[n] = key;
  }

  T* scores_;
  int32_t* keys_;
  int64_t k_;
};

}  // namespace fastattn::FASTATTN_ISA

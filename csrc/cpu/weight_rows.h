// The weight matrix, for callers who ask for it beside the output: a task keeps the unnormalised weights of
// its rows until it knows each row's maximum and sum, which make weights of them, by head or added up to the
// mean over the heads.
#pragma once

#include <algorithm>

#include "../params.h"
#include "buffer.h"
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

constexpr int64_t kSegment = 256;  // keys per softmax step: 64 KB of packed K at head_dim 64, half of an L2

// Of `rows` rows of one batch entry. Segment by segment, the place of a row's scores, [rows, kSegment], is
// also where they become exp(score - maximum so far) and stay. What they are to be multiplied by is known
// later, a number for each tile of keys: the maximum until the row is finished, and 0 for a tile that no key
// of was visible, whose values were never written.
template <class T>
class WeightRows {
 public:
  WeightRows(const AttentionParams& p, int64_t batch, int64_t rows, Buffer<T>& scratch)
      : p_(p),
        batch_(batch),
        rows_(rows),
        tiles_(round_to_lanes<T>((p.seqlen_k + kMaskTile - 1) / kMaskTile)) {
    if (!wanted()) return;
    const int64_t values = (p.seqlen_k + kSegment - 1) / kSegment * rows * kSegment;
    values_ = scratch.ensure(values + rows * tiles_);
    factors_ = values_ + values;
    std::fill(factors_, factors_ + rows * tiles_, -kInfinity<T>);
  }

  bool wanted() const { return p_.weights.data != nullptr; }

  // The scores of row r with the segment of keys at s0.
  T* values(int64_t r, int64_t s0) const { return values_ + (s0 / kSegment * rows_ + r) * kSegment; }

  // Row r's values of the keys [begin, end) of the segment at s0 are relative to `max`. The tiles that these
  // lie in get no others.
  void keep(int64_t r, int64_t s0, int64_t begin, int64_t end, T max) const {
    const int64_t first = begin / kMaskTile, last = (end - 1) / kMaskTile + 1;
    T* x = values(r, s0);
    std::fill(x + first * kMaskTile, x + begin, T{0});
    std::fill(x + end, x + last * kMaskTile, T{0});
    T* factors = factors_ + r * tiles_ + s0 / kMaskTile;
    std::fill(factors + first, factors + last, max);
  }

  // Row r's maximum is now known, and what its weights are to be multiplied by.
  void finish(int64_t r, T max, T factor) const {
    T* factors = factors_ + r * tiles_;
    for (int64_t t = 0; t < tiles_; t += kLanes<T>)
      store(factors + t, vexp<T>(load(factors + t) - max) * factor);
  }

  // Row r sees nothing.
  void clear(int64_t r) const { std::fill_n(factors_ + r * tiles_, tiles_, T{0}); }

  // Row r's weights are these, [seqlen_k].
  void set(int64_t r, const T* weights) const {
    std::fill_n(factors_ + r * tiles_, tiles_, T{1});
    for (int64_t s0 = 0; s0 < p_.seqlen_k; s0 += kSegment)
      std::copy(weights + s0, weights + std::min(p_.seqlen_k, s0 + kSegment), values(r, s0));
  }

  // Writes row i of a head, which is row r here. Where weights are averaged, heads come in ascending order.
  void write(int64_t r, int64_t head, int64_t i) const {
    const bool mean = p_.average_weights, first = !mean || head == 0;
    const T share = mean ? T{1} / static_cast<T>(p_.num_heads) : T{1};
    T* out = static_cast<T*>(p_.weights.data) + p_.weights.offset(batch_, mean ? 0 : head, i);
    for (int64_t t = 0; t * kMaskTile < p_.seqlen_k; ++t) {
      const int64_t j0 = t * kMaskTile, n = std::min(p_.seqlen_k - j0, kMaskTile);
      const T factor = factors_[r * tiles_ + t] * share;
      const T* x = values(r, j0) + j0 % kSegment;
      if (factor == T{0}) {
        if (first) std::fill_n(out + j0, n, T{0});
      } else if (first) {
        for (int64_t c = 0; c < n; ++c) out[j0 + c] = x[c] * factor;
      } else {
        for (int64_t c = 0; c < n; ++c) out[j0 + c] += x[c] * factor;
      }
    }
  }

 private:
  const AttentionParams& p_;
  const int64_t batch_, rows_, tiles_;  // tiles: of a row, in whole vectors
  T *values_ = nullptr, *factors_ = nullptr;
};

}  // namespace fastattn::FASTATTN_ISA

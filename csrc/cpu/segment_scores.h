// The products of query rows with the keys of one segment, for kernels that pass over a segment's keys with
// many rows: K is packed a panel at a time, when a row first needs it.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "few_rows.h"
#include "gemm.h"
#include "rows.h"

namespace fastattn::FASTATTN_ISA {

// Keys per segment: 64 KB of packed K at head_dim 64, half of an L2.
constexpr int64_t kSegmentKeys = 256;

template <class T>
class SegmentScores {
 public:
  // Of query heads that share the key-value head of query head h.
  SegmentScores(const AttentionParams& p, int64_t b, int64_t h, const Sequence& seq, Buffer<T>& panels)
      : p_(p), seq_(seq), keys_(Rows::of_keys(p, p.k, b, p.head_kv(h), seq)) {
    panels_ = panels.ensure((few_rows() ? kLanes<T> : kSegmentKeys) * p.head_dim);
  }

  void start(int64_t s0) {
    s0_ = s0;
    packed_ = 0;
  }

  // scores[r * kSegmentKeys + c] = scale * q_r·k of the segment's key c, for begin <= c < end: multiples of
  // the vector's lanes. The same bits as in the forward pass.
  void compute(const Block<T>& queries, int64_t rows, int64_t begin, int64_t end, T* scores) {
    if (few_rows()) {
      const int64_t keys = std::min(end, seq_.len_k - s0_) - begin;
      dot_rows<T>(
          rows, [&](int64_t m) { return queries.data + m * queries.stride; },
          [&](int64_t c) { return keys_(s0_ + begin + c); }, p_.dtype, keys, p_.head_dim,
          static_cast<T>(p_.scale), scores + begin, kSegmentKeys, panels_);
      return;
    }
    pack(begin, end);
    gemm_panels<T>(rows, begin, end, p_.head_dim, queries.data, queries.stride, panels_, scores,
                   kSegmentKeys);
  }

 private:
  static_assert(kSegmentKeys / kPanel<T> <= 64, "a bit for each panel of a segment");

  bool few_rows() const { return seq_.len_q <= kDotRows; }

  void pack(int64_t begin, int64_t end) {
    for (int64_t n = begin / kPanel<T>; n * kPanel<T> < end; ++n) {
      if (packed_ >> n & 1) continue;
      packed_ |= uint64_t{1} << n;
      const int64_t first = s0_ + n * kPanel<T>;
      pack_panel<T>([&](int64_t c) { return keys_(first + c); }, p_.dtype, seq_.len_k - first, p_.head_dim,
                    static_cast<T>(p_.scale), panels_ + n * kPanel<T> * p_.head_dim);
    }
  }

  const AttentionParams& p_;
  const Sequence seq_;
  const Rows keys_;
  T* panels_;  // of few rows, dot_rows' copy
  int64_t s0_ = 0;
  uint64_t packed_ = 0;  // bits by index within the segment
};

}  // namespace fastattn::FASTATTN_ISA

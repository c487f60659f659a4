// From accumulators to out and lse.
#pragma once

#include "exact.h"

namespace fastattn::cuda {

// Of each row: what out's sums are multiplied by, and lse.
struct RowResults {
  float factor[2], lse[2];
};

// scale: from the unit of softmax.max to natural scores.
FASTATTN_DEVICE RowResults results_of(const ForwardArguments& a, const ThreadRows& rows, Softmax& softmax,
                                      float scale) {
  softmax.finish();
  RowResults results;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float top = softmax.max[e] * scale, sum = softmax.sum[e], shrink = 1;
    if (a.call.sinks != nullptr) {  // one more logit, which carries no value
      const float sink = static_cast<const float*>(a.call.sinks)[rows.h[e]];
      const float both = fmaxf(top, sink), base = both == -kInfinity ? 0 : both;
      shrink = exp2_fast((top - base) * kLog2E);
      sum = sum * shrink + exp2_fast((sink - base) * kLog2E);
      top = both;
    }
    results.factor[e] = sum == 0 ? 0 : a.keep_scale * shrink / sum;
    results.lse[e] = sum == 0 ? -kInfinity : top + kLn2 * log2_fast(sum);
  }
  return results;
}

// Hands each lane of a quad a row of the 4 x 4 matrix of which it holds a column, so that it stores 16 bytes
// at a time instead of 4.
FASTATTN_DEVICE void transpose_quad(uint32_t (&words)[4]) {
  const int lane = thread_index() % 4;
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if ((n & step) != 0) continue;
      uint32_t& low = words[n];
      uint32_t& high = words[n + step];
      const uint32_t got = shuffle_xor(upper ? low : high, step);
      (upper ? low : high) = got;
    }
  }
}

// Stores the rows e of a warp's 16 whose sums are finite; the others are made again. Called by a whole warp.
template <class Traits>
FASTATTN_DEVICE void store(const ForwardArguments& a, const RowTile& tile, const ThreadRows& rows,
                           Softmax& softmax, float (&o)[Traits::kDim / 2], float unit, float scale) {
  using Element = typename Traits::Element;
  const int lane = thread_index() % 32;
  const RowResults results = results_of(a, rows, softmax, scale);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float tested = 0;  // NaN as soon as one of the sums is not finite
#pragma unroll
    for (int n = 0; n < Traits::kDim / 2; ++n)
      if (row_of(n) == e) tested = fmaf(o[n], 0.f, tested);
    // A bit for each lane: the four of a row see its four quarters.
    const uint32_t bad = ballot(!(tested == 0) && rows.exists[e]);
    const bool good = rows.exists[e] && (bad >> (lane & ~3) & 0xF) == 0;

    const int64_t row = tile.entry.q_begin + rows.i[e];
    uint16_t* out = static_cast<uint16_t*>(a.call.out.data) + a.call.out.offset(tile.b, rows.h[e], row);
    static_assert(Traits::kDim % 32 == 0, "a quad stores 32 columns of a row at a time");
#pragma unroll
    for (int d = 0; d < Traits::kDim; d += 32) {
      uint32_t words[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int at = d / 2 + 4 * n + 2 * e;
        words[n] = pack<Element>(o[at] * results.factor[e], o[at + 1] * results.factor[e]);
      }
      transpose_quad(words);
      const int column = d + 8 * (lane % 4);
      if (good && column < a.call.head_dim_v) store_16_bytes(out + column, words);
    }
    if (a.call.lse.data != nullptr && rows.exists[e] && lane % 4 == 0)
      static_cast<float*>(a.call.lse.data)[a.call.lse.offset(tile.b, rows.h[e], row)] = results.lse[e];

    for (int first = 0; first < 32; first += 4) {
      if ((bad >> first & 0xF) == 0) continue;
      const ExactRow again{shuffle(rows.i[e], first), shuffle(rows.h[e], first),
                           shuffle(softmax.max[e], first), unit, shuffle(results.factor[e], first)};
      exact_row<Traits>(a, tile, again);
    }
  }
}

}  // namespace fastattn::cuda

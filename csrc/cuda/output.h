// From accumulators to out and lse, or to what is known of them after a part of the keys.
#pragma once

#include "exact.h"
#include "results.h"

namespace fastattn::cuda {

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

// The sums of the rows e of a warp that are not finite: a bit for each lane, of which four hold a row.
template <int kCount>
FASTATTN_DEVICE uint32_t not_finite(const ThreadRows& rows, int e, const float (&o)[kCount]) {
  float tested = 0;  // NaN as soon as one of the sums is not finite
#pragma unroll
  for (int n = 0; n < kCount; ++n)
    if (row_of(n) == e) tested = fmaf(o[n], 0.f, tested);
  return ballot(!(tested == 0) && rows.exists[e]);
}

FASTATTN_DEVICE bool has_row(uint32_t bad) { return (bad >> (thread_index() % 32 & ~3) & 0xF) != 0; }

// What is left to do of a warp's rows e.
struct Unfinished {
  uint32_t bad[2];  // rows whose sums are not finite, as not_finite has them
  float factor[2];  // of their sums, once they are made again
};

// Stores the rows of a warp whose sums are finite.
template <class Traits>
FASTATTN_DEVICE Unfinished store(const ForwardArguments& a, const RowTile& tile, const ThreadRows& rows,
                                 const Softmax& softmax, const float (&o)[Traits::kDim / 2], float scale) {
  using Element = typename Traits::Element;
  const int lane = thread_index() % 32;
  Unfinished left;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const RowResult result = result_of(a, rows.h[e], softmax.max[e], softmax.sum[e], scale);
    left.bad[e] = not_finite(rows, e, o);
    left.factor[e] = result.factor;
    const bool good = rows.exists[e] && !has_row(left.bad[e]);
    const int64_t row = tile.entry.q_begin + rows.i[e];
    uint16_t* out = static_cast<uint16_t*>(a.call.out.data) + a.call.out.offset(tile.b, rows.h[e], row);
    static_assert(Traits::kDim % 32 == 0, "a quad stores 32 columns of a row at a time");
#pragma unroll
    for (int d = 0; d < Traits::kDim; d += 32) {
      uint32_t words[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int at = d / 2 + 4 * n + 2 * e;
        words[n] = pack<Element>(o[at] * result.factor, o[at + 1] * result.factor);
      }
      transpose_quad(words);
      const int column = d + 8 * (lane % 4);
      if (good && column < a.call.head_dim_v) store_16_bytes(out + column, words);
    }
    if (a.call.lse.data != nullptr && rows.exists[e] && lane % 4 == 0)
      static_cast<float*>(a.call.lse.data)[a.call.lse.offset(tile.b, rows.h[e], row)] = result.lse;
  }
  return left;
}

// Likewise, where the keys are divided: attention_combine makes out of what the parts leave.
template <class Traits>
FASTATTN_DEVICE Unfinished store_part(const ForwardArguments& a, const RowTile& tile, const ThreadRows& rows,
                                      const Softmax& softmax, const float (&o)[Traits::kDim / 2]) {
  const int lane = thread_index() % 32;
  Unfinished left;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    left.bad[e] = not_finite(rows, e, o);
    left.factor[e] = 1;
    const bool good = rows.exists[e] && !has_row(left.bad[e]);
    const int64_t row = partial_row(a, tile, rows.h[e], rows.i[e]);
    float* sums = a.partial.sums + row * a.call.head_dim_v;
#pragma unroll
    for (int n = 2 * e; n < Traits::kDim / 2; n += 4) {
      const int column = column_of(n) + 2 * (lane % 4);
      if (good && column < a.call.head_dim_v) store_8_bytes(sums + column, o[n], o[n + 1]);
    }
    if (rows.exists[e] && lane % 4 == 0) {
      a.partial.max[row] = softmax.max[e];
      a.partial.sum[row] = softmax.sum[e];
    }
  }
  return left;
}

// Stores a warp's rows, out and lse or what a part leaves. Called by a whole warp.
template <class Traits>
FASTATTN_DEVICE void finish(const ForwardArguments& a, const RowTile& tile, const ThreadRows& rows,
                            Softmax& softmax, const float (&o)[Traits::kDim / 2]) {
  const float unit = Traits::kGeneral ? kLog2E : a.scale_log2, scale = Traits::kGeneral ? 1.f : a.scale;
  softmax.finish();
  const Unfinished left = a.schedule.parts > 1 ? store_part<Traits>(a, tile, rows, softmax, o)
                                               : store<Traits>(a, tile, rows, softmax, o, scale);
#pragma unroll 1  // what follows is long, and rare
  for (int row = 0; row < 16; ++row) {
    const bool upper = row >= 8;
    const int first = row % 8 * 4;
    if (((upper ? left.bad[1] : left.bad[0]) >> first & 0xF) == 0) continue;
    const ExactRow again{shuffle(upper ? rows.i[1] : rows.i[0], first),
                         shuffle(upper ? rows.h[1] : rows.h[0], first),
                         shuffle(upper ? softmax.max[1] : softmax.max[0], first), unit,
                         shuffle(upper ? left.factor[1] : left.factor[0], first)};
    exact_row<Traits>(a, tile, again);
  }
}

}  // namespace fastattn::cuda

// What the parts of the keys of a row found, put together.
#pragma once

#include "results.h"

namespace fastattn::cuda {

constexpr int kCombineThreads = 128;

// Warps that share a row of out, 32 columns each.
FASTATTN_INLINE int32_t warps_of_row(const ForwardArguments& a) {
  return static_cast<int32_t>((a.call.head_dim_v + 31) / 32);
}

FASTATTN_INLINE int64_t combine_blocks(const ForwardArguments& a) {
  const int64_t warps = a.call.batch * a.call.num_heads * a.seqlen_q * warps_of_row(a);
  return (32 * warps + kCombineThreads - 1) / kCombineThreads;
}

// out = sum of exp(max_p - max) sums_p / sum of exp(max_p - max) sum_p over the parts p, in their order, and
// lse. A thread has one element of out.
template <class Element>
FASTATTN_DEVICE void attention_combine(const ForwardArguments& a) {
  const int64_t warp = (int64_t{block_index()} * kCombineThreads + thread_index()) / 32;
  const int64_t row = warp / warps_of_row(a);  // (b, h, i)
  const int32_t d = static_cast<int32_t>(warp % warps_of_row(a)) * 32 + thread_index() % 32;
  const int32_t i = static_cast<int32_t>(row % a.seqlen_q);
  const int32_t h = static_cast<int32_t>(row / a.seqlen_q % a.call.num_heads);
  const int64_t b = row / a.seqlen_q / a.call.num_heads;
  if (b >= a.call.batch || d >= a.call.head_dim_v) return;
  const Entry entry = entry_of(a, static_cast<int32_t>(b));
  if (i >= entry.len_q) return;

  const Partial& partial = a.partial;
  const int64_t number = row_number(a, entry, static_cast<int32_t>(b), h, i);
  float top = -kInfinity, sum = 0, value = 0;
#pragma unroll 8
  for (int32_t p = 0; p < a.schedule.parts; ++p) top = fmaxf(top, partial.max[p * partial.rows + number]);
  const float base = top == -kInfinity ? 0 : top;
#pragma unroll 8
  for (int32_t p = 0; p < a.schedule.parts; ++p) {
    const int64_t at = p * partial.rows + number;
    const float weight = exp2_fast((partial.max[at] - base) * partial.unit);
    sum = fmaf(weight, partial.sum[at], sum);
    value = fmaf(weight, partial.sums[at * a.call.head_dim_v + d], value);
  }
  const RowResult result = result_of(a, h, top, sum, partial.scale);
  const int64_t to = entry.q_begin + i;
  uint16_t* out = static_cast<uint16_t*>(a.call.out.data) + a.call.out.offset(b, h, to);
  out[d] = static_cast<uint16_t>(pack<Element>(value * result.factor, 0));
  if (a.call.lse.data != nullptr && d == 0)
    static_cast<float*>(a.call.lse.data)[a.call.lse.offset(b, h, to)] = result.lse;
}

}  // namespace fastattn::cuda

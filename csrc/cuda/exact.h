// A row whose sums are not finite, again, pair by pair: a hidden weight is 0, and 0 times a NaN that no row
// sees is NaN.
#pragma once

#include "scores.h"
#include "traits.h"

namespace fastattn::cuda {

struct ExactRow {
  int32_t i, h;
  float max, unit, factor;  // as Softmax has max and unit; factor: of the sum of exp(...) v
};

// Whether a row of a 64 x 64 tile's list sees key j: the tile is looked for in the row's list, or in the part
// of it that is this tile's.
FASTATTN_DEVICE bool in_blocks(const ForwardArguments& a, const RowTile& tile, int32_t h, int32_t i,
                               int32_t j) {
  const BlockMask& mask = a.call.block_mask;
  if (mask.row_ptr == nullptr) return true;
  const int32_t* list = mask.row_ptr + tile.b * mask.row_batch + h * mask.row_head + i / kMaskTile;
  const KeyRange entries = share_of(a, tile, list[0], list[1]);
  for (int32_t at = entries.begin; at < entries.end; ++at)
    if (mask.row_tiles[at] == j / kMaskTile)
      return (visible_bits(a, mask.row_bits[at], i) >> (j % kMaskTile) & 1) != 0;
  return false;
}

// The keys of a row that are in the tile's part.
template <class Traits>
FASTATTN_DEVICE KeyRange part_range(const ForwardArguments& a, const RowTile& tile, int32_t i) {
  KeyRange range = key_range(a, tile.entry, tile.b, i);
  if (a.schedule.parts == 1 || a.call.block_mask.row_ptr != nullptr) return range;
  const KeyRange tiles = tiles_of<Traits>(a, tile, span_of(a, tile));
  range.begin = larger(range.begin, tiles.begin * Traits::kKeys);
  range.end = smaller(range.end, tiles.end * Traits::kKeys);
  return range;
}

template <class Traits>
FASTATTN_DEVICE float exact_score(const ForwardArguments& a, const RowTile& tile, const ExactRow& row,
                                  int32_t j, const typename Traits::Element* q,
                                  const typename Traits::Element* k) {
  const int lane = thread_index() % 32;
  float product = 0;
  for (int d = lane; d < a.call.head_dim; d += 32) product = fmaf(to_float(q[d]), to_float(k[d]), product);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) product += shuffle_xor(product, mask);
  if constexpr (!Traits::kGeneral) return product;
  float s = scaled(a, product);
  if (a.call.bias.data != nullptr) s = biased(a, s, tile.b, row.h, row.i, j);
  if (a.call.diag.data != nullptr) s += diagonal(a, tile.entry, tile.b, row.h, row.i, j);
  return s;
}

// Called by a whole warp: writes one row of out, or of the sums of a part.
template <class Traits>
FASTATTN_DEVICE void exact_row(const ForwardArguments& a, const RowTile& tile, const ExactRow& row) {
  using Element = typename Traits::Element;
  constexpr int kColumns = Traits::kDim / 32;  // of a lane
  const int lane = thread_index() % 32;
  const AttentionParams& call = a.call;
  const Element* q =
      static_cast<const Element*>(call.q.data) + call.q.offset(tile.b, row.h, tile.entry.q_begin + row.i);
  const Element* k =
      static_cast<const Element*>(call.k.data) + call.k.offset(tile.b, tile.h_kv, tile.entry.k_begin);
  const Element* v =
      static_cast<const Element*>(call.v.data) + call.v.offset(tile.b, tile.h_kv, tile.entry.k_begin);
  const float base = row.max == -kInfinity ? 0 : row.max;
  float sum[kColumns] = {};
  const KeyRange range = part_range<Traits>(a, tile, row.i);
  for (int32_t j = range.begin; j < range.end; ++j) {
    if constexpr (Traits::kGeneral) {
      if (call.mask.data != nullptr && !is_visible(a, tile.b, row.h, row.i, j)) continue;
      if (!in_blocks(a, tile, row.h, row.i, j)) continue;
    }
    const float s = exact_score<Traits>(a, tile, row, j, q, k + j * call.k.row);
    if (Traits::kGeneral && call.bias.data != nullptr && s == -kInfinity) continue;  // hidden by the bias
    float p = exp2_fast((s - base) * row.unit);
    if constexpr (Traits::kGeneral) {
      if (a.drop_below != 0) {
        const uint32_t bh = static_cast<uint32_t>(tile.b * call.num_heads + row.h);
        const uint32_t word = dropout_word(static_cast<uint64_t>(*call.dropout_seed), bh, row.i, j);
        p *= word >= a.drop_below ? 1.f : 0.f;
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int d = lane + 32 * c;
      if (d < call.head_dim_v) sum[c] = fmaf(p, to_float(v[j * call.v.row + d]), sum[c]);
    }
  }
  uint16_t* out =
      static_cast<uint16_t*>(call.out.data) + call.out.offset(tile.b, row.h, tile.entry.q_begin + row.i);
  float* sums = a.schedule.parts > 1 ? partial_sums(a, tile, row.h, row.i) : nullptr;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int d = lane + 32 * c;
    if (d >= call.head_dim_v) continue;
    if (sums != nullptr) {
      sums[d] = sum[c];
    } else {
      out[d] = static_cast<uint16_t>(pack<Element>(sum[c] * row.factor, 0));
    }
  }
}

}  // namespace fastattn::cuda

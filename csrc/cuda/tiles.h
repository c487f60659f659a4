// What a block works on: a tile of rows, and the tiles of keys that it sees. Producer and consumers derive
// the same sequence of tiles, each for itself, so nothing but data passes between them.
#pragma once

#include "arguments.h"
#include "configs.h"
#include "machine.h"

namespace fastattn::cuda {

struct RowTile {
  int32_t b, h, h_kv;  // h: of the first of the packed heads
  int32_t i0, last;    // query positions, both included
  int32_t part;        // of its keys
  Entry entry;

  FASTATTN_DEVICE RowTile(const ForwardArguments& a, const WorkItem& item)
      : b(item.batch), i0(item.row_tile * a.positions), part(item.part), entry(entry_of(a, item.batch)) {
    const int32_t heads_per_kv = static_cast<int32_t>(a.call.num_heads / a.call.num_heads_kv);
    h = a.group > 1 ? item.head * a.group : item.head;
    h_kv = h / heads_per_kv;
    last = (i0 + a.positions < entry.len_q ? i0 + a.positions : entry.len_q) - 1;
  }

  FASTATTN_DEVICE bool exists() const { return last >= i0; }
};

// Where a part of the keys leaves what it found of a row: its place in Partial's max and sum, and its sums.
FASTATTN_DEVICE int64_t partial_row(const ForwardArguments& a, const RowTile& tile, int32_t h, int32_t i) {
  return tile.part * a.partial.rows + row_number(a, tile.entry, tile.b, h, i);
}
FASTATTN_DEVICE float* partial_sums(const ForwardArguments& a, const RowTile& tile, int32_t h, int32_t i) {
  return a.partial.sums + partial_row(a, tile, h, i) * a.call.head_dim_v;
}

// The keys [first, stop) that rows of a tile see, and those that each of them sees.
struct Span {
  int32_t first, stop, whole_first, whole_stop;
};

FASTATTN_DEVICE int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
FASTATTN_DEVICE int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// Called by whole warps.
FASTATTN_DEVICE Span span_of(const ForwardArguments& a, const RowTile& tile) {
  const KeyRange low = key_range(a, tile.entry, tile.b, tile.i0);
  const KeyRange high = key_range(a, tile.entry, tile.b, tile.last);
  Span span{low.begin, high.end, high.begin, low.end};  // begin and end grow from row to row
  if (!a.ranges_by_row) return span;
  span = {kFar, 0, 0, kFar};
  for (int32_t i = tile.i0 + thread_index() % 32; i <= tile.last; i += 32) {
    const KeyRange range = key_range(a, tile.entry, tile.b, i);
    span.first = smaller(span.first, range.begin);
    span.stop = larger(span.stop, range.end);
    span.whole_first = larger(span.whole_first, range.begin);
    span.whole_stop = smaller(span.whole_stop, range.end);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    span.first = smaller(span.first, shuffle_xor(span.first, mask));
    span.stop = larger(span.stop, shuffle_xor(span.stop, mask));
    span.whole_first = larger(span.whole_first, shuffle_xor(span.whole_first, mask));
    span.whole_stop = smaller(span.whole_stop, shuffle_xor(span.whole_stop, mask));
  }
  return span;
}

// What falls to a tile's part of [begin, end): nothing, where there are more parts than that.
FASTATTN_DEVICE KeyRange share_of(const ForwardArguments& a, const RowTile& tile, int32_t begin,
                                  int32_t end) {
  const int32_t parts = a.schedule.parts, count = end > begin ? end - begin : 0;
  const int32_t each = count / parts, longer = count % parts;
  const int32_t first = begin + tile.part * each + smaller(tile.part, longer);
  return {first, first + each + (tile.part < longer ? 1 : 0)};
}

// The tiles of keys that a part of the span has.
template <class Traits>
FASTATTN_DEVICE KeyRange tiles_of(const ForwardArguments& a, const RowTile& tile, const Span& span) {
  if (span.stop <= span.first) return {0, 0};
  return share_of(a, tile, span.first / Traits::kKeys, (span.stop + Traits::kKeys - 1) / Traits::kKeys);
}

constexpr int32_t kAllBits = -1;  // a full tile of a block mask, and any tile without one
constexpr int32_t kHidden = -2;   // a tile that is not in the list of a warpgroup's rows

struct KeyTile {
  int32_t j0;    // first key
  bool whole;    // within the range of keys of every row
  int32_t bits;  // of a block mask: the row of its table, or one of the above
};

// Tiles of keys from the last to the first, so that those at the edge of a causal mask come while nothing
// else is ready yet.
template <class Traits>
class KeyTiles {
  static constexpr int kKeys = Traits::kKeys;

 public:
  // consumer: the warpgroup that asks, whose bits are wanted; any for the producer.
  FASTATTN_DEVICE KeyTiles(const ForwardArguments& a, const RowTile& tile, int consumer)
      : span_(span_of(a, tile)), consumer_(consumer) {
    const KeyRange tiles = tiles_of<Traits>(a, tile, span_);
    first_ = tiles.begin;
    next_ = tiles.end;
    if constexpr (Traits::kGeneral) {
      const BlockMask& mask = a.call.block_mask;
      lists_ = mask.row_ptr != nullptr ? &mask : nullptr;
      if (lists_ == nullptr) return;
      const int32_t row_tiles = (a.seqlen_q + kMaskTile - 1) / kMaskTile;
      const int32_t* list = mask.row_ptr + tile.b * mask.row_batch + tile.h * mask.row_head;
#pragma unroll
      for (int w = 0; w < Traits::kConsumers; ++w) {
        const int32_t row_tile = tile.i0 / static_cast<int32_t>(kMaskTile) + w;
        if (row_tile >= row_tiles) continue;
        const KeyRange entries = share_of(a, tile, list[row_tile], list[row_tile + 1]);
        begin_[w] = entries.begin;
        end_[w] = entries.end;
      }
    }
  }

  FASTATTN_DEVICE bool more() const {
    if constexpr (Traits::kGeneral) {
      if (lists_ != nullptr) {
        bool any = false;
#pragma unroll
        for (int w = 0; w < Traits::kConsumers; ++w) any = any || end_[w] > begin_[w];
        return any;
      }
    }
    return next_ > first_;
  }

  FASTATTN_DEVICE KeyTile next() {
    if constexpr (Traits::kGeneral) {
      if (lists_ != nullptr) return next_listed();
    }
    --next_;
    return tile_at(next_ * kKeys, kAllBits);
  }

 private:
  FASTATTN_DEVICE KeyTile tile_at(int32_t j0, int32_t bits) const {
    return {j0, j0 >= span_.whole_first && j0 + kKeys <= span_.whole_stop, bits};
  }

  // The last tile of any warpgroup's list.
  FASTATTN_DEVICE KeyTile next_listed() {
    int32_t tile = -1, bits = kHidden;
#pragma unroll
    for (int w = 0; w < Traits::kConsumers; ++w)
      if (end_[w] > begin_[w]) tile = larger(tile, lists_->row_tiles[end_[w] - 1]);
#pragma unroll
    for (int w = 0; w < Traits::kConsumers; ++w) {
      if (end_[w] > begin_[w] && lists_->row_tiles[end_[w] - 1] == tile) {
        --end_[w];
        if (w == consumer_) bits = lists_->row_bits[end_[w]];
      }
    }
    return tile_at(tile * static_cast<int32_t>(kMaskTile), bits);
  }

  Span span_;
  int consumer_;
  int32_t first_, next_;
  const BlockMask* lists_ = nullptr;
  int32_t begin_[Traits::kConsumers] = {}, end_[Traits::kConsumers] = {};
};

}  // namespace fastattn::cuda

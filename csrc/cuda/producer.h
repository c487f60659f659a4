// One warp that keeps the copy engine busy.
#pragma once

#include "tiles.h"
#include "traits.h"

namespace fastattn::cuda {

template <class Traits>
class Producer {
 public:
  FASTATTN_DEVICE Producer(const ForwardArguments& a, const SharedMap<Traits>& shared)
      : a_(a), shared_(shared), leads_(thread_index() % 32 == 0) {}

  FASTATTN_DEVICE void run() {
    if (leads_) {
      prefetch(a_.q_map);
      prefetch(a_.k_map);
      prefetch(a_.v_map);
    }
    for (Deal deal(a_.schedule.size, block_index(), block_count()); deal.more(); deal.next()) {
      const RowTile tile(a_, a_.schedule.item(deal.index()));
      if (!tile.exists()) continue;
      KeyTiles<Traits> keys(a_, tile, 0);
      if (!keys.more()) continue;
      load_q(tile);
      // In the order in which the consumers want them: k runs ahead of v by one tile.
      int32_t last = -1;
      do {
        const int32_t next = keys.more() ? keys.next().j0 : -1;
        if (next >= 0) load_k(tile, next, last < 0 ? use_ : use_.after());
        if (last >= 0) {
          load_v(tile, last);
          use_ = use_.after();
        }
        last = next;
      } while (last >= 0);
    }
  }

 private:
  FASTATTN_DEVICE void load_q(const RowTile& tile) {
    if (leads_) {
      barrier_wait(shared_.q_empty(), q_parity_ ^ 1);
      barrier_expect(shared_.q_full(), Traits::kDim * 2 * a_.group * a_.positions);
      const int32_t head = tile.h / a_.group * a_.q_head;
#pragma unroll
      for (int c = 0; c < Traits::kChunks; ++c) {
        const Coordinates from{c * Traits::kChunk, 0, tile.entry.q_begin + tile.i0, head,
                               tile.b * a_.q_batch};
        copy_5d(shared_.q() + c * Traits::kRows * Traits::kRowBytes, a_.q_map, from, shared_.q_full());
      }
    }
    q_parity_ ^= 1;
    sync_warp();
  }

  FASTATTN_DEVICE void load_k(const RowTile& tile, int32_t j0, Use<Traits> use) {
    const int stage = use.stage();
    load(shared_.k(stage), shared_.k_full(stage), shared_.k_empty(stage), use, a_.k_map,
         {0, tile.entry.k_begin + j0, tile.h_kv * a_.k_head, tile.b * a_.k_batch, 0});
  }

  FASTATTN_DEVICE void load_v(const RowTile& tile, int32_t j0) {
    const int stage = use_.stage();
    load(shared_.v(stage), shared_.v_full(stage), shared_.v_empty(stage), use_, a_.v_map,
         {0, tile.entry.k_begin + j0, tile.h_kv * a_.v_head, tile.b * a_.v_batch, 0});
  }

  FASTATTN_DEVICE void load(uint32_t to, uint32_t full, uint32_t empty, Use<Traits> use, const TensorMap& map,
                            Coordinates from) {
    if (leads_) {
      barrier_wait(empty, use.parity() ^ 1);
      barrier_expect(full, Traits::kKvBytes);
#pragma unroll
      for (int c = 0; c < Traits::kChunks; ++c) {
        from.at[0] = c * Traits::kChunk;
        copy_4d(to + c * Traits::kKeys * Traits::kRowBytes, map, from, full);
      }
    }
    sync_warp();
  }

  const ForwardArguments& a_;
  const SharedMap<Traits>& shared_;
  const bool leads_;
  uint32_t q_parity_ = 0;
  Use<Traits> use_;
};

}  // namespace fastattn::cuda

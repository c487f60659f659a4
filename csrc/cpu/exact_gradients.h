// The definition of the gradients, for rows whose fast result is not finite: P and dS of each pair come from
// the fast path's tiles, where every pair has a lane of its own, but only visible pairs enter the sums.
#pragma once

#include "exact.h"
#include "score_gradient.h"

namespace fastattn::FASTATTN_ISA {

// Writes row i of head h's dQ / scale to dq [head_dim] and adds its part of dscore_weights to dw, where not
// nullptr.
template <class T>
void exact_dq(const AttentionBackwardParams& p, const RowGradients<T>& rows, int64_t b, int64_t h, int64_t i,
              T* dq, ExactSum* dw = nullptr) {
  static thread_local GradScratch<T> scratch;
  Vector<T> by_q(p.head_dim), by_k(p.head_dim), by_w(p.head_dim);
  GradTile<T> tile(p, rows, b, h, scratch);
  const KeyRange keys = tile.rules().row_keys(i);
  ExactSum sum(p.head_dim);
  for (int64_t j0 = keys.begin / kKeyTile * kKeyTile; j0 < keys.end; j0 += kKeyTile) {
    if (dw == nullptr && sum.lost()) break;
    tile.rules().for_each_run(i, i + 1, j0, j0 + kKeyTile, [&](const Run& run) {
      tile.load_keys(j0, std::min(tile.sequence().len_k, j0 + kKeyTile));
      tile.load_queries(i, i + 1);
      tile.compute(run.tile_bits, i, 1, tile.columns(i, 1), false);
      const Block<T> block = tile.key_block();
      bool visible[kKeyTile];
      tile.rules().mark_visible(run, i, run.begin, run.end - run.begin, visible);
      for (int64_t j = run.begin; j < run.end; ++j) {
        if (!visible[j - run.begin] || tile.hides(j - j0)) continue;
        const T* key = block.data + (j - j0) * block.stride;
        if (p.score == Score::kDot) {
          sum.add(tile.gradients()[j - j0], key);
          continue;
        }
        pair_slopes(p, tile.query_block().data, key, by_q.data(), by_k.data(), by_w.data());
        sum.add(tile.gradients()[j - j0], by_q.data());
        if (dw != nullptr) dw->add(tile.gradients()[j - j0], by_w.data());
      }
    });
  }
  if (dq != nullptr) sum.store(dq);
}

// Writes row j of a key-value head's dK / scale and dV to dk [head_dim] and dv [head_dim_v].
template <class T>
void exact_dkv(const AttentionBackwardParams& p, const RowGradients<T>& rows, int64_t b, int64_t head_kv,
               int64_t j, T* dk, T* dv) {
  static thread_local GradScratch<T> scratch;
  const int64_t group = p.num_heads / p.num_heads_kv;
  ExactSum sum_k(p.head_dim), sum_v(p.head_dim_v);
  Vector<T> by_q(p.head_dim), by_k(p.head_dim), by_w(p.head_dim);
  for (int64_t h = head_kv * group; h < (head_kv + 1) * group; ++h) {
    GradTile<T> tile(p, rows, b, h, scratch);
    tile.load_keys(j, j + 1);
    const Block<T> key = tile.key_block();
    tile.rules().for_each_query_tile(j, j + 1, [&](int64_t query_tile, const int32_t* tile_bits) {
      const int64_t i0 = query_tile * kMaskTile, i1 = std::min(tile.sequence().len_q, i0 + kMaskTile);
      const KeyRange column = tile.columns(i0, i1 - i0);
      if (column.empty() || (sum_k.lost() && sum_v.lost())) return;
      tile.load_queries(i0, i1);
      tile.compute(tile_bits, i0, i1 - i0, column, false);
      const Block<T>&queries = tile.query_block(), &douts = tile.dout_block();
      for (int64_t i = i0; i < i1; ++i) {
        bool visible;
        tile.rules().mark_visible({j, j + 1, tile_bits}, i, j, 1, &visible);
        if (!visible || tile.hides((i - i0) * kKeyTile)) continue;
        const T* query = queries.data + (i - i0) * queries.stride;
        if (p.score != Score::kDot) {
          pair_slopes(p, query, key.data, by_q.data(), by_k.data(), by_w.data());
          query = by_k.data();
        }
        sum_k.add(tile.gradients()[(i - i0) * kKeyTile], query);
        sum_v.add(tile.probabilities()[(i - i0) * kKeyTile], douts.data + (i - i0) * douts.stride);
      }
    });
  }
  sum_k.store(dk);
  sum_v.store(dv);
}

}  // namespace fastattn::FASTATTN_ISA

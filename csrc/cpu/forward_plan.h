// How the forward pass falls into tasks: up to kTaskRows query rows that share a key-value head, with all
// keys or, where there are few rows, with a part of them.
#pragma once

#include <algorithm>

#include "../params.h"
#include "buffer.h"
#include "gemm.h"

namespace fastattn::FASTATTN_ISA {

constexpr int64_t kTaskRows = 256;     // that share a packed segment: packing costs about 2% of the products
constexpr int64_t kGroup = 2 * kRows;  // query rows per score tile: 12 KB of float32
constexpr int64_t kSplitKeys = 1024;   // keys per task where there are few query rows (decoding)
constexpr int64_t kSplitRows = 64;     // up to which number of rows keys are split
constexpr int64_t kKeptWeights = 1 << 18;  // weights that a task keeps until its rows are done: 1 MB

// What waking another thread must save, in multiply-adds: about 5 us of one thread at half its peak. To read
// a head's keys and values takes as long as to multiply kReadRows rows by them.
constexpr double kThreadWork = 1 << 18;
constexpr int64_t kReadRows = 8;

// Rows [row_begin, row_end) of one query head, within one 64-row tile of the masks; state holds them from
// `first`.
struct Tile {
  int64_t head, row_begin, row_end, first;
};

struct Task {
  int64_t batch, head_kv;
  int64_t tile_begin, tile_end;  // in Plan::tiles
  int64_t rows;
  int64_t key_begin, key_end;
  int64_t partial;  // index of the first row's partial result, -1 where the keys are not split
};

// A tile's rows whose keys were split. Of row_begin the parts lie `stride` apart from `partial` on, in
// ascending order of keys; those of the rows after it each one further.
struct SplitRows {
  int64_t batch, head;
  int64_t row_begin, row_end;
  int64_t partial, stride, splits;
};

// Depends on the threads only in how rows are grouped into tasks, which no result depends on.
struct Plan {
  Vector<Tile> tiles;
  Vector<Task> tasks;
  Vector<SplitRows> split_rows;
  int64_t partial_rows = 0;
  int num_threads = 1;

  explicit Plan(const AttentionParams& p) {
    const int64_t group = p.num_heads / p.num_heads_kv;
    int64_t all_rows = 0;
    double work = 0;
    for (int64_t b = 0; b < p.batch; ++b) {  // p.seqlen_k may be a page's, or the longest of many
      const Sequence s = sequence_of(p, b);
      const int64_t rows = p.num_heads * s.len_q, keys = s.len_k * (p.head_dim + p.head_dim_v);
      all_rows += rows;
      work += static_cast<double>(rows + kReadRows * p.num_heads_kv) * static_cast<double>(keys);
    }
    num_threads = static_cast<int>(std::clamp(work / kThreadWork, 1.0, std::max(1.0, 1.0 * p.num_threads)));
    one_head_ = p.weights.data != nullptr;
    // Where weights are averaged over heads, one thread takes the same rows of all of them.
    const int64_t rows_to_share = one_head_ && p.average_weights ? p.batch * p.seqlen_q : all_rows;
    const int64_t fair_rows = num_threads > 1 ? rows_to_share / (4 * num_threads) : kTaskRows;
    const int64_t kept_rows = one_head_ ? kKeptWeights / std::max<int64_t>(1, p.seqlen_k) : kTaskRows;
    tile_rows_ = std::clamp((rows_to_share / num_threads + kGroup - 1) / kGroup * kGroup, kGroup, kMaskTile);
    const int64_t task_rows =
        std::clamp(std::min(fair_rows, kept_rows) / kMaskTile * kMaskTile, tile_rows_, kTaskRows);
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t h = 0; h < p.num_heads_kv; ++h) add(sequence_of(p, b), b, h, group, task_rows);
  }

 private:
  void add(const Sequence& s, int64_t b, int64_t head_kv, int64_t group, int64_t task_rows) {
    // Last rows first: under a causal mask they have the most keys, and the shortest tasks should end the
    // run.
    const int64_t num_tiles = (s.len_q + kMaskTile - 1) / kMaskTile;
    int64_t begin = static_cast<int64_t>(tiles.size()), rows = 0;
    const auto flush = [&] {
      if (rows > 0) add_task(s, b, head_kv, begin, rows);
      begin = static_cast<int64_t>(tiles.size());
      rows = 0;
    };
    const auto add_tile = [&](int64_t t, int64_t head) {
      const int64_t tile_end = std::min(s.len_q, (t + 1) * kMaskTile);
      for (int64_t first = t * kMaskTile; first < tile_end; first += tile_rows_) {
        const int64_t last = std::min(tile_end, first + tile_rows_);
        if (rows + last - first > task_rows) flush();
        tiles.push_back({head, first, last, rows});
        rows += last - first;
      }
    };
    // Heads of a group meet the same keys one after the other, or each has tasks of its own.
    for (int64_t n = 0; n < num_tiles * group; ++n) {
      const int64_t t = one_head_ ? n % num_tiles : n / group, g = one_head_ ? n / num_tiles : n % group;
      if (one_head_ && t == 0) flush();
      add_tile(num_tiles - 1 - t, head_kv * group + g);
    }
    flush();
  }

  void add_task(const Sequence& s, int64_t b, int64_t head_kv, int64_t begin, int64_t rows) {
    const int64_t end = static_cast<int64_t>(tiles.size());
    const int64_t splits =
        s.len_q > kSplitRows || one_head_ ? 1 : std::max<int64_t>(1, (s.len_k + kSplitKeys - 1) / kSplitKeys);
    if (splits == 1) {
      tasks.push_back({b, head_kv, begin, end, rows, 0, s.len_k, -1});
      return;
    }
    for (int64_t n = 0; n < splits; ++n)
      tasks.push_back({b, head_kv, begin, end, rows, n * kSplitKeys, std::min(s.len_k, (n + 1) * kSplitKeys),
                       partial_rows + n * rows});
    for (int64_t t = begin; t < end; ++t)
      split_rows.push_back({b, tiles[t].head, tiles[t].row_begin, tiles[t].row_end,
                            partial_rows + tiles[t].first, rows, splits});
    partial_rows += splits * rows;
  }

  // Fewer than a mask's 64 where there would be fewer tiles than threads; whole groups, so that no row
  // changes its group.
  int64_t tile_rows_ = kMaskTile;
  bool one_head_ = false;  // whether a task has rows of one head and all their keys, as WeightRows needs
};

}  // namespace fastattn::FASTATTN_ISA

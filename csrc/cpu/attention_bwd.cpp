// The backward pass: dQ, dK, dV (and dsinks) from dO and dlse, recomputing P from lse.
//
//   S = Q K^T   dP = dO V^T   dS = P * (dP - delta)   dV += P^T dO   dK += dS^T Q   dQ += dS K
//
// For the scores of pair_scores.h the last two are sums over pairs (pair_gradients), as is dscore_weights.
//
// Keys go in tiles of 64, whose dK and dV stay in L1 and L2 while the query tiles that see them pass by.
// Tiles form up to 8 chunks by the number of keys alone; each chunk has its own partial dQ, and the partials
// are added in ascending order, so that the bits do not depend on how many threads took part.
#include <algorithm>
#include <cmath>

#include "../parallel.h"
#include "buffer.h"
#include "exact_gradients.h"
#include "isa.h"
#include "score_gradient.h"
#include "softmax.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kMaxChunks = 8;
constexpr int64_t kMinChunkKeys = 256;
constexpr int64_t kLocalBytes = 1 << 20;         // of dQ that a task keeps to itself: it stays in L2
constexpr int64_t kPartialBytes = 4 << 20;       // of partial dQ at a time, for each thread: they stay in L3
constexpr int64_t kMostPartialBytes = 64 << 20;  // for all threads, or one head's

// Query heads [head_begin, head_end) of one key-value head of one batch entry.
struct Unit {
  int64_t batch, head_kv, head_begin, head_end;
  Sequence seq;
  int64_t chunk_keys, num_chunks;
  bool first, last;  // whether the group's heads begin, and end, with these
  bool local;        // whether the only chunk finishes dQ itself
  int64_t parts;     // of its first chunk, within the wave

  int64_t heads() const { return head_end - head_begin; }
  bool whole() const { return first && last; }
};

// What a chunk of keys adds to one query head's dQ: rows of that head, and where they begin in the partial
// dQ.
struct Part {
  KeyRange rows;
  int64_t first;
};

// A chunk of a unit's keys, with a Part for each of its heads.
struct Chunk {
  const Unit* unit;
  int64_t key_begin, key_end, parts;
};

template <class T>
struct BackwardScratch {
  GradScratch<T> tile;
  Buffer<T> dk, dv, dq, sum;
  Buffer<T> pair_dk;
};

template <class T>
class Backward {
 public:
  Backward(const AttentionBackwardParams& p, const RowGradients<T>& rows)
      : p_(p),
        rows_(rows),
        group_(p.num_heads / p.num_heads_kv),
        width_q_(round_to_lanes<T>(p.head_dim)),
        width_v_(round_to_lanes<T>(p.head_dim_v)),
        dw_(p.head_dim) {}

  // Units go in waves: as many as keep all threads busy, and then as many as stay in L3; at least one.
  void run() {
    const int64_t least_tasks = 3 * p_.num_threads, limit = p_.num_threads * kPartialBytes;
    int64_t bytes = 0, tasks = 0;
    const auto finish_wave = [&] {
      run_wave();
      bytes = tasks = 0;
    };
    for (int64_t b = 0; b < p_.batch; ++b)
      for (int64_t h = 0; h < p_.num_heads_kv; ++h) {
        Unit u = make_unit(b, h);
        const int64_t head_bytes = most_head_bytes(u);
        u.local = u.num_chunks == 1 && group_ * head_bytes <= kLocalBytes;
        const int64_t heads =
            u.local ? group_
                    : std::clamp<int64_t>(kMostPartialBytes / std::max<int64_t>(1, head_bytes), 1, group_);
        for (int64_t g = 0; g < group_; g += heads) {
          u.head_begin = h * group_ + g;
          u.head_end = std::min((h + 1) * group_, u.head_begin + heads);
          u.first = g == 0;
          u.last = g + heads >= group_;
          const int64_t more = u.local ? 0 : u.heads() * head_bytes;
          if (!u.whole() || bytes + more > (tasks < least_tasks ? kMostPartialBytes : limit)) finish_wave();
          units_.push_back(u);
          bytes += more;
          tasks += u.num_chunks;
          // Parts of a group add to the same dK and dV, one after the other: each has a wave of its own.
          if (!u.whole()) finish_wave();
        }
      }
    finish_wave();
    if (p_.dscore_weights != nullptr) finish_score_weights();
  }

 private:
  Unit make_unit(int64_t b, int64_t head_kv) const {
    Unit u{};
    u.batch = b;
    u.head_kv = head_kv;
    u.seq = sequence_of(p_, b);
    const int64_t chunks = std::clamp<int64_t>(u.seq.len_k / kMinChunkKeys, 1, kMaxChunks);
    const int64_t tiles = (u.seq.len_k + kKeyTile - 1) / kKeyTile;
    u.chunk_keys = std::max<int64_t>(1, (tiles + chunks - 1) / chunks) * kKeyTile;
    u.num_chunks = (u.seq.len_k + u.chunk_keys - 1) / u.chunk_keys;
    return u;
  }

  // The rows of head h's dQ that see keys of chunk n: whole tiles, as run_query_tile adds to every row of a
  // tile that any of its rows reaches.
  KeyRange rows_of(const Unit& u, int64_t h, int64_t n) const {
    const int64_t begin = n * u.chunk_keys, end = std::min(u.seq.len_k, begin + u.chunk_keys);
    const KeyRange rows = ScoreRules<T>(p_, u.batch, h, u.seq).visiting_rows(begin, end);
    if (rows.empty()) return {0, 0};
    return {rows.begin / kMaskTile * kMaskTile,
            std::min(u.seq.len_q, (rows.end + kMaskTile - 1) / kMaskTile * kMaskTile)};
  }

  // Of partial dQ, for the head of the unit's group that needs most.
  int64_t most_head_bytes(const Unit& u) const {
    int64_t most = 0;
    for (int64_t h = u.head_kv * group_; h < (u.head_kv + 1) * group_; ++h) {
      int64_t rows = 0;
      for (int64_t n = 0; n < u.num_chunks; ++n) {
        const KeyRange range = rows_of(u, h, n);
        rows += range.end - range.begin;
      }
      most = std::max(most, rows);
    }
    return most * width_q_ * static_cast<int64_t>(sizeof(T));
  }

  void run_wave() {
    plan();
    parallel_tasks(p_.num_threads, static_cast<int64_t>(chunks_.size()),
                   [&](int, int64_t n) { run_chunk(chunks_[n]); });
    finish_queries();
    if (p_.dscore_weights != nullptr) add_score_weights();
    units_.clear();
  }

  void plan() {
    chunks_.clear();
    parts_.clear();
    int64_t rows = 0, keys = 0;
    for (Unit& u : units_) {
      u.parts = static_cast<int64_t>(parts_.size());
      if (!u.whole()) keys = u.seq.len_k;
      for (int64_t n = 0; n < u.num_chunks; ++n) {
        const int64_t begin = n * u.chunk_keys, end = std::min(u.seq.len_k, begin + u.chunk_keys);
        chunks_.push_back({&u, begin, end, static_cast<int64_t>(parts_.size())});
        int64_t local_rows = 0;
        for (int64_t h = u.head_begin; h < u.head_end; ++h) {
          const KeyRange range = rows_of(u, h, n);
          int64_t& first = u.local ? local_rows : rows;
          parts_.push_back({range, first});
          first += range.end - range.begin;
        }
      }
    }
    partial_dq_.ensure(rows * width_q_);
    if (p_.score != Score::kDot) partial_dw_.ensure(static_cast<int64_t>(parts_.size()) * width_q_);
    dk_.ensure(keys * width_q_);
    dv_.ensure(keys * width_v_);
  }

  void run_chunk(const Chunk& c) {
    static thread_local BackwardScratch<T> scratch;
    const Unit& u = *c.unit;
    const Part* parts = parts_.data() + c.parts;
    int64_t rows = 0;
    for (int64_t n = 0; n < u.heads(); ++n) rows += parts[n].rows.end - parts[n].rows.begin;
    T* dq = u.local ? scratch.dq.ensure(rows * width_q_) : partial_dq_.data() + parts[0].first * width_q_;
    std::fill(dq, dq + rows * width_q_, T{0});
    if (p_.score != Score::kDot)
      std::fill_n(partial_dw_.data() + c.parts * width_q_, u.heads() * width_q_, 0.0);
    Vector<GradTile<T>> heads;
    heads.reserve(u.heads());
    for (int64_t h = u.head_begin; h < u.head_end; ++h)
      heads.emplace_back(p_, rows_, u.batch, h, scratch.tile, h - u.head_begin, u.heads());
    for (int64_t j0 = c.key_begin; j0 < c.key_end; j0 += kKeyTile)
      run_key_tile(heads, c, j0, std::min(c.key_end, j0 + kKeyTile), dq, scratch);
    if (!u.local) return;
    T* sum = scratch.sum.ensure(width_q_);
    for (int64_t n = 0; n < u.heads(); ++n)
      for (int64_t i = 0; i < u.seq.len_q; ++i) finish_query(u, parts + n, u.head_begin + n, i, dq, sum);
  }

  // The whole of what a tile of keys takes part in.
  void run_key_tile(Vector<GradTile<T>>& heads, const Chunk& c, int64_t j0, int64_t j1, T* dq,
                    BackwardScratch<T>& scratch) {
    const Unit& u = *c.unit;
    T* dk = u.whole() ? scratch.dk.ensure(kKeyTile * width_q_) : dk_.data() + j0 * width_q_;
    T* dv = u.whole() ? scratch.dv.ensure(kKeyTile * width_v_) : dv_.data() + j0 * width_v_;
    if (u.first) {
      std::fill(dk, dk + (j1 - j0) * width_q_, T{0});
      std::fill(dv, dv + (j1 - j0) * width_v_, T{0});
    }
    const Part* parts = parts_.data() + c.parts;
    bool packed = false;
    for (int64_t n = 0; n < u.heads(); ++n) {
      GradTile<T>& tile = heads[n];
      tile.set_keys(j0, j1);
      T* head_dq = dq + (parts[n].first - parts[0].first) * width_q_;
      tile.rules().for_each_query_tile(j0, j1, [&](int64_t query_tile, const int32_t* tile_bits) {
        const int64_t i0 = query_tile * kMaskTile, i1 = std::min(u.seq.len_q, i0 + kMaskTile);
        const KeyRange hull = tile.rules().rows_keys(i0, i1);
        if (std::max(hull.begin, j0) >= std::min(hull.end, j1)) return;
        if (!packed) tile.pack_keys();
        packed = true;
        T* tile_dq = head_dq + (i0 - parts[n].rows.begin) * width_q_;
        if (p_.score == Score::kDot)
          run_query_tile(tile, tile_bits, i0, i1, tile_dq);
        else
          run_pair_tile(tile, tile_bits, i0, i1, tile_dq, dk, partial_dw_.data() + (c.parts + n) * width_q_,
                        scratch);
        add_key_gradients(tile, i0, i1, j0, j1, dk, dv);
      });
    }
    if (u.last) finish_keys(u, j0, j1, dk, dv);
  }

  // P and dS of one tile, and dQ += dS K.
  void run_query_tile(GradTile<T>& tile, const int32_t* tile_bits, int64_t i0, int64_t i1, T* dq) {
    const Block<T>& keys = tile.key_block();
    fill(tile, tile_bits, i0, i1);
    for_each_run_of_rows(tile, i0, i1, [&](int64_t r, int64_t rows, const KeyRange& columns) {
      gemm<T, false>(rows, width_q_, columns.end - columns.begin,
                     tile.gradients() + r * kKeyTile + columns.begin, kKeyTile,
                     keys.data + columns.begin * keys.stride, keys.stride, dq + r * width_q_, width_q_, true);
    });
  }

  // P and dS of one tile where scores are sums over pairs, and all that comes of dS. A tile's dK is added up
  // by itself, as the products of gemm are: one chain of float over all rows would lose its last digits.
  void run_pair_tile(GradTile<T>& tile, const int32_t* tile_bits, int64_t i0, int64_t i1, T* dq, T* dk,
                     double* dw, BackwardScratch<T>& scratch) {
    T* tile_dk = scratch.pair_dk.ensure(kKeyTile * width_q_);
    std::fill_n(tile_dk, kKeyTile * width_q_, T{0});
    const Block<T>& keys = tile.key_block();
    KeyRange reached{kKeyTile, 0};
    fill(tile, tile_bits, i0, i1);
    const Block<T>& queries = tile.query_block();
    for_each_run_of_rows(tile, i0, i1, [&](int64_t r, int64_t rows, const KeyRange& columns) {
      pair_gradients<T>(p_.score,
                        {tile.gradients() + r * kKeyTile, queries.data + r * queries.stride, keys.data,
                         queries.stride, keys.stride, dq + r * width_q_, tile_dk, dw, width_q_, kKeyTile},
                        rows, columns.begin, columns.end);
      reached = {std::min(reached.begin, columns.begin), std::max(reached.end, columns.end)};
    });
    for (int64_t n = reached.begin * width_q_; n < reached.end * width_q_; ++n) dk[n] += tile_dk[n];
  }

  // P and dS of one tile.
  void fill(GradTile<T>& tile, const int32_t* tile_bits, int64_t i0, int64_t i1) {
    tile.load_queries(i0, i1);
    for (int64_t i = i0; i < i1; i += kGradGroup) {
      const int64_t rows = std::min(kGradGroup, i1 - i);
      const KeyRange columns = tile.columns(i, rows);
      if (columns.empty())
        tile.clear(i, rows);
      else
        tile.compute(tile_bits, i, rows, columns, false);
    }
  }

  // Calls visit(first row, relative to the tile, rows, columns) for the runs of groups that see the same
  // columns.
  template <class Visit>
  void for_each_run_of_rows(const GradTile<T>& tile, int64_t i0, int64_t i1, const Visit& visit) {
    for_each_run_of_groups(
        i0, i1, [&](int64_t i, int64_t rows) { return tile.columns(i, rows); },
        [&](int64_t i, int64_t rows, const KeyRange& columns) { visit(i - i0, rows, columns); });
  }

  // dV += P^T dO and dK += dS^T Q, each group of keys over the rows that its band reaches.
  void add_key_gradients(const GradTile<T>& tile, int64_t i0, int64_t i1, int64_t j0, int64_t j1, T* dk,
                         T* dv) {
    const Block<T>& queries = tile.query_block();
    const Block<T>& douts = tile.dout_block();
    const auto rows_of = [&](int64_t j, int64_t keys) {
      const KeyRange rows = tile.rules().keys_rows(j, j + keys);
      return KeyRange{std::max(rows.begin, i0) - i0, std::min(rows.end, i1) - i0};
    };
    for_each_run_of_groups(j0, j1, rows_of, [&](int64_t j, int64_t keys, const KeyRange& rows) {
      const int64_t c = j - j0, depth = rows.end - rows.begin, first = rows.begin * kKeyTile + c;
      gemm<T, true>(keys, width_v_, depth, tile.probabilities() + first, kKeyTile,
                    douts.data + rows.begin * douts.stride, douts.stride, dv + c * width_v_, width_v_, true);
      if (p_.score != Score::kDot) return;
      gemm<T, true>(keys, width_q_, depth, tile.gradients() + first, kKeyTile,
                    queries.data + rows.begin * queries.stride, queries.stride, dk + c * width_q_, width_q_,
                    true);
    });
  }

  // Calls visit(first, count, range) for the groups of [begin, end) by runs of the same range that is not
  // empty: a product over all of a run reads each strip of its second operand once, and then from L1.
  template <class RangeOf, class Visit>
  static void for_each_run_of_groups(int64_t begin, int64_t end, const RangeOf& range_of,
                                     const Visit& visit) {
    const auto range_at = [&](int64_t n) { return range_of(n, std::min(kGradGroup, end - n)); };
    for (int64_t first = begin, last; first < end; first = last) {
      const KeyRange range = range_at(first);
      for (last = first + kGradGroup; last < end; last += kGradGroup) {
        const KeyRange next = range_at(last);
        if (next.begin != range.begin || next.end != range.end) break;
      }
      if (!range.empty()) visit(first, std::min(last, end) - first, range);
    }
  }

  // Rows [j0, j1) of dK and dV, whose sums are dk and dv.
  void finish_keys(const Unit& u, int64_t j0, int64_t j1, T* dk, T* dv) {
    for (int64_t j = j0; j < j1; ++j, dk += width_q_, dv += width_v_) {
      if (!all_finite(dk, width_q_) || !all_finite(dv, width_v_))
        exact_dkv(p_, rows_, u.batch, u.head_kv, j, dk, dv);
      finish_pairs(p_, dk);
      store_row<T>(dk, static_cast<T>(p_.scale), p_.dtype, p_.head_dim,
                   row_address(p_.dk, p_.dtype, p_.dk.offset(u.batch, u.head_kv, u.seq.k_begin + j)));
      store_row<T>(dv, T{1}, p_.dtype, p_.head_dim_v,
                   row_address(p_.dv, p_.dtype, p_.dv.offset(u.batch, u.head_kv, u.seq.k_begin + j)));
    }
  }

  // Adds up the partial dQ of the wave, each row's in ascending order of keys.
  void finish_queries() {
    struct RowBlock {
      const Unit* unit;
      int64_t head, begin, end;
    };
    Vector<RowBlock> blocks;
    for (const Unit& u : units_)
      if (!u.local)
        for (int64_t h = u.head_begin; h < u.head_end; ++h)
          for (int64_t i = 0; i < u.seq.len_q; i += kMaskTile)
            blocks.push_back({&u, h, i, std::min(u.seq.len_q, i + kMaskTile)});
    parallel_tasks(p_.num_threads, static_cast<int64_t>(blocks.size()), [&](int, int64_t n) {
      const RowBlock& block = blocks[n];
      const Unit& u = *block.unit;
      const Part* parts = u.num_chunks == 0 ? nullptr : parts_.data() + u.parts + block.head - u.head_begin;
      Vector<T> sum(width_q_);
      for (int64_t i = block.begin; i < block.end; ++i)
        finish_query(u, parts, block.head, i, partial_dq_.data(), sum.data());
    });
  }

  // Row i of dQ of head h. parts: of its first chunk; those of the next lie one unit's heads further.
  void finish_query(const Unit& u, const Part* parts, int64_t h, int64_t i, const T* partial, T* sum) {
    std::fill(sum, sum + width_q_, T{0});
    for (int64_t n = 0; n < u.num_chunks; ++n) {
      const Part& p = parts[n * u.heads()];
      if (i < p.rows.begin || i >= p.rows.end) continue;
      const T* part = partial + (p.first + i - p.rows.begin) * width_q_;
      for (int64_t d = 0; d < width_q_; ++d) sum[d] += part[d];
    }
    if (!all_finite(sum, width_q_)) exact_dq(p_, rows_, u.batch, h, i, sum);
    finish_pairs(p_, sum);
    store_row<T>(sum, static_cast<T>(p_.scale), p_.dtype, p_.head_dim,
                 row_address(p_.dq, p_.dtype, p_.dq.offset(u.batch, h, u.seq.q_begin + i)));
  }

  // Adds the wave's parts in an order that no wave changes: by unit, head and chunk.
  void add_score_weights() {
    const Chunk* chunk = chunks_.data();
    for (const Unit& u : units_) {
      for (int64_t n = 0; n < u.heads(); ++n)
        for (int64_t c = 0; c < u.num_chunks; ++c)
          dw_.add(1.0, partial_dw_.data() + (chunk[c].parts + n) * width_q_);
      chunk += u.num_chunks;
    }
  }

  void finish_score_weights() {
    T* dw = static_cast<T*>(p_.dscore_weights);
    dw_.store(dw);
    if (std::all_of(dw, dw + p_.head_dim, [](T x) { return std::isfinite(x); })) return;
    ExactSum sum(p_.head_dim);
    for (int64_t b = 0; b < p_.batch; ++b)
      for (int64_t h = 0; h < p_.num_heads; ++h)
        for (int64_t i = 0; i < sequence_of(p_, b).len_q; ++i) exact_dq<T>(p_, rows_, b, h, i, nullptr, &sum);
    sum.store(dw);
  }

  const AttentionBackwardParams& p_;
  const RowGradients<T>& rows_;
  const int64_t group_, width_q_, width_v_;
  Vector<Unit> units_;    // of the wave
  Vector<Chunk> chunks_;  // in the order of units, a unit's chunks by ascending keys
  Vector<Part> parts_;
  Buffer<T> dk_, dv_;  // of a unit that is not whole, which has a wave of its own
  Buffer<T> partial_dq_;
  Buffer<double> partial_dw_;  // of each Part, in their order
  ExactSum dw_;                // of all waves so far
};

// d lse / d sink = exp(sink - lse), and every probability falls in proportion: dsink = -sum exp(sink - lse)
// (delta + products).
template <class T>
void sink_gradients(const AttentionBackwardParams& p, const RowGradients<T>& rows) {
  parallel_tasks(p.num_threads, p.num_heads, [&](int, int64_t h) {
    double sum = 0;  // of every row of the batch: thousands of terms in one order
    const T sink = static_cast<const T*>(p.sinks)[h];
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence s = sequence_of(p, b);
      for (int64_t i = 0; i < s.len_q; ++i) {
        const T weight = std::exp((sink - rows.lse(b, h)[i]) - rows.residual(b, h)[i]);
        if (weight == T{0}) continue;
        const T* products = rows.products(b, h);
        sum -=
            static_cast<double>(weight) * (rows.delta(b, h)[i] + (products == nullptr ? T{0} : products[i]));
      }
    }
    static_cast<T*>(p.dsinks)[h] = static_cast<T>(sum);
  });
}

template <class T>
void run_backward(const AttentionBackwardParams& p) {
  const RowGradients<T> rows(p);
  Backward<T>(p, rows).run();
  if (p.dsinks != nullptr) sink_gradients<T>(p, rows);
  if (p.dbias.data != nullptr || p.ddiag.data != nullptr) bias_gradients<T>(p, rows);
}

}  // namespace

void attention_bwd(const AttentionBackwardParams& p) {
  if (p.dtype == DType::kFloat64)
    run_backward<double>(p);
  else
    run_backward<float>(p);
}

}  // namespace fastattn::FASTATTN_ISA

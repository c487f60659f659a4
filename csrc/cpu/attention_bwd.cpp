// The backward pass: dQ, dK, dV (and dsinks) from dO and dlse, recomputing P from lse.
//
//   S = Q K^T   dP = dO V^T   dS = P * (dP - delta)   dV += P^T dO   dK += dS^T Q   dQ += dS K
//
// Keys go in tiles of 64, whose dK and dV stay in L2 while the query tiles that see them pass by. Tiles form
// up to 8 chunks by the number of keys alone; each chunk has its own partial dQ, and the partials are added
// in ascending order, so that the bits do not depend on how many threads took part.
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
constexpr int64_t kPartialBytes = 64 << 20;  // of partial dQ at a time, where there are several heads

// One key-value head of one batch entry.
struct Unit {
  int64_t batch, head_kv;
  Sequence seq;
  int64_t chunk_keys, num_chunks;
  int64_t accumulator;  // its first row in the buffers of dK and dV
};

// A chunk of a unit's keys, for one of its query heads; rows are those of its partial dQ.
struct Chunk {
  const Unit* unit;
  int64_t head, key_begin, key_end;
  KeyRange rows;
  int64_t partial;  // its first row in the buffer of partial dQ
};

Unit make_unit(const AttentionParams& p, int64_t b, int64_t head_kv) {
  Unit u{b, head_kv, sequence_of(p, b), 0, 0, 0};
  const int64_t chunks = std::clamp<int64_t>(u.seq.len_k / kMinChunkKeys, 1, kMaxChunks);
  const int64_t tiles = (u.seq.len_k + kKeyTile - 1) / kKeyTile;
  u.chunk_keys = std::max<int64_t>(1, (tiles + chunks - 1) / chunks) * kKeyTile;
  u.num_chunks = (u.seq.len_k + u.chunk_keys - 1) / u.chunk_keys;
  return u;
}

template <class T>
class Backward {
 public:
  Backward(const AttentionBackwardParams& p, const RowGradients<T>& rows)
      : p_(p),
        rows_(rows),
        group_(p.num_heads / p.num_heads_kv),
        width_q_(round_to_lanes<T>(p.head_dim)),
        width_v_(round_to_lanes<T>(p.head_dim_v)) {}

  // Units go in waves whose partial dQ fit in kPartialBytes; at least one unit a wave.
  void run() {
    Vector<Unit> wave;
    int64_t bytes = 0;
    for (int64_t b = 0; b < p_.batch; ++b)
      for (int64_t h = 0; h < p_.num_heads_kv; ++h) {
        const Unit u = make_unit(p_, b, h);
        const int64_t more = u.num_chunks * u.seq.len_q * width_q_ * static_cast<int64_t>(sizeof(T));
        if (!wave.empty() && bytes + more > kPartialBytes) {
          run_wave(wave);
          wave.clear();
          bytes = 0;
        }
        wave.push_back(u);
        bytes += more;
      }
    if (!wave.empty()) run_wave(wave);
  }

 private:
  void run_wave(Vector<Unit>& units) {
    int64_t keys = 0;
    for (Unit& u : units) {
      u.accumulator = keys;
      keys += u.seq.len_k;
    }
    dk_.ensure(keys * width_q_);
    dv_.ensure(keys * width_v_);
    for (int64_t g = 0; g < group_; ++g) {
      const Vector<Chunk> chunks = plan(units, g);
      parallel_tasks(p_.num_threads, static_cast<int64_t>(chunks.size()),
                     [&](int, int64_t n) { run_chunk(chunks[n], g); });
      finish_queries(units, chunks, g);
    }
  }

  Vector<Chunk> plan(const Vector<Unit>& units, int64_t g) {
    Vector<Chunk> chunks;
    int64_t rows = 0;
    for (const Unit& u : units) {
      const ScoreRules<T> rules(p_, u.batch, u.head_kv * group_ + g, u.seq);
      for (int64_t n = 0; n < u.num_chunks; ++n) {
        Chunk c{
            &u,  u.head_kv * group_ + g, n * u.chunk_keys, std::min(u.seq.len_k, (n + 1) * u.chunk_keys), {},
            rows};
        c.rows = rules.visiting_rows(c.key_begin, c.key_end);
        if (c.rows.empty()) c.rows = {0, 0};
        // Whole tiles: run_key_tile adds to every row of a tile that any of its rows reaches.
        c.rows.begin = c.rows.begin / kMaskTile * kMaskTile;
        c.rows.end = std::min(u.seq.len_q, (c.rows.end + kMaskTile - 1) / kMaskTile * kMaskTile);
        rows += c.rows.end - c.rows.begin;
        chunks.push_back(c);
      }
    }
    partial_dq_.ensure(rows * width_q_);
    return chunks;
  }

  void run_chunk(const Chunk& c, int64_t g) {
    static thread_local GradScratch<T> scratch;
    const Unit& u = *c.unit;
    T* dk = dk_.data() + (u.accumulator + c.key_begin) * width_q_;
    T* dv = dv_.data() + (u.accumulator + c.key_begin) * width_v_;
    T* dq = partial_dq_.data() + c.partial * width_q_;
    const int64_t keys = c.key_end - c.key_begin;
    if (g == 0) {
      std::fill(dk, dk + keys * width_q_, T{0});
      std::fill(dv, dv + keys * width_v_, T{0});
    }
    std::fill(dq, dq + (c.rows.end - c.rows.begin) * width_q_, T{0});
    GradTile<T> tile(p_, rows_, u.batch, c.head, scratch);
    for (int64_t j0 = c.key_begin; j0 < c.key_end; j0 += kKeyTile)
      run_key_tile(tile, c, j0, std::min(c.key_end, j0 + kKeyTile), dq, dk + (j0 - c.key_begin) * width_q_,
                   dv + (j0 - c.key_begin) * width_v_);
    if (g == group_ - 1) finish_keys(u, c);
  }

  void run_key_tile(GradTile<T>& tile, const Chunk& c, int64_t j0, int64_t j1, T* dq, T* dk, T* dv) {
    bool loaded = false;
    Block<T> keys{};
    tile.rules().for_each_query_tile(j0, j1, [&](int64_t query_tile, const int32_t* tile_bits) {
      const int64_t i0 = query_tile * kMaskTile, i1 = std::min(c.unit->seq.len_q, i0 + kMaskTile);
      const KeyRange hull = tile.rules().rows_keys(i0, i1);
      if (std::max(hull.begin, j0) >= std::min(hull.end, j1)) return;
      if (!loaded) {
        tile.load_keys(j0, j1);
        keys = tile.key_block();
        loaded = true;
      }
      tile.load_queries(i0, i1);
      for (int64_t i = i0; i < i1; i += kGradGroup) {
        const int64_t rows = std::min(kGradGroup, i1 - i);
        const KeyRange columns = tile.columns(i, rows);
        if (columns.empty()) {
          tile.clear(i, rows);
          continue;
        }
        tile.compute(tile_bits, i, rows, columns, false);
        gemm<T, false>(rows, width_q_, columns.end - columns.begin,
                       tile.gradients() + (i - i0) * kKeyTile + columns.begin, kKeyTile,
                       keys.data + columns.begin * keys.stride, keys.stride,
                       dq + (i - c.rows.begin) * width_q_, width_q_, true);
      }
      add_key_gradients(tile, i0, i1, j0, j1, dk, dv);
    });
  }

  // dV += P^T dO and dK += dS^T Q, each group of keys over the rows that its band reaches.
  void add_key_gradients(const GradTile<T>& tile, int64_t i0, int64_t i1, int64_t j0, int64_t j1, T* dk,
                         T* dv) {
    const Block<T>& queries = tile.query_block();
    const Block<T>& douts = tile.dout_block();
    for (int64_t j = j0; j < j1; j += kGradGroup) {
      const int64_t keys = std::min(kGradGroup, j1 - j), c = j - j0;
      KeyRange rows = tile.rules().keys_rows(j, j + keys);
      rows = {std::max(rows.begin, i0) - i0, std::min(rows.end, i1) - i0};
      if (rows.empty()) continue;
      const int64_t depth = rows.end - rows.begin, first = rows.begin * kKeyTile + c;
      gemm<T, true>(keys, width_v_, depth, tile.probabilities() + first, kKeyTile,
                    douts.data + rows.begin * douts.stride, douts.stride, dv + c * width_v_, width_v_, true);
      gemm<T, true>(keys, width_q_, depth, tile.gradients() + first, kKeyTile,
                    queries.data + rows.begin * queries.stride, queries.stride, dk + c * width_q_, width_q_,
                    true);
    }
  }

  void finish_keys(const Unit& u, const Chunk& c) {
    Vector<T> dk_exact(width_q_), dv_exact(width_v_);
    for (int64_t j = c.key_begin; j < c.key_end; ++j) {
      const T* dk = dk_.data() + (u.accumulator + j) * width_q_;
      const T* dv = dv_.data() + (u.accumulator + j) * width_v_;
      if (!all_finite(dk, width_q_) || !all_finite(dv, width_v_)) {
        exact_dkv(p_, rows_, u.batch, u.head_kv, j, dk_exact.data(), dv_exact.data());
        dk = dk_exact.data();
        dv = dv_exact.data();
      }
      store_row<T>(dk, static_cast<T>(p_.scale), p_.dtype, p_.head_dim,
                   row_address(p_.dk, p_.dtype, p_.dk.offset(u.batch, u.head_kv, u.seq.k_begin + j)));
      store_row<T>(dv, T{1}, p_.dtype, p_.head_dim_v,
                   row_address(p_.dv, p_.dtype, p_.dv.offset(u.batch, u.head_kv, u.seq.k_begin + j)));
    }
  }

  void finish_queries(const Vector<Unit>& units, const Vector<Chunk>& chunks, int64_t g) {
    struct RowBlock {
      const Unit* unit;
      const Chunk* chunks;
      int64_t begin, end;
    };
    Vector<RowBlock> blocks;
    const Chunk* first = chunks.data();
    for (const Unit& u : units) {
      for (int64_t i = 0; i < u.seq.len_q; i += kMaskTile)
        blocks.push_back({&u, first, i, std::min(u.seq.len_q, i + kMaskTile)});
      first += u.num_chunks;
    }
    parallel_tasks(p_.num_threads, static_cast<int64_t>(blocks.size()), [&](int, int64_t n) {
      const RowBlock& block = blocks[n];
      Vector<T> sum(width_q_);
      for (int64_t i = block.begin; i < block.end; ++i)
        finish_query(*block.unit, block.chunks, block.unit->head_kv * group_ + g, i, sum);
    });
  }

  void finish_query(const Unit& u, const Chunk* chunks, int64_t h, int64_t i, Vector<T>& sum) {
    std::fill(sum.begin(), sum.end(), T{0});
    for (int64_t n = 0; n < u.num_chunks; ++n) {
      const Chunk& c = chunks[n];
      if (i < c.rows.begin || i >= c.rows.end) continue;
      const T* part = partial_dq_.data() + (c.partial + i - c.rows.begin) * width_q_;
      for (int64_t d = 0; d < width_q_; ++d) sum[d] += part[d];
    }
    void* dq = row_address(p_.dq, p_.dtype, p_.dq.offset(u.batch, h, u.seq.q_begin + i));
    const T scale = static_cast<T>(p_.scale);
    if (!all_finite(sum.data(), width_q_)) exact_dq(p_, rows_, u.batch, h, i, sum.data());
    store_row<T>(sum.data(), scale, p_.dtype, p_.head_dim, dq);
  }

  const AttentionBackwardParams& p_;
  const RowGradients<T>& rows_;
  const int64_t group_, width_q_, width_v_;
  Buffer<T> dk_, dv_, partial_dq_;
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

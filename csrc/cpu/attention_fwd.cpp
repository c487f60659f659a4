// The forward pass: softmax(rules(scale * Q K^T)) V with an online softmax, one pass over the keys.
//
// A task is up to kTaskRows query rows that share a key-value head. It walks the keys in segments of 256,
// packs each segment's K once for all its rows, and takes the rows in groups of 12 (two micro-tiles): their
// 12 x 256 scores stay in L1 from the product that makes them, through the softmax, to the product with V.
// docs/kernels/cpu.md derives the steps and the sizes.
#include <algorithm>
#include <cmath>

#include "../parallel.h"
#include "buffer.h"
#include "dropout.h"
#include "exact.h"
#include "few_rows.h"
#include "forward_plan.h"
#include "isa.h"
#include "pair_scores.h"
#include "rows.h"
#include "score.h"
#include "softmax.h"
#include "weight_rows.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kReused = 128;  // rows and keys of a task from which on scattered rows are worth a copy

template <class T>
struct Scratch {
  Buffer<T> panels, values, queries, scores, sums, weights;
  Buffer<RowState<T>> states;
};

// Writes one row of the results, and finishes row r of the weights, where not nullptr. sums are the
// unnormalised outputs, and overwritten where they will not do.
template <class T>
void finish_row(const AttentionParams& p, int64_t b, int64_t h, int64_t i, const RowState<T>& state, T* sums,
                const WeightRows<T>* weights = nullptr, int64_t r = 0) {
  const Sequence s = sequence_of(p, b);
  const int64_t dim = p.head_dim_v;
  void* out = row_address(p.out, p.dtype, p.out.offset(b, h, s.q_begin + i));
  T* lse = p.lse.data == nullptr ? nullptr : static_cast<T*>(p.lse.data) + p.lse.offset(b, h, s.q_begin + i);
  T factor = T{1}, row_lse = -kInfinity<T>;
  const auto sees_none = [&] {
    const ScoreRules<T> rules(p, b, h, s);
    return rules.has_support() || !rules.sees_any(i);
  };
  if (state.max == -kInfinity<T> && sees_none()) {
    std::fill_n(sums, dim, T{0});  // not a multiple: 0 * NaN
    if (weights != nullptr) weights->clear(r);
  } else if (state.max != -kInfinity<T> && all_finite(sums, round_to_lanes<T>(dim))) {
    factor = Dropout(p).keep_scale<T>() / state.sum;
    row_lse = state.max + std::log(state.sum);
    if (weights != nullptr) weights->finish(r, state.max, factor);
  } else {
    Vector<T> exact(weights == nullptr ? 0 : s.len_k);
    row_lse = exact_row<T>(p, b, h, i, sums, weights == nullptr ? nullptr : exact.data());
    if (weights != nullptr) weights->set(r, exact.data());
  }
  store_row<T>(sums, factor, p.dtype, dim, out);
  if (lse != nullptr) *lse = row_lse;
}

// finish_row of the rows [i, i + rows), up to kLanes, all at once: of those that are in any way special by
// itself.
template <class T>
void finish_rows(const AttentionParams& p, int64_t b, int64_t h, int64_t i, int64_t rows,
                 const RowState<T>* states, T* sums, int64_t width) {
  Vec<T> zero[kLanes<T>];  // of each row's finite elements
  T max[kLanes<T>] = {}, sum[kLanes<T>] = {};
  for (int64_t r = 0; r < kLanes<T>; ++r) {
    zero[r] = Vec<T>{};
    if (r >= rows) continue;
    for (int64_t d = 0; d < width; d += kLanes<T>) zero[r] += load(sums + r * width + d) * T{0};
    max[r] = states[r].max;
    sum[r] = states[r].sum;
  }
  T finite[kLanes<T>], factor[kLanes<T>], lse[kLanes<T>];
  store(finite, sum_rows<T>(zero));
  store(factor, Dropout(p).keep_scale<T>() / load(sum));
  store(lse, load(max) + vlog<T>(load(sum)));
  const int64_t q_begin = sequence_of(p, b).q_begin;
  for (int64_t r = 0; r < rows; ++r) {
    if (max[r] == -kInfinity<T> || finite[r] != T{0}) {
      finish_row<T>(p, b, h, i + r, states[r], sums + r * width);
      continue;
    }
    store_row<T>(sums + r * width, factor[r], p.dtype, p.head_dim_v,
                 row_address(p.out, p.dtype, p.out.offset(b, h, q_begin + i + r)));
    if (p.lse.data != nullptr) static_cast<T*>(p.lse.data)[p.lse.offset(b, h, q_begin + i + r)] = lse[r];
  }
}

template <class T>
class TaskRunner {
 public:
  TaskRunner(const AttentionParams& p, const Plan& plan, const Task& task, Scratch<T>& scratch,
             T* partial_sums, RowState<T>* partial_states)
      : p_(p),
        task_(task),
        tiles_(plan.tiles.data() + task.tile_begin, plan.tiles.data() + task.tile_end),
        seq_(sequence_of(p, task.batch)),
        keys_(Rows::of_keys(p, p.k, task.batch, task.head_kv, seq_)),
        values_(Rows::of_keys(p, p.v, task.batch, task.head_kv, seq_)),
        dropout_(p),
        weights_(p, task.batch, task.rows, scratch.weights),
        width_(round_to_lanes<T>(p.head_dim_v)),
        few_rows_(seq_.len_q <= kDotRows),
        pack_keys_(!few_rows_ || p.score != Score::kDot),
        reused_(task.rows >= kReused && seq_.len_k >= kReused),
        pack_values_(!few_rows_ && ((reused_ && !close_rows<T>(values_, p.head_dim_v)) ||
                                    !readable_in_place<T>(values_, p.dtype, p.head_dim_v))) {
    if (pack_keys_) panels_ = scratch.panels.ensure(kSegment * p.head_dim);
    scores_ = scratch.scores.ensure(std::max(kGroup, few_rows_ ? task.rows : 0) * kSegment);
    if (few_rows_)
      row_copy_ = scratch.values.ensure(std::max(kFewKeys * p.head_dim_v, kLanes<T> * p.head_dim));
    if (pack_values_) value_strips_ = scratch.values.ensure(kSegment * width_);
    sums_ = task.partial < 0 ? scratch.sums.ensure(task.rows * width_) : partial_sums + task.partial * width_;
    states_ = task.partial < 0 ? scratch.states.ensure(task.rows) : partial_states + task.partial;
    const Rows queries(p, p.q, task.batch, tiles_.front().head, seq_.q_begin);
    if (few_rows_ || !in_accumulator_type(p.dtype) || (reused_ && !adjacent(queries, p.head_dim)))
      queries_ = scratch.queries.ensure(task.rows * p.head_dim);
  }

  void run() {
    start();
    for (int64_t s0 = task_.key_begin; s0 < task_.key_end; s0 += kSegment) {
      const int64_t s1 = std::min(task_.key_end, s0 + kSegment);
      packed_panels_ = 0;
      packed_values_ = 0;
      // Block lists may differ between the heads of a group; otherwise few rows meet their keys all at once.
      const size_t together = few_rows_ && p_.block_mask.row_ptr == nullptr ? tiles_.size() : 1;
      for (size_t t = 0; t < tiles_.size(); t += together) {
        const Tile& tile = tiles_[t];
        const ScoreRules<T> rules(p_, task_.batch, tile.head, seq_);
        rules.for_each_run(tile.row_begin, tile.row_end, s0, s1, [&](const Run& run) {
          if (few_rows_) return attend_few(rules, &tile, &tile + together, run, s0);
          for (int64_t i = tile.row_begin; i < tile.row_end; i += kGroup)
            attend(rules, tile, run, s0, i, std::min(kGroup, tile.row_end - i));
        });
      }
    }
    if (task_.partial >= 0) return;
    for (const Tile& tile : tiles_) finish(tile);
  }

 private:
  void start() {
    std::fill(sums_, sums_ + task_.rows * width_, T{0});
    for (const Tile& tile : tiles_) {
      const Rows queries(p_, p_.q, task_.batch, tile.head, seq_.q_begin);
      for (int64_t i = tile.row_begin; i < tile.row_end; ++i) {
        const int64_t r = tile.first + i - tile.row_begin;
        states_[r] = RowState<T>{};
        if (p_.sinks != nullptr && task_.key_begin == 0)
          states_[r] = sink_state(static_cast<const T*>(p_.sinks)[tile.head]);
        if (queries_ != nullptr)
          load_row<T>(queries(i), p_.dtype, p_.head_dim, T{1}, queries_ + r * p_.head_dim);
      }
    }
  }

  void finish(const Tile& tile) {
    const int64_t step = weights_.wanted() ? 1 : kLanes<T>;
    for (int64_t i = tile.row_begin; i < tile.row_end; i += step) {
      const int64_t r = tile.first + i - tile.row_begin;
      T* sums = sums_ + r * width_;
      if (!weights_.wanted()) {
        const int64_t rows = std::min(step, tile.row_end - i);
        finish_rows<T>(p_, task_.batch, tile.head, i, rows, states_ + r, sums, width_);
      } else {
        finish_row<T>(p_, task_.batch, tile.head, i, states_[r], sums, &weights_, r);
        weights_.write(r, tile.head, i);
      }
    }
  }

  Block<T> query_block(const Tile& tile, int64_t i) const {
    if (queries_ != nullptr) return {queries_ + (tile.first + i - tile.row_begin) * p_.head_dim, p_.head_dim};
    return block_in_place<T>(Rows(p_, p_.q, task_.batch, tile.head, seq_.q_begin), i);
  }

  static_assert(kSegment / kPanel<T> <= 64, "a bit for each panel of a segment");

  // Packs the panels that hold keys [begin, end) of the segment at s0, each once.
  void pack(int64_t s0, int64_t begin, int64_t end) {
    for (int64_t n = begin / kPanel<T>; n * kPanel<T> < end; ++n) {
      if (packed_panels_ >> n & 1) continue;
      packed_panels_ |= uint64_t{1} << n;
      const int64_t first = s0 + n * kPanel<T>;
      pack_panel<T>([&](int64_t c) { return keys_(first + c); }, p_.dtype, seq_.len_k - first, p_.head_dim,
                    static_cast<T>(p_.scale), panels_ + n * kPanel<T> * p_.head_dim);
    }
  }

  // sums += weights * V for the keys [begin, end) of the segment at s0.
  void add_values(int64_t s0, int64_t begin, int64_t end, int64_t rows, const T* weights, T* sums) {
    if (!pack_values_) {
      const Block<T> values = block_in_place<T>(values_, s0 + begin);
      return gemm<T, false>(rows, width_, end - begin, weights + begin, kSegment, values.data, values.stride,
                            sums, width_, true);
    }
    for (int64_t n = begin / kMaskTile; n * kMaskTile < end; ++n) {
      if (packed_values_ >> n & 1) continue;
      packed_values_ |= uint64_t{1} << n;
      pack_strips<T>([&](int64_t c) { return values_(s0 + c); }, p_.dtype, n * kMaskTile,
                     std::min((n + 1) * kMaskTile, seq_.len_k - s0), p_.head_dim_v, value_strips_, kSegment);
    }
    gemm_strips<T>(rows, width_, end - begin, weights + begin, kSegment, value_strips_, kSegment, begin, sums,
                   width_);
  }

  // Where rows from `first` on of the task meet the segment at s0.
  T* scores_of(int64_t first, int64_t s0) const {
    return weights_.wanted() ? weights_.values(first, s0) : scores_;
  }

  // What rows [i, i + rows) may see of a run within the segment at s0: keys [first, last) and, in whole
  // vectors, [begin, end), all relative to s0; `keys` of those exist.
  struct Reach {
    int64_t first, last, begin, end, keys;
    Reach(const ScoreRules<T>& rules, const Run& run, int64_t s0, int64_t i, int64_t rows, int64_t len_k) {
      const KeyRange hull = rules.rows_keys(i, i + rows);
      first = std::max(hull.begin, run.begin) - s0;
      last = std::min(hull.end, run.end) - s0;
      begin = first / kLanes<T> * kLanes<T>;
      end = round_to_lanes<T>(last);
      keys = std::min(end, len_k - s0) - begin;
    }
  };

  // Rows [i, i + rows) of a tile meet the keys of a run within the segment at s0.
  void attend(const ScoreRules<T>& rules, const Tile& tile, const Run& run, int64_t s0, int64_t i,
              int64_t rows) {
    const Reach reach(rules, run, s0, i, rows, seq_.len_k);
    if (reach.first >= reach.last) return;
    const Block<T> queries = query_block(tile, i);
    const int64_t first = tile.first + i - tile.row_begin;
    T* scores = scores_of(first, s0);
    rules.prefetch(i, rows, s0 + reach.begin, reach.keys);
    pack(s0, reach.begin, reach.end);
    score_products<T>(p_, rows, reach.begin, reach.end, queries.data, queries.stride, panels_, scores,
                      kSegment);
    update(rules, tile, run, reach, s0, i, rows, scores);
    // V from the first to the last key that some row may see, and no further: what padding holds is not read.
    add_values(s0, reach.first, reach.last, rows, scores, sums_ + first * width_);
  }

  // All rows of the tiles [tile, last_tile), heads that see the same run, meet its keys where these lie.
  void attend_few(const ScoreRules<T>& rules, const Tile* tile, const Tile* last_tile, const Run& run,
                  int64_t s0) {
    const int64_t rows = tile->row_end - tile->row_begin, all_rows = rows * (last_tile - tile);
    const Reach reach(rules, run, s0, tile->row_begin, rows, seq_.len_k);
    if (reach.first >= reach.last) return;
    T* scores = scores_of(tile->first, s0);
    if (pack_keys_) {
      pack(s0, reach.begin, reach.end);
      for (int64_t n = 0; tile + n < last_tile; ++n) {
        const Block<T> queries = query_block(tile[n], tile->row_begin);
        score_products<T>(p_, rows, reach.begin, reach.end, queries.data, queries.stride, panels_,
                          scores + n * rows * kSegment, kSegment);
      }
    } else {
      const auto query_of = [&](int64_t m) { return queries_ + (tile->first + m) * p_.head_dim; };
      dot_rows<T>(
          all_rows, query_of, [&](int64_t c) { return keys_(s0 + reach.begin + c); }, p_.dtype, reach.keys,
          p_.head_dim, static_cast<T>(p_.scale), scores + reach.begin, kSegment, row_copy_);
    }
    for (int64_t n = 0; tile + n < last_tile; ++n)
      update(ScoreRules<T>(p_, task_.batch, tile[n].head, seq_), tile[n], run, reach, s0, tile->row_begin,
             rows, scores + n * rows * kSegment);
    add_weighted_rows<T>(
        all_rows, scores + reach.first, kSegment, [&](int64_t c) { return values_(s0 + reach.first + c); },
        p_.dtype, reach.last - reach.first, p_.head_dim_v, sums_ + tile->first * width_, width_, row_copy_);
  }

  // Products become weights, row by row, and earlier sums are rescaled to the rows' new maxima.
  void update(const ScoreRules<T>& rules, const Tile& tile, const Run& run, const Reach& reach, int64_t s0,
              int64_t i, int64_t rows, T* scores) {
    const int64_t padded = reach.end - reach.begin, j0 = s0 + reach.begin;
    const int64_t first = tile.first + i - tile.row_begin;
    for (int64_t r = 0; r < rows; ++r) {
      T* s = scores + r * kSegment + reach.begin;
      rules.apply(run, i + r, j0, reach.keys, padded, s, nullptr);
    }
    for (int64_t r0 = 0; r0 < rows; r0 += kLanes<T>) {
      const int64_t n = std::min<int64_t>(kLanes<T>, rows - r0);
      T factors[kLanes<T>];
      T* s = scores + r0 * kSegment + reach.begin;
      softmax_update_lanes<T>(s, s, kSegment, n, padded, states_ + first + r0, factors);
      for (int64_t r = 0; r < n; ++r)
        if (factors[r] != T{1}) scale_row<T>(sums_ + (first + r0 + r) * width_, width_, factors[r]);
    }
    if (weights_.wanted()) {
      for (int64_t r = 0; r < rows; ++r)
        weights_.keep(first + r, s0, reach.begin, reach.end, states_[first + r].max);
    }
    if (!dropout_.active()) return;
    for (int64_t r = 0; r < rows; ++r) {
      T* s = scores + r * kSegment + reach.begin;
      dropout_.drop(static_cast<uint32_t>(task_.batch * p_.num_heads + tile.head), i + r, j0, reach.keys, s);
    }
  }

  const AttentionParams& p_;
  const Task& task_;
  const Vector<Tile> tiles_;
  const Sequence seq_;
  const Rows keys_, values_;
  const Dropout dropout_;
  const WeightRows<T> weights_;
  const int64_t width_;
  const bool few_rows_, pack_keys_, reused_, pack_values_;
  T *scores_, *sums_, *panels_ = nullptr, *value_strips_ = nullptr, *row_copy_ = nullptr, *queries_ = nullptr;
  RowState<T>* states_;
  uint64_t packed_panels_ = 0, packed_values_ = 0;  // bits by index within the segment
};

// Adds up row i's partial results in ascending order of keys.
template <class T>
void combine(const AttentionParams& p, const SplitRows& rows, int64_t i, const T* partial_sums,
             const RowState<T>* partial_states) {
  const int64_t width = round_to_lanes<T>(p.head_dim_v), first = rows.partial + i - rows.row_begin;
  RowState<T> total;
  for (int64_t n = 0; n < rows.splits; ++n)
    total.max = std::max(total.max, partial_states[first + n * rows.stride].max);
  Vector<T> sums(width, T{0});
  for (int64_t n = 0; n < rows.splits; ++n) {
    const int64_t index = first + n * rows.stride;
    const RowState<T>& part = partial_states[index];
    if (part.max == -kInfinity<T>) continue;
    const T factor = std::exp(part.max - total.max);
    total.sum += factor * part.sum;
    for (int64_t d = 0; d < width; ++d) sums[d] += factor * partial_sums[index * width + d];
  }
  finish_row<T>(p, rows.batch, rows.head, i, total, sums.data());
}

template <class T>
void run_forward(const AttentionParams& p) {
  const Plan plan(p);
  const int64_t width = round_to_lanes<T>(p.head_dim_v);
  Buffer<T> partial_sums;
  Buffer<RowState<T>> partial_states;
  if (plan.partial_rows > 0) {
    partial_sums.ensure(plan.partial_rows * width);
    partial_states.ensure(plan.partial_rows);
  }
  const auto run_task = [&](const Task& task) {
    static thread_local Scratch<T> scratch;
    TaskRunner<T>(p, plan, task, scratch, partial_sums.data(), partial_states.data()).run();
  };
  const int64_t num_tasks = static_cast<int64_t>(plan.tasks.size());
  if (p.weights.data != nullptr && p.average_weights) {
    // One thread takes the same rows of all heads, in order, and adds up their weights. Tasks lie in the
    // order batch, head, rows.
    const int64_t parts = num_tasks / (p.batch * p.num_heads);
    parallel_tasks(plan.num_threads, p.batch * parts, [&](int, int64_t n) {
      for (int64_t h = 0; h < p.num_heads; ++h)
        run_task(plan.tasks[(n / parts * p.num_heads + h) * parts + n % parts]);
    });
  } else {
    parallel_tasks(plan.num_threads, num_tasks, [&](int, int64_t n) { run_task(plan.tasks[n]); });
  }
  parallel_tasks(plan.num_threads, static_cast<int64_t>(plan.split_rows.size()), [&](int, int64_t n) {
    const SplitRows& rows = plan.split_rows[n];
    for (int64_t i = rows.row_begin; i < rows.row_end; ++i)
      combine<T>(p, rows, i, partial_sums.data(), partial_states.data());
  });
}

}  // namespace

void attention_fwd(const AttentionParams& p) {
  if (p.dtype == DType::kFloat64)
    run_forward<double>(p);
  else
    run_forward<float>(p);
}

}  // namespace fastattn::FASTATTN_ISA

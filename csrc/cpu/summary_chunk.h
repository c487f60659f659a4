// One task of summary_fwd: the statistics of a chunk of one head's rows.
//
// The rows are taken in blocks of up to 256. A block walks the keys in segments of 256, packs each segment's
// K once, and takes its rows in groups of 12, whose scores and weights stay in L1. Where lse is not given, or
// is so large that rounding took from it, a first walk finds it.
#pragma once

#include <algorithm>

#include "../errors.h"
#include "buffer.h"
#include "isa.h"
#include "row_statistics.h"
#include "score.h"
#include "segment_scores.h"
#include "top_links.h"
#include "weight_sums.h"

namespace fastattn::FASTATTN_ISA {

constexpr int64_t kGroup = 2 * kRows;  // rows whose scores and weights share L1: 12 KB each in float32
constexpr int64_t kBlockRows = 256;    // rows that share a packed segment

// A given lse of this size has lost enough to rounding that the row's keys are asked again.
template <class T>
constexpr T kLargeLse{16};

// By how much the weights that a given lse makes may differ from 1 in all, and lse from what the keys tell
// (of a large one relative to its size): far from any rounding, but not from another mask.
template <class T>
constexpr T kTolerance = static_cast<T>(0.05);

// Rows [begin, end) of one head; where its partial sums lie in the buffers of a wave.
struct Chunk {
  int64_t batch, head, begin, end;
  int64_t received, pooled;
  int64_t first_pool_row, pool_rows;
};

template <class T>
struct Scratch {
  Buffer<T> panels, queries, scores, weights, columns, top_scores;
  Buffer<int32_t> top_keys;
  Buffer<RowState<T>> states;
  Buffer<RowStatistics<T>> rows;
};

template <class T>
class ChunkRunner {
 public:
  ChunkRunner(const SummaryParams& p, const Chunk& chunk, const PartialSums<T>& partial, Scratch<T>& scratch)
      : p_(p),
        chunk_(chunk),
        seq_(sequence_of(p, chunk.batch)),
        rules_(p, chunk.batch, chunk.head, seq_),
        queries_(p, p.q, chunk.batch, chunk.head, seq_.q_begin),
        products_(p, chunk.batch, chunk.head, seq_, scratch.panels),
        scores_(scratch.scores.ensure(kGroup * kSegmentKeys)),
        weights_(scratch.weights.ensure(kGroup * kSegmentKeys)),
        sums_(p, partial, scratch.columns.ensure(kSegmentKeys)),
        states_(scratch.states.ensure(kBlockRows)),
        rows_(scratch.rows.ensure(kBlockRows)) {
    if (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16)
      query_copy_ = scratch.queries.ensure(kBlockRows * p.head_dim);
    if (p.top_k > 0) {
      top_scores_ = scratch.top_scores.ensure(kBlockRows * p.top_k);
      top_keys_ = scratch.top_keys.ensure(kBlockRows * p.top_k);
    }
  }

  void run() {
    for (int64_t i = chunk_.begin; i < chunk_.end; i += kBlockRows)
      run_block(i, std::min(chunk_.end, i + kBlockRows));
  }

 private:
  // A group of rows and the keys j0 + c, begin <= c < end in whole vectors, within one run.
  struct Group {
    const Run& run;
    int64_t i, rows;
    int64_t j0, begin, end;

    int64_t keys(int64_t len_k) const { return std::min(j0 + end, len_k) - j0 - begin; }
  };

  void run_block(int64_t i0, int64_t i1) {
    first_ = i0;
    if (query_copy_ != nullptr)
      for (int64_t i = i0; i < i1; ++i)
        load_row<T>(queries_(i), p_.dtype, p_.head_dim, T{1}, query_copy_ + (i - i0) * p_.head_dim);
    normalise(i0, i1);
    for (int64_t i = i0; i < i1 && p_.top_k > 0; ++i) links(i).clear();
    for_each_group(i0, i1, [&](const Group& g) {
      for (int64_t r = 0; r < g.rows; ++r) add_row(g, r);
      sums_.add(g.i, g.rows, g.j0, g.begin, g.end, weights_, kSegmentKeys);
    });
    for (int64_t i = i0; i < i1; ++i) finish_row(i);
  }

  // Calls visit(group) for each group of the block's rows and each segment's keys that it may see; its
  // scores, before the rules, lie in scores_ by row and key.
  template <class Visit>
  void for_each_group(int64_t i0, int64_t i1, const Visit& visit) {
    for (int64_t s0 = 0; s0 < seq_.len_k; s0 += kSegmentKeys) {
      products_.start(s0);
      for (int64_t t0 = i0; t0 < i1; t0 += kMaskTile) {
        const int64_t t1 = std::min(i1, t0 + kMaskTile);
        rules_.for_each_run(t0, t1, s0, std::min(seq_.len_k, s0 + kSegmentKeys), [&](const Run& run) {
          for (int64_t i = t0; i < t1; i += kGroup) visit_group(run, i, std::min(kGroup, t1 - i), s0, visit);
        });
      }
    }
  }

  template <class Visit>
  void visit_group(const Run& run, int64_t i, int64_t rows, int64_t s0, const Visit& visit) {
    const KeyRange hull = rules_.rows_keys(i, i + rows);
    const int64_t first = std::max(hull.begin, run.begin) - s0, last = std::min(hull.end, run.end) - s0;
    if (first >= last) return;
    const Group g{run, i, rows, s0, first / kLanes<T> * kLanes<T>, round_to_lanes<T>(last)};
    products_.compute(query_block(i), rows, g.begin, g.end, scores_);
    for (int64_t r = 0; r < rows; ++r)
      rules_.apply(run, i + r, s0 + g.begin, g.keys(seq_.len_k), g.end - g.begin,
                   scores_ + r * kSegmentKeys + g.begin, nullptr);
    visit(g);
  }

  Block<T> query_block(int64_t i) const {
    if (query_copy_ != nullptr) return {query_copy_ + (i - first_) * p_.head_dim, p_.head_dim};
    return block_in_place<T>(queries_, i);
  }

  TopLinks<T> links(int64_t i) const {
    const int64_t first = (i - first_) * p_.top_k;
    return {top_scores_ + first, top_keys_ + first, p_.top_k};
  }

  // Whether the row's weights are made of a given lse: of one that makes them as precise as softmax would,
  // within 4 units in the last place. Of an infinite or NaN score it cannot tell which.
  bool uses_lse(int64_t i) const {
    if (!p_.lse_given) return false;
    const T lse = at<T>(p_.lse, i);
    return std::abs(lse) < kLargeLse<T> || lse == -kInfinity<T>;
  }

  // Sets each row's normaliser: from its lse, where that is given and used, else from a walk over the keys.
  void normalise(int64_t i0, int64_t i1) {
    bool walk = false;
    for (int64_t i = i0; i < i1; ++i) walk |= !uses_lse(i);
    if (walk) find_states(i0, i1);
    for (int64_t i = i0; i < i1; ++i) {
      RowStatistics<T>& row = rows_[i - i0];
      row = {};
      if (uses_lse(i))
        row.normaliser = Normaliser<T>::of_lse(at<T>(p_.lse, i));
      else
        row.normaliser = Normaliser<T>::of(states_[i - i0]);
    }
  }

  void find_states(int64_t i0, int64_t i1) {
    const RowState<T> start = p_.sinks == nullptr ? RowState<T>{} : sink_state(sink());
    std::fill(states_, states_ + (i1 - i0), start);
    for_each_group(i0, i1, [&](const Group& g) {
      for (int64_t r = 0; r < g.rows; ++r) {
        RowState<T>& state = states_[g.i + r - i0];
        T* s = scores_ + r * kSegmentKeys + g.begin;
        if (state.max != state.max || add_scores<T>(s, g.end - g.begin, state)) continue;
        hide(g, r, s);
        if (!add_scores<T>(s, g.end - g.begin, state)) state.max = state.sum = kNaN<T>;
      }
    });
  }

  // The scores of keys that row r does not see become -inf: a NaN behind a bias of -inf is still there.
  void hide(const Group& g, int64_t r, T* s) const {
    bool visible[kSegmentKeys];
    const int64_t keys = g.keys(seq_.len_k);
    rules_.mark_visible(g.run, g.i + r, g.j0 + g.begin, keys, visible);
    for (int64_t c = 0; c < keys; ++c) s[c] = visible[c] ? s[c] : -kInfinity<T>;
  }

  void add_row(const Group& g, int64_t r) {
    T *s = scores_ + r * kSegmentKeys + g.begin, *weights = weights_ + r * kSegmentKeys + g.begin;
    RowStatistics<T>& row = rows_[g.i + r - first_];
    const int64_t padded = g.end - g.begin, j0 = g.j0 + g.begin, position = g.i + r + seq_.offset();
    T largest = row.add(s, padded, j0, position, weights);
    if (largest != largest) {
      hide(g, r, s);
      largest = row.add(s, padded, j0, position, weights);
      if (largest != largest) {  // a visible key is NaN
        row.lose();
        for (int64_t c = 0; c < padded; ++c) weights[c] = s[c] == -kInfinity<T> ? T{0} : weights[c];
      }
    }
    if (p_.top_k > 0) links(g.i + r).add(s, padded, j0, largest);
  }

  // What the row's e add up to, with the sink: 1 but for the rounding of lse where that was used.
  T total(int64_t i) const {
    const RowStatistics<T>& row = rows_[i - first_];
    if (!uses_lse(i)) return row.is_empty() ? T{1} : states_[i - first_].sum;
    if (row.is_empty() && row.max == -kInfinity<T>) return T{1};
    const T sum = row.sum + (p_.sinks == nullptr ? T{0} : row.normaliser.weight(sink()));
    if (std::abs(sum - T{1}) > kTolerance<T>) throw_wrong_lse(chunk_.batch, chunk_.head, i, sum);
    return sum;
  }

  // A row's lse, found from its keys, in place of one that was given and not used.
  void store_lse(int64_t i) const {
    const RowState<T>& state = states_[i - first_];
    const T found = state.max == -kInfinity<T> ? state.max : state.max + std::log(state.sum);
    T& lse = at<T>(p_.lse, i);
    if (p_.lse_given) {
      const T tolerance = kTolerance<T> * std::max(T{1}, std::abs(lse) / kLargeLse<T>);
      const bool is_near = std::isfinite(lse) && std::abs(lse - found) <= tolerance;
      const bool is_right = found == found ? is_near : !std::isfinite(lse);
      if (!is_right) throw_wrong_lse(chunk_.batch, chunk_.head, i, std::exp(found - lse));
    }
    lse = found;
  }

  T sink() const { return static_cast<const T*>(p_.sinks)[chunk_.head]; }

  void finish_row(int64_t i) const {
    RowStatistics<T>& row = rows_[i - first_];
    row.finish(total(i));
    const bool lost = row.lost();
    at<T>(p_.entropy, i) = row.entropy;
    at<T>(p_.distance, i) = row.distance;
    store_link(lost, row.normaliser.weight(row.max), row.max_index, &at<T>(p_.max_weight, i),
               &at<int64_t>(p_.max_index, i));
    if (!uses_lse(i)) store_lse(i);
    if (p_.top_k == 0) return;
    const TopLinks<T> top = links(i);
    T* weights = &at<T>(p_.topk_weights, i);
    int64_t* indices = &at<int64_t>(p_.topk_indices, i);
    for (int64_t n = 0; n < p_.top_k; ++n)
      store_link(lost, row.normaliser.weight(top.scores()[n]), top.key(n), weights + n, indices + n);
  }

  // A key of weight 0 is no link.
  static void store_link(bool lost, T weight, int64_t key, T* out, int64_t* index) {
    *out = lost ? kNaN<T> : weight;
    *index = !lost && weight > T{0} ? key : -1;
  }

  template <class E>
  E& at(const Tensor& t, int64_t i) const {
    return static_cast<E*>(t.data)[t.offset(chunk_.batch, chunk_.head, i)];
  }

  const SummaryParams& p_;
  const Chunk& chunk_;
  const Sequence seq_;
  const ScoreRules<T> rules_;
  const Rows queries_;
  SegmentScores<T> products_;
  T *scores_, *weights_;
  const WeightSums<T> sums_;
  RowState<T>* states_;
  RowStatistics<T>* rows_;
  T *query_copy_ = nullptr, *top_scores_ = nullptr;
  int32_t* top_keys_ = nullptr;
  int64_t first_ = 0;  // row of the block
};

}  // namespace fastattn::FASTATTN_ISA

// One task of summary_fwd: the statistics of a chunk of one head's rows.
//
// The rows are taken in blocks of up to 256. A block walks the keys in segments of 256, packs each segment's
// K once, and takes its rows in groups of 12, whose scores and weights stay in L1. Where lse is not given, or
// is so large that rounding took from it, a first walk finds it, but for groups that see keys of one segment
// only: those find it on their one visit.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "isa.h"
#include "row_statistics.h"
#include "score.h"
#include "segment_scores.h"
#include "summary_rows.h"
#include "top_links.h"
#include "weight_sums.h"

namespace fastattn::FASTATTN_ISA {

constexpr int64_t kGroup = 2 * kRows;  // rows whose scores and weights share L1: 12 KB each in float32
constexpr int64_t kBlockRows = 256;    // rows that share a packed segment

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
  Distances<T, kBlockRows> distances;
};

template <class T>
class ChunkRunner {
 public:
  ChunkRunner(const SummaryParams& p, const Chunk& chunk, const PartialSums<T>& partial, WrongLse& wrong,
              Scratch<T>& scratch)
      : p_(p),
        chunk_(chunk),
        seq_(sequence_of(p, chunk.batch)),
        rules_(p, chunk.batch, chunk.head, seq_),
        queries_(p, p.q, chunk.batch, chunk.head, seq_.q_begin),
        results_(p, chunk.batch, chunk.head, wrong),
        products_(p, chunk.batch, chunk.head, seq_, scratch.panels),
        scores_(scratch.scores.ensure(kGroup * kSegmentKeys)),
        weights_(scratch.weights.ensure(kGroup * kSegmentKeys)),
        sums_(p, partial, scratch.columns.ensure(kSegmentKeys)),
        states_(scratch.states.ensure(kBlockRows)),
        rows_(scratch.rows.ensure(kBlockRows)),
        distances_(scratch.distances) {
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
    start_rows(i0, i1);
    if (some_unknown_) {
      for_each_group(
          i0, i1, [&](int64_t i, int64_t rows) { return !is_whole(i, rows); },
          [&](const Group& g) { find_states(g); });
      normalise(i0, i1 - i0);
    }
    int64_t segment = -1;
    for_each_group(
        i0, i1, [](int64_t, int64_t) { return true; },
        [&](const Group& g) {
          if (segment != g.j0) distances_.start(i0 + seq_.offset(), i1 - i0, segment = g.j0);
          const bool is_found = some_unknown_ && is_whole(g.i, g.rows);  // here and now, with its weights
          if (is_found) {
            find_states(g);
            normalise(g.i, g.rows);
          }
          add_group(g, is_found && !some_known(g.i, g.rows));
        });
    for (int64_t i = i0; i < i1; i += kLanes<T>)
      results_.store_rows(i, std::min<int64_t>(kLanes<T>, i1 - i), rows_ + i - i0, is_known_ + i - i0,
                          states_ + i - i0, [&](int64_t r) { return links(i + r); });
  }

  // Rows that have seen nothing, with the normalisers that are known.
  void start_rows(int64_t i0, int64_t i1) {
    first_ = i0;
    some_unknown_ = false;
    const RowState<T> start = p_.sinks == nullptr ? RowState<T>{} : sink_state(results_.sink());
    for (int64_t i = i0; i < i1; ++i) {
      if (query_copy_ != nullptr)
        load_row<T>(queries_(i), p_.dtype, p_.head_dim, T{1}, query_copy_ + (i - i0) * p_.head_dim);
      if (p_.top_k > 0) links(i).clear();
      const bool known = results_.uses_lse(i);
      rows_[i - i0] = {};
      if (known) rows_[i - i0].normaliser = results_.given(i);
      states_[i - i0] = start;
      is_known_[i - i0] = known;
      some_unknown_ |= !known;
    }
  }

  // The normalisers of rows whose states are found now.
  void normalise(int64_t i, int64_t rows) {
    for (int64_t r = i - first_; r < i - first_ + rows; ++r)
      if (!is_known_[r]) rows_[r].normaliser = Normaliser<T>::of(states_[r]);
  }

  // Whether a group of rows is visited once at most: the keys it may see lie in one segment and one run.
  bool is_whole(int64_t i, int64_t rows) const {
    if (p_.block_mask.row_ptr != nullptr) return false;
    const KeyRange hull = rules_.rows_keys(i, i + rows);
    return hull.empty() || hull.begin / kSegmentKeys == (hull.end - 1) / kSegmentKeys;
  }

  // Calls visit(group) for each group of the block's rows for which is_wanted(row, rows), and each segment's
  // keys that it may see; its scores lie in scores_ by row and key.
  template <class IsWanted, class Visit>
  void for_each_group(int64_t i0, int64_t i1, const IsWanted& is_wanted, const Visit& visit) {
    for (int64_t s0 = 0; s0 < seq_.len_k; s0 += kSegmentKeys) {
      products_.start(s0);
      for (int64_t t0 = i0; t0 < i1; t0 += kMaskTile) {
        const int64_t t1 = std::min(i1, t0 + kMaskTile);
        rules_.for_each_run(t0, t1, s0, std::min(seq_.len_k, s0 + kSegmentKeys), [&](const Run& run) {
          for (int64_t i = t0; i < t1; i += kGroup)
            if (is_wanted(i, std::min(kGroup, t1 - i)))
              visit_group(run, i, std::min(kGroup, t1 - i), s0, visit);
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

  // Takes a group's scores into its rows' running maxima and sums; weights get exp(s - maximum).
  void find_states(const Group& g) {
    const int64_t padded = g.end - g.begin;
    for (int64_t r0 = 0; r0 < g.rows; r0 += kLanes<T>) {
      const int64_t rows = std::min<int64_t>(kLanes<T>, g.rows - r0);
      RowState<T>* states = states_ + g.i + r0 - first_;
      RowState<T> before[kLanes<T>];
      T factors[kLanes<T>];
      std::copy(states, states + rows, before);
      softmax_update_lanes<T>(row_of(scores_, g, r0), row_of(weights_, g, r0), kSegmentKeys, rows, padded,
                              states, factors);
      for (int64_t r = 0; r < rows; ++r)
        if (states[r].sum != states[r].sum) find_again(g, r0 + r, before[r], states[r]);
    }
  }

  // The same of one row that has met a NaN, which may be hidden: behind a bias of -inf it is still there.
  void find_again(const Group& g, int64_t r, const RowState<T>& before, RowState<T>& state) {
    T *s = row_of(scores_, g, r), *weights = row_of(weights_, g, r), factors[kLanes<T>];
    hide(g, r, s);
    state = before;
    softmax_update_lanes<T>(s, weights, kSegmentKeys, 1, g.end - g.begin, &state, factors);
    if (state.sum != state.sum) state.max = kNaN<T>;  // a visible one
  }

  // The scores of keys that row r does not see become -inf.
  void hide(const Group& g, int64_t r, T* s) const {
    bool visible[kSegmentKeys];
    const int64_t keys = g.keys(seq_.len_k);
    rules_.mark_visible(g.run, g.i + r, g.j0 + g.begin, keys, visible);
    for (int64_t c = 0; c < keys; ++c) s[c] = visible[c] ? s[c] : -kInfinity<T>;
  }

  static T* row_of(T* tile, const Group& g, int64_t r) { return tile + r * kSegmentKeys + g.begin; }

  bool some_known(int64_t i, int64_t rows) const {
    return std::any_of(is_known_ + i - first_, is_known_ + i - first_ + rows,
                       [](bool known) { return known; });
  }

  // Takes a group's scores, and the weights that are made of them or there already, into all statistics.
  void add_group(const Group& g, bool is_weighed) {
    T factors[kGroup];
    for (int64_t r0 = 0; r0 < g.rows; r0 += kLanes<T>) {
      const int64_t rows = std::min<int64_t>(kLanes<T>, g.rows - r0);
      const SegmentSums<T> sums = is_weighed ? sums_of<false>(g, r0, rows) : sums_of<true>(g, r0, rows);
      for (int64_t r = 0; r < rows; ++r) {
        if (sums.entropy[r] == sums.entropy[r])
          add_row(g, r0 + r, sums, r);
        else
          add_again(g, r0 + r);
        factors[r0 + r] = rows_[g.i + r0 + r - first_].normaliser.factor;
      }
    }
    sums_.add(g.i, g.rows, g.j0, g.begin, g.end, weights_, kSegmentKeys, factors);
  }

  template <bool kWeigh>
  SegmentSums<T> sums_of(const Group& g, int64_t r0, int64_t rows) const {
    const int64_t first = g.i + r0 - first_;
    T shifts[kLanes<T>];
    for (int64_t r = 0; r < rows; ++r) shifts[r] = rows_[first + r].normaliser.shift;
    return SegmentSums<T>::template of<kWeigh>(row_of(scores_, g, r0), row_of(weights_, g, r0), kSegmentKeys,
                                               rows, g.end - g.begin, shifts,
                                               distances_.row(first) + g.begin);
  }

  void add_row(const Group& g, int64_t r, const SegmentSums<T>& sums, int64_t lane) {
    const T* s = row_of(scores_, g, r);
    const int64_t padded = g.end - g.begin, j0 = g.j0 + g.begin;
    const T largest = sums.largest[lane];
    RowStatistics<T>& row = rows_[g.i + r - first_];
    row.add(sums, lane);
    if (largest > row.max) {
      row.max = largest;
      if (p_.top_k == 0) row.max_index = j0 + first_of(s, padded, largest);
    }
    if (p_.top_k > 0) links(g.i + r).add(s, padded, j0, largest);
  }

  // A row of which a weight is NaN, perhaps a hidden one's.
  void add_again(const Group& g, int64_t r) {
    T *s = row_of(scores_, g, r), *weights = row_of(weights_, g, r);
    hide(g, r, s);
    const SegmentSums<T> sums = sums_of<true>(g, r, 1);
    if (sums.entropy[0] == sums.entropy[0]) return add_row(g, r, sums, 0);
    rows_[g.i + r - first_].lose();
    for (int64_t c = 0; c < g.end - g.begin; ++c) weights[c] = s[c] == -kInfinity<T> ? T{0} : weights[c];
  }

  const SummaryParams& p_;
  const Chunk& chunk_;
  const Sequence seq_;
  const ScoreRules<T> rules_;
  const Rows queries_;
  const RowResults<T> results_;
  SegmentScores<T> products_;
  T *scores_, *weights_;
  const WeightSums<T> sums_;
  RowState<T>* states_;
  RowStatistics<T>* rows_;
  Distances<T, kBlockRows>& distances_;
  T *query_copy_ = nullptr, *top_scores_ = nullptr;
  int32_t* top_keys_ = nullptr;
  int64_t first_ = 0;          // row of the block
  bool is_known_[kBlockRows];  // whether the row's normaliser is a given lse
  bool some_unknown_ = false;
};

}  // namespace fastattn::FASTATTN_ISA

// Statistics of the weights P = exp(S - lse), with S = rules(scale * Q K^T): entropy, distance and the
// largest weights of each row, what each key receives, and a pooled grid. P is never stored beyond one small
// tile.
//
// A task is a chunk of one head's rows, taken in blocks of up to 256. A block walks the keys in segments of
// 256, packs each segment's K once, and takes its rows in groups of 12, whose scores and weights stay in L1.
// Where lse is not given, or is so large that rounding took from it, a first walk finds it.
// docs/kernels/summary.md derives the steps and the sizes.
#include <algorithm>

#include "../errors.h"
#include "../parallel.h"
#include "buffer.h"
#include "isa.h"
#include "row_statistics.h"
#include "score.h"
#include "segment_scores.h"
#include "weight_sums.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kGroup = 2 * kRows;  // rows whose scores and weights share L1: 12 KB each in float32
constexpr int64_t kBlockRows = 256;    // rows that share a packed segment
constexpr int64_t kMaxChunks = 16;
constexpr int64_t kMinChunkRows = 128;
constexpr int64_t kPartialBytes = 32 << 20;  // of partial sums at a time, where there are several heads

// Rows [begin, end) of one head; where its partial sums lie in the buffers of a wave.
struct Chunk {
  int64_t batch, head, begin, end;
  int64_t received, pooled;
  int64_t first_pool_row, pool_rows;
};

// How a head's rows are cut: by their number alone.
struct Cut {
  int64_t rows, count;

  explicit Cut(int64_t seqlen_q) {
    const int64_t chunks = std::clamp<int64_t>(seqlen_q / kMinChunkRows, 1, kMaxChunks);
    const int64_t tiles = (seqlen_q + kMaskTile - 1) / kMaskTile;
    rows = (tiles + chunks - 1) / chunks * kMaskTile;
    count = (seqlen_q + rows - 1) / rows;
  }
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

  T row_lse(int64_t i) const { return at<T>(p_.lse, i); }

  // Whether the row's given lse makes weights as precise as softmax would: within 4 units in the last place.
  bool is_usable(int64_t i) const {
    constexpr T kLargeLse = static_cast<T>(16);
    const T size = std::abs(row_lse(i));
    return size < kLargeLse || !(size < kInfinity<T>);
  }

  // Sets each row's normaliser: from its lse, where that is given and usable, else from a walk over the keys.
  void normalise(int64_t i0, int64_t i1) {
    bool walk = false;
    for (int64_t i = i0; i < i1; ++i) walk |= !(p_.lse_given && is_usable(i));
    if (walk) find_states(i0, i1);
    for (int64_t i = i0; i < i1; ++i) {
      RowStatistics<T>& row = rows_[i - i0];
      row = {};
      if (p_.lse_given && is_usable(i))
        row.normaliser = Normaliser<T>::of_lse(row_lse(i));
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
      if (largest != largest) {  // a visible key is NaN, or the row's lse
        row.lose();
        for (int64_t c = 0; c < padded; ++c) weights[c] = s[c] == -kInfinity<T> ? T{0} : weights[c];
      }
    }
    if (p_.top_k > 0 && largest > -kInfinity<T>) links(g.i + r).add(s, padded, j0);
  }

  // What the row's e add up to, with the sink: 1 but for the rounding of lse where that was used.
  T total(int64_t i) const {
    constexpr T kTolerance = static_cast<T>(0.05);  // far from any rounding, but not from another mask
    const RowStatistics<T>& row = rows_[i - first_];
    if (!(p_.lse_given && is_usable(i))) return row.is_empty() ? T{1} : states_[i - first_].sum;
    if (row.is_empty() && row.max == -kInfinity<T>) return T{1};
    const T sum = row.sum + (p_.sinks == nullptr ? T{0} : row.normaliser.weight(sink()));
    if (std::abs(sum - T{1}) > kTolerance) throw_wrong_lse(chunk_.batch, chunk_.head, i, sum);
    return sum;
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
    if (!p_.lse_given) at<T>(p_.lse, i) = lse_of(states_[i - first_]);
    if (p_.top_k == 0) return;
    const TopLinks<T> top = links(i);
    T* weights = &at<T>(p_.topk_weights, i);
    int64_t* indices = &at<int64_t>(p_.topk_indices, i);
    for (int64_t n = 0; n < p_.top_k; ++n)
      store_link(lost, row.normaliser.weight(top.score(n)), top.key(n), weights + n, indices + n);
  }

  static T lse_of(const RowState<T>& state) {
    return state.max == -kInfinity<T> ? state.max : state.max + std::log(state.sum);
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

// Heads go in waves whose partial sums fit in kPartialBytes; at least one head a wave.
template <class T>
class Summary {
 public:
  explicit Summary(const SummaryParams& p) : p_(p), cut_(p.seqlen_q), width_(round_to_lanes<T>(p.seqlen_k)) {}

  void run() {
    const int64_t bytes = cut_.count * width_ * static_cast<int64_t>(sizeof(T)) +
                          (p_.pool_rows + cut_.count) * p_.pool_cols * static_cast<int64_t>(sizeof(double));
    const int64_t heads = p_.batch * p_.num_heads;
    const int64_t together = std::clamp<int64_t>(kPartialBytes / bytes, 1, heads);
    for (int64_t first = 0; first < heads; first += together)
      run_wave(first, std::min(heads, first + together));
  }

 private:
  void run_wave(int64_t first, int64_t last) {
    const Vector<Chunk> chunks = plan(first, last);
    // Last rows first: under a causal mask they have the most keys, and the shortest tasks should end the
    // run.
    const int64_t count = static_cast<int64_t>(chunks.size());
    parallel_tasks(p_.num_threads, count, [&](int, int64_t n) { run_chunk(chunks[count - 1 - n]); });
    parallel_tasks(p_.num_threads, last - first,
                   [&](int, int64_t n) { add_partials(&chunks[n * cut_.count]); });
  }

  // Chunks lie in ascending order of heads, then rows.
  Vector<Chunk> plan(int64_t first, int64_t last) {
    Vector<Chunk> chunks;
    int64_t cells = 0;
    for (int64_t head = first; head < last; ++head)
      for (int64_t n = 0; n < cut_.count; ++n) {
        Chunk c{head / p_.num_heads,
                head % p_.num_heads,
                n * cut_.rows,
                std::min(p_.seqlen_q, (n + 1) * cut_.rows),
                static_cast<int64_t>(chunks.size()) * width_,
                cells,
                0,
                0};
        if (p_.pooled.data != nullptr) {
          c.first_pool_row = cell_of(c.begin, p_.pool_rows, p_.seqlen_q);
          c.pool_rows = cell_of(c.end - 1, p_.pool_rows, p_.seqlen_q) + 1 - c.first_pool_row;
          cells += c.pool_rows * p_.pool_cols;
        }
        chunks.push_back(c);
      }
    received_.ensure(static_cast<int64_t>(chunks.size()) * width_);
    pooled_.ensure(cells);
    return chunks;
  }

  void run_chunk(const Chunk& c) {
    static thread_local Scratch<T> scratch;
    const PartialSums<T> partial{received_.data() + c.received, pooled_.data() + c.pooled, c.first_pool_row};
    std::fill(partial.received, partial.received + width_, T{0});
    std::fill(partial.pooled, partial.pooled + c.pool_rows * p_.pool_cols, 0.0);
    ChunkRunner<T>(p_, c, partial, scratch).run();
  }

  // Adds up one head's partial sums, in ascending order of its chunks.
  void add_partials(const Chunk* chunks) {
    T* received = static_cast<T*>(p_.received.data) + p_.received.offset(chunks->batch, chunks->head, 0);
    const T* parts = received_.data() + chunks->received;
    for (int64_t j = 0; j < p_.seqlen_k; ++j) {
      double sum = 0;
      for (int64_t n = 0; n < cut_.count; ++n) sum += static_cast<double>(parts[n * width_ + j]);
      received[j] = static_cast<T>(sum);
    }
    if (p_.pooled.data != nullptr) add_pooled(chunks);
  }

  void add_pooled(const Chunk* chunks) {
    Vector<double> cells(p_.pool_rows * p_.pool_cols, 0.0);
    for (const Chunk* c = chunks; c < chunks + cut_.count; ++c) {
      double* row = cells.data() + c->first_pool_row * p_.pool_cols;
      const double* part = pooled_.data() + c->pooled;
      for (int64_t n = 0; n < c->pool_rows * p_.pool_cols; ++n)
        row[n] = p_.pool_mode == PoolMode::kMax ? max_or_nan(row[n], part[n]) : row[n] + part[n];
    }
    T* out = static_cast<T*>(p_.pooled.data) + p_.pooled.offset(chunks->batch, chunks->head, 0);
    for (int64_t r = 0; r < p_.pool_rows; ++r)
      for (int64_t c = 0; c < p_.pool_cols; ++c) {
        const double pairs = p_.pool_mode == PoolMode::kMean
                                 ? static_cast<double>(size_of(r, p_.pool_rows, p_.seqlen_q) *
                                                       size_of(c, p_.pool_cols, p_.seqlen_k))
                                 : 1.0;
        out[r * p_.pooled.row + c] = static_cast<T>(cells[r * p_.pool_cols + c] / pairs);
      }
  }

  static int64_t size_of(int64_t cell, int64_t count, int64_t length) {
    return cell_begin(cell + 1, count, length) - cell_begin(cell, count, length);
  }

  const SummaryParams& p_;
  const Cut cut_;
  const int64_t width_;
  Buffer<T> received_;
  Buffer<double> pooled_;
};

}  // namespace

void summary_fwd(const SummaryParams& p) {
  if (p.dtype == DType::kFloat64)
    Summary<double>(p).run();
  else
    Summary<float>(p).run();
}

}  // namespace fastattn::FASTATTN_ISA

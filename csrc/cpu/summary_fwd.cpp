// Statistics of the weights P = exp(S - lse), with S = rules(scale * Q K^T): entropy, distance and the
// largest weights of each row, what each key receives, and a pooled grid. P is never stored beyond one small
// tile.
//
// A task is a chunk of one head's rows (summary_chunk.h), with partial sums over its rows; here chunks are
// planned, and their sums added up. docs/kernels/summary.md derives the steps and the sizes.
#include <algorithm>
#include <atomic>

#include "../parallel.h"
#include "buffer.h"
#include "isa.h"
#include "summary_chunk.h"
#include "weight_sums.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kMaxChunks = 16;
constexpr int64_t kMinChunkRows =
    256;  // heads of 256 to 511 rows form two all the same: more tasks than heads
constexpr int64_t kPartialBytes = 32 << 20;  // of partial sums at a time, where there are several heads

// How a head's rows are cut: by their number alone.
struct Cut {
  int64_t rows, count;

  explicit Cut(int64_t seqlen_q) {
    const int64_t least = seqlen_q < kMinChunkRows ? 1 : 2;
    const int64_t chunks = std::clamp<int64_t>(seqlen_q / kMinChunkRows, least, kMaxChunks);
    const int64_t tiles = (seqlen_q + kMaskTile - 1) / kMaskTile;
    rows = (tiles + chunks - 1) / chunks * kMaskTile;
    count = (seqlen_q + rows - 1) / rows;
  }
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
    const int64_t heads = last - first;
    Vector<std::atomic<int64_t>> done(static_cast<size_t>(heads));  // chunks of each head
    // Last rows first: under a causal mask they have the most keys, and the shortest tasks should end the
    // run. Whoever ends a head's last task adds up its sums: waking the threads again would take longer.
    parallel_tasks(p_.num_threads, heads * cut_.count, [&](int, int64_t n) {
      const int64_t head = n % heads;
      const Chunk* of_head = &chunks[head * cut_.count];
      run_chunk(of_head[cut_.count - 1 - n / heads]);
      if (done[static_cast<size_t>(head)].fetch_add(1, std::memory_order_acq_rel) == cut_.count - 1)
        add_partials(of_head);
    });
    wrong_.throw_if_any();
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
    ChunkRunner<T>(p_, c, partial, wrong_, scratch).run();
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
  WrongLse wrong_;
};

}  // namespace

void summary_fwd(const SummaryParams& p) {
  if (p.dtype == DType::kFloat64)
    Summary<double>(p).run();
  else
    Summary<float>(p).run();
}

}  // namespace fastattn::FASTATTN_ISA

// Gradients of biases: dS summed over whatever the bias is broadcast along, in an order of its own.
//
// A second pass over the tiles, which recomputes dS: only calls whose bias needs a gradient pay for it, and
// the main pass stays free to run in any order. A task owns a range of query rows of one (batch, head) of the
// bias and adds up the calls that share it in ascending order. Where rows share elements too (a bias
// broadcast along queries, or one by relative position), each range has its own partial result.
#include <algorithm>

#include "../parallel.h"
#include "isa.h"
#include "score_gradient.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kRanges = 8;

template <class Sum>
struct Target {
  Sum* data;
  int64_t row, col;  // strides; row is 0 where rows share elements
};

template <class T>
class BiasPass {
 public:
  // `out` is dbias or ddiag.
  BiasPass(const AttentionBackwardParams& p, const RowGradients<T>& rows, const Tensor& out, bool diagonal)
      : p_(p), rows_(rows), out_(out), diagonal_(diagonal) {
    batches_ = out.batch == 0 ? 1 : p.batch;
    heads_ = out.head == 0 ? 1 : p.num_heads;
    shared_rows_ = diagonal || out.row == 0;
    shared_size_ = diagonal ? p.num_diagonals : out.col == 0 ? 1 : p.seqlen_k;
  }

  void run() {
    const int64_t tasks = batches_ * heads_ * kRanges;
    if (shared_rows_) {
      partial_.ensure(tasks * shared_size_);
      std::fill(partial_.data(), partial_.data() + tasks * shared_size_, 0.0);
    }
    parallel_tasks(p_.num_threads, tasks, [&](int, int64_t n) { run_task(n); });
    if (!shared_rows_) return;
    parallel_tasks(p_.num_threads, batches_ * heads_, [&](int, int64_t n) {
      T* out = out_base(n / heads_, n % heads_);
      for (int64_t c = 0; c < shared_size_; ++c) {
        double sum = 0;
        for (int64_t range = 0; range < kRanges; ++range)
          sum += partial_.data()[(n * kRanges + range) * shared_size_ + c];
        out[c * (diagonal_ ? 1 : out_.col)] = static_cast<T>(sum);
      }
    });
  }

 private:
  T* out_base(int64_t b, int64_t h) const { return static_cast<T*>(out_.data) + out_.offset(b, h, 0); }

  void run_task(int64_t n) {
    const int64_t range = n % kRanges, bh = n / kRanges;
    const int64_t b_out = bh / heads_, h_out = bh % heads_;
    const Target<T> own{out_base(b_out, h_out), out_.row, out_.col};
    const Target<double> shared{partial_.data() + n * shared_size_, 0, out_.col != 0 || diagonal_ ? 1 : 0};
    for (int64_t b = batches_ == 1 ? 0 : b_out; b < (batches_ == 1 ? p_.batch : b_out + 1); ++b)
      for (int64_t h = heads_ == 1 ? 0 : h_out; h < (heads_ == 1 ? p_.num_heads : h_out + 1); ++h) {
        if (shared_rows_)
          add(b, h, range, shared);
        else
          add(b, h, range, own);
      }
  }

  template <class Sum>
  void add(int64_t b, int64_t h, int64_t range, const Target<Sum>& target) {
    static thread_local GradScratch<T> scratch;
    GradTile<T> tile(p_, rows_, b, h, scratch);
    const Sequence& seq = tile.sequence();
    // A sequence is cut by its own length: how its sums are grouped must not depend on the others.
    const int64_t tiles = (seq.len_q + kMaskTile - 1) / kMaskTile;
    const int64_t range_rows = (tiles + kRanges - 1) / kRanges * kMaskTile;
    const int64_t row_begin = range * range_rows, row_end = row_begin + range_rows;
    for (int64_t j0 = 0; j0 < seq.len_k; j0 += kKeyTile) {
      const int64_t j1 = std::min(seq.len_k, j0 + kKeyTile);
      bool loaded = false;
      tile.rules().for_each_query_tile(j0, j1, [&](int64_t query_tile, const int32_t* tile_bits) {
        const int64_t i0 = query_tile * kMaskTile, i1 = std::min(seq.len_q, i0 + kMaskTile);
        if (i0 < row_begin || i0 >= row_end) return;
        for (int64_t i = i0; i < i1; i += kGradGroup) {
          const int64_t rows = std::min(kGradGroup, i1 - i);
          if (tile.rules().rows_keys(i, i + rows).empty()) continue;
          if (!loaded) tile.load_keys(j0, j1);
          loaded = true;
          const KeyRange columns = tile.columns(i, rows);
          if (columns.empty()) continue;
          tile.load_queries(i, i + rows);
          tile.compute(tile_bits, i, rows, columns, true);
          for (int64_t r = 0; r < rows; ++r)
            add_row(tile, i + r, j0, columns, tile.gradients() + r * kKeyTile, target);
        }
      });
    }
  }

  // Masked pairs have dS = 0, unless an operand is not finite: then they are left out by what they are.
  template <class Sum>
  void add_row(const GradTile<T>& tile, int64_t i, int64_t j0, const KeyRange& columns, const T* ds,
               const Target<Sum>& target) {
    const Sequence& seq = tile.sequence();
    const int64_t end = std::min(columns.end, seq.len_k - j0);
    const int64_t first = diagonal_ ? tile.rules().diagonal_of(i, j0) : i * target.row + j0 * target.col;
    Sum* out = target.data + first;
    for (int64_t c = columns.begin; c < end; ++c) {
      if (ds[c] == T{0} || (!(ds[c] - ds[c] == T{0}) && !tile.rules().visible(i, j0 + c))) continue;
      out[c * target.col] += static_cast<Sum>(ds[c]);
    }
  }

  const AttentionBackwardParams& p_;
  const RowGradients<T>& rows_;
  const Tensor& out_;
  const bool diagonal_;
  int64_t batches_, heads_, shared_size_;
  bool shared_rows_;
  Buffer<double>
      partial_;  // sums of many rows: thousands of terms in one order, more than float32 has bits for
};

}  // namespace

template <class T>
void bias_gradients(const AttentionBackwardParams& p, const RowGradients<T>& rows) {
  if (p.dbias.data != nullptr) BiasPass<T>(p, rows, p.dbias, false).run();
  if (p.ddiag.data != nullptr) BiasPass<T>(p, rows, p.ddiag, true).run();
}

template void bias_gradients<float>(const AttentionBackwardParams&, const RowGradients<float>&);
template void bias_gradients<double>(const AttentionBackwardParams&, const RowGradients<double>&);

}  // namespace fastattn::FASTATTN_ISA

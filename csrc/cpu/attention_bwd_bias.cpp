// Gradients of biases: dS summed over whatever the bias is broadcast along, in an order of its own.
//
// A second pass over the tiles, which recomputes dS: only calls whose bias needs a gradient pay for it, and
// the main pass stays free to run in any order. A task owns a range of rows of one (batch, head) of the bias,
// or of keys where rows share elements, and adds up the calls that share it in ascending order, in double:
// thousands of terms in one chain are more than float32 has bits for. Where a range owns no element alone
// (one value for a whole head, or one per diagonal), each has its own partial sums.
#include <algorithm>

#include "../parallel.h"
#include "isa.h"
#include "score_gradient.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kRanges = 8;

// What a pair (i, j) shares its element with.
enum class Form { kElements, kRows, kColumns, kOne, kDiagonals };

Form form_of(const Tensor& out, bool diagonal) {
  if (diagonal) return Form::kDiagonals;
  if (out.row == 0) return out.col == 0 ? Form::kOne : Form::kColumns;
  return out.col == 0 ? Form::kRows : Form::kElements;
}

// Where a task adds up: the sum of pair (i, j) is data[origin + i * row + j * col].
struct Sums {
  double* data;
  int64_t origin, row, col;
};

template <class T>
class BiasPass {
 public:
  // `out` is dbias or ddiag.
  BiasPass(const AttentionBackwardParams& p, const RowGradients<T>& rows, const Tensor& out, bool diagonal)
      : p_(p),
        rows_(rows),
        out_(out),
        form_(form_of(out, diagonal)),
        partial_form_(form_ == Form::kOne || form_ == Form::kDiagonals),
        batches_(out.batch == 0 ? 1 : p.batch),
        heads_(out.head == 0 ? 1 : p.num_heads),
        range_rows_(range_of(p.seqlen_q)),
        range_keys_(range_of(p.seqlen_k)) {
    const int64_t sizes[] = {range_rows_ * kKeyTile, range_rows_, kKeyTile, 1, p.num_diagonals};
    size_ = sizes[static_cast<int>(form_)];
  }

  void run() {
    const int64_t tasks = batches_ * heads_ * kRanges;
    if (partial_form_) partial_.ensure(tasks * size_);
    parallel_tasks(p_.num_threads, tasks, [&](int, int64_t n) { run_task(n); });
    if (partial_form_)
      parallel_tasks(p_.num_threads, batches_ * heads_, [&](int, int64_t n) { add_partials(n); });
  }

 private:
  // Rows or keys per range, in whole tiles.
  static int64_t range_of(int64_t length) {
    const int64_t tiles = (length + kMaskTile - 1) / kMaskTile;
    return (tiles + kRanges - 1) / kRanges * kMaskTile;
  }

  T* out_base(int64_t b, int64_t h) const { return static_cast<T*>(out_.data) + out_.offset(b, h, 0); }

  void run_task(int64_t n) {
    static thread_local Buffer<double> own;
    const int64_t range = n % kRanges, b_out = n / kRanges / heads_, h_out = n / kRanges % heads_;
    double* sums = partial_form_ ? partial_.data() + n * size_ : own.ensure(size_);
    std::fill(sums, sums + size_, 0.0);
    KeyRange keys{0, p_.seqlen_k};
    if (form_ == Form::kColumns)
      keys = {range * range_keys_, std::min(p_.seqlen_k, (range + 1) * range_keys_)};
    for (int64_t j0 = keys.begin; j0 < keys.end; j0 += kKeyTile) {
      for (int64_t b = batches_ == 1 ? 0 : b_out; b < (batches_ == 1 ? p_.batch : b_out + 1); ++b)
        for (int64_t h = heads_ == 1 ? 0 : h_out; h < (heads_ == 1 ? p_.num_heads : h_out + 1); ++h)
          add(b, h, range, j0, sums);
      if (form_ != Form::kElements && form_ != Form::kColumns) continue;
      store(out_base(b_out, h_out), range, j0, sums);
      std::fill(sums, sums + size_, 0.0);
    }
    if (form_ == Form::kRows) store(out_base(b_out, h_out), range, 0, sums);
  }

  // Adds dS of one call with the tile of keys at j0.
  void add(int64_t b, int64_t h, int64_t range, int64_t j0, double* sums) {
    static thread_local GradScratch<T> scratch;
    const Sequence seq = sequence_of(p_, b);
    if (j0 >= seq.len_k) return;
    const int64_t j1 = std::min(seq.len_k, j0 + kKeyTile);
    // A sequence is cut by its own length: how its sums are grouped must not depend on the others.
    KeyRange range_rows{range * range_of(seq.len_q), (range + 1) * range_of(seq.len_q)};
    if (form_ == Form::kColumns) range_rows = {0, seq.len_q};
    GradTile<T> tile(p_, rows_, b, h, scratch);
    const Sums target = place(tile.rules(), range_rows.begin, j0, sums);
    bool loaded = false;
    tile.rules().for_each_query_tile(j0, j1, [&](int64_t query_tile, const int32_t* tile_bits) {
      const int64_t i0 = query_tile * kMaskTile, i1 = std::min(seq.len_q, i0 + kMaskTile);
      if (i0 < range_rows.begin || i0 >= range_rows.end) return;
      const KeyRange hull = tile.rules().rows_keys(i0, i1);
      if (std::max(hull.begin, j0) >= std::min(hull.end, j1)) return;
      if (!loaded) {
        tile.set_keys(j0, j1);
        tile.pack_keys();
      }
      loaded = true;
      tile.load_queries(i0, i1);
      for (int64_t i = i0; i < i1; i += kGradGroup) {
        const int64_t rows = std::min(kGradGroup, i1 - i);
        const KeyRange columns = tile.columns(i, rows);
        if (columns.empty()) continue;
        tile.compute(tile_bits, i, rows, columns, true);
        for (int64_t r = i; r < i + rows; ++r)
          add_row(tile, {j0, j1, tile_bits}, r, columns, tile.gradients() + (r - i0) * kKeyTile, target);
      }
    });
  }

  Sums place(const ScoreRules<T>& rules, int64_t row_begin, int64_t j0, double* sums) const {
    switch (form_) {
      case Form::kElements:
        return {sums, -row_begin * kKeyTile - j0, kKeyTile, 1};
      case Form::kRows:
        return {sums, -row_begin, 1, 0};
      case Form::kColumns:
        return {sums, -j0, 0, 1};
      case Form::kOne:
        return {sums, 0, 0, 0};
      default:
        return {sums, rules.diagonal_of(0, 0), -1, 1};
    }
  }

  // Masked pairs have dS = 0, unless an operand is not finite: then they are left out by what they are.
  void add_row(const GradTile<T>& tile, const Run& run, int64_t i, const KeyRange& columns, const T* ds,
               const Sums& target) {
    bool visible[kKeyTile];
    const bool finite = all_finite(ds, kKeyTile);
    if (!finite)
      tile.rules().mark_visible(run, i, run.begin + columns.begin, columns.end - columns.begin,
                                visible + columns.begin);
    double* out = target.data + (target.origin + i * target.row + run.begin * target.col);
    for (int64_t c = columns.begin; c < columns.end; ++c)
      if (ds[c] != T{0} && (finite || visible[c])) out[c * target.col] += static_cast<double>(ds[c]);
  }

  // Writes what the task alone owns: a tile of elements, a range of rows, or a tile of columns.
  void store(T* out, int64_t range, int64_t j0, const double* sums) const {
    const int64_t i0 = form_ == Form::kColumns ? 0 : range * range_rows_;
    const int64_t rows = form_ == Form::kColumns ? 1 : std::min(p_.seqlen_q - i0, range_rows_);
    const int64_t columns = form_ == Form::kRows ? 1 : std::min(p_.seqlen_k - j0, kKeyTile);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c)
        out[(i0 + r) * out_.row + (j0 + c) * out_.col] = static_cast<T>(sums[r * columns_apart() + c]);
  }

  int64_t columns_apart() const { return form_ == Form::kRows ? 1 : kKeyTile; }

  void add_partials(int64_t n) {
    T* out = out_base(n / heads_, n % heads_);
    for (int64_t c = 0; c < size_; ++c) {
      double sum = 0;
      for (int64_t range = 0; range < kRanges; ++range)
        sum += partial_.data()[(n * kRanges + range) * size_ + c];
      out[c] = static_cast<T>(sum);
    }
  }

  const AttentionBackwardParams& p_;
  const RowGradients<T>& rows_;
  const Tensor& out_;
  const Form form_;
  const bool partial_form_;
  const int64_t batches_, heads_, range_rows_, range_keys_;
  int64_t size_;  // of a task's sums
  Buffer<double> partial_;
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

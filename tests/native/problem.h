// One attention problem: sizes and options (Case), and its numbers (Problem), as the kernels take them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "block_lists.h"
#include "params.h"

namespace smoke {

using fastattn::DType;
using fastattn::Score;
using fastattn::Tensor;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

enum class Mask { kNone, kBool, kRanges, kBlocks };
enum class Bias {
  kNone,
  kMatrix,
  kKeys,
  kRows,
  kOne,
  kDiagonals
};  // per head; kKeys and kRows for all heads

struct Case {
  const char* name;
  int64_t batch, num_heads, num_heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v;
  int64_t lo = -fastattn::kUnbounded, hi = fastattn::kUnbounded;  // band, aligned bottom right
  double softcap = 0;
  bool has_sinks = false;
  int num_threads = 1;
  Score score = Score::kDot;
  Mask mask = Mask::kNone;
  Bias bias = Bias::kNone;
  double dropout_p = 0;
  std::vector<int32_t> lengths_q = {}, lengths_k = {};  // of packed sequences; of a cache, lengths_k alone
  int64_t page_size = 0;                                // of a paged cache

  bool packed() const { return !lengths_q.empty(); }
  bool cached() const { return lengths_q.empty() && !lengths_k.empty(); }
  int64_t len_q(int64_t b) const { return packed() ? lengths_q[b] : seqlen_q; }
  int64_t len_k(int64_t b) const { return lengths_k.empty() ? seqlen_k : lengths_k[b]; }
};

// The numbers that a kernel reads as bfloat16.
struct BFloat16 {
  uint16_t bits = 0;

  BFloat16() = default;
  explicit BFloat16(double x) {
    const float f = static_cast<float>(x);
    uint32_t word;
    std::memcpy(&word, &f, sizeof word);
    bits = static_cast<uint16_t>(word >> 16);
  }
  operator double() const {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float f;
    std::memcpy(&f, &word, sizeof f);
    return f;
  }
};

// What kernels sum T in.
template <typename T>
struct Accumulator {
  using type = T;
};
template <>
struct Accumulator<BFloat16> {
  using type = float;
};

// Contiguous [batch, heads, rows, cols].
template <typename T>
struct Array {
  int64_t heads = 0, rows = 0, cols = 0;
  std::vector<T> data;

  Array() = default;
  Array(int64_t batch, int64_t num_heads, int64_t num_rows, int64_t num_cols)
      : heads(num_heads), rows(num_rows), cols(num_cols), data(batch * num_heads * num_rows * num_cols) {}

  int64_t index(int64_t b, int64_t h, int64_t i, int64_t c) const {
    return ((b * heads + h) * rows + i) * cols + c;
  }
  T& at(int64_t b, int64_t h, int64_t i, int64_t c) { return data[index(b, h, i, c)]; }
  const T& at(int64_t b, int64_t h, int64_t i, int64_t c) const { return data[index(b, h, i, c)]; }
  Tensor view() { return {data.data(), heads * rows * cols, rows * cols, cols, 1}; }
};

template <typename T>
struct Problem {
  using A = typename Accumulator<T>::type;

  const Case& c;
  std::vector<int32_t> cu_q, cu_k, table;
  Array<T> q, k, v, out, dout, dq, dk, dv;
  Array<A> lse, dlse, sinks, dsinks, w, dw, bias, dbias;
  Array<uint8_t> visible;  // [B, Hq, Lq, Lk] by the mask alone, without the band and the lengths
  Array<int32_t> starts, ends;
  Array<A> weights, scores;  // [B, Hq, Lq, Lk], of the definition alone: after dropout; -inf where hidden
  BlockLists blocks;
  int64_t seed = 0x0123456789abcdef;

  explicit Problem(const Case& problem) : c(problem) {
    allocate();
    std::mt19937 random(7);
    std::normal_distribution<double> normal;
    // Numbers that every type holds: one definition serves them all.
    for (Array<T>* array : {&q, &k, &v, &dout})
      for (T& x : array->data) x = T(BFloat16(normal(random)));
    for (Array<A>* array : {&dlse, &sinks, &w, &bias})
      for (A& x : array->data) x = static_cast<A>(BFloat16(normal(random)));
    make_mask(random);
  }

  // Row i of batch entry b, as a row of q, and its entry there.
  int64_t entry(int64_t b) const { return c.packed() ? 0 : b; }
  int64_t row_q(int64_t b, int64_t i) const { return c.packed() ? cu_q[b] + i : i; }
  // The element of k and v that holds column d of key j.
  int64_t key_entry(int64_t b, int64_t j) const {
    return c.page_size > 0 ? table[b * pages() + j / c.page_size] : entry(b);
  }
  int64_t row_k(int64_t b, int64_t j) const {
    return c.page_size > 0 ? j % c.page_size : c.packed() ? cu_k[b] + j : j;
  }

  bool sees(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const int64_t position = i + c.len_k(b) - c.len_q(b);
    return j >= position + c.lo && j <= position + c.hi && visible.at(b, h, i, j) != 0;
  }

  int64_t bias_index(int64_t b, int64_t h, int64_t i, int64_t j) const {
    switch (c.bias) {
      case Bias::kMatrix:
        return bias.index(0, h, i, j);
      case Bias::kKeys:
        return bias.index(0, 0, 0, j);
      case Bias::kRows:
        return bias.index(0, 0, i, 0);
      case Bias::kOne:
        return bias.index(0, h, 0, 0);
      default:  // relative positions from 1 - Lk
        return bias.index(0, h, 0, j - i - (c.len_k(b) - c.len_q(b)) + c.seqlen_k - 1);
    }
  }

  fastattn::AttentionBackwardParams params() {
    fastattn::AttentionBackwardParams p;
    p.dtype = sizeof(T) == 8 ? DType::kFloat64 : sizeof(T) == 4 ? DType::kFloat32 : DType::kBFloat16;
    p.num_threads = c.num_threads;
    p.batch = c.batch;
    p.num_heads = c.num_heads;
    p.num_heads_kv = c.num_heads_kv;
    p.seqlen_q = c.seqlen_q;
    p.seqlen_k = c.page_size > 0 ? c.page_size : c.seqlen_k;
    p.head_dim = c.head_dim;
    p.head_dim_v = c.head_dim_v;
    p.score = c.score;
    p.scale = c.score == Score::kDot ? 1 / std::sqrt(static_cast<double>(c.head_dim)) : 1.0;
    p.softcap = c.softcap;
    p.band.lo_bottom = c.lo;
    p.band.hi_bottom = c.hi;
    set_tensors(p);
    set_options(p);
    return p;
  }

 private:
  int64_t pages() const { return (c.seqlen_k + c.page_size - 1) / c.page_size; }

  void allocate() {
    cu_q = {0};
    cu_k = {0};
    for (size_t b = 0; c.packed() && b < c.lengths_q.size(); ++b) {
      cu_q.push_back(cu_q.back() + c.lengths_q[b]);
      cu_k.push_back(cu_k.back() + c.lengths_k[b]);
    }
    int64_t entries = c.packed() ? 1 : c.batch, rows_q = c.packed() ? cu_q.back() : c.seqlen_q;
    int64_t entries_k = entries, rows_k = c.packed() ? cu_k.back() : c.seqlen_k;
    if (c.page_size > 0) {
      entries_k = c.batch * pages();
      rows_k = c.page_size;
      for (int64_t n = 0; n < entries_k; ++n) table.push_back(static_cast<int32_t>(entries_k - 1 - n));
    }
    q = dq = Array<T>(entries, c.num_heads, rows_q, c.head_dim);
    k = dk = Array<T>(entries_k, c.num_heads_kv, rows_k, c.head_dim);
    v = dv = Array<T>(entries_k, c.num_heads_kv, rows_k, c.head_dim_v);
    out = dout = Array<T>(entries, c.num_heads, rows_q, c.head_dim_v);
    lse = dlse = Array<A>(entries, c.num_heads, rows_q, 1);
    sinks = dsinks = Array<A>(1, c.num_heads, 1, 1);
    w = dw = Array<A>(1, 1, 1, c.head_dim);
    visible = Array<uint8_t>(c.batch, c.num_heads, c.seqlen_q, c.seqlen_k);
    starts = ends = Array<int32_t>(c.batch, 1, c.seqlen_q, 1);
    const int64_t lq = c.seqlen_q, lk = c.seqlen_k;
    if (c.bias == Bias::kMatrix) bias = Array<A>(1, c.num_heads, lq, lk);
    if (c.bias == Bias::kKeys) bias = Array<A>(1, 1, 1, lk);
    if (c.bias == Bias::kRows) bias = Array<A>(1, 1, lq, 1);
    if (c.bias == Bias::kOne) bias = Array<A>(1, c.num_heads, 1, 1);
    if (c.bias == Bias::kDiagonals) bias = Array<A>(1, c.num_heads, 1, lq + lk);
    dbias = bias;
    // What a kernel fails to overwrite shows; sums that it adds to begin at 0.
    for (Array<T>* array : {&out, &dq, &dk, &dv})
      for (T& x : array->data) x = T(std::numeric_limits<double>::quiet_NaN());
    for (Array<A>* array : {&lse, &dsinks, &dw})
      for (A& x : array->data) x = std::numeric_limits<A>::quiet_NaN();
  }

  void make_mask(std::mt19937& random) {
    std::fill(visible.data.begin(), visible.data.end(), uint8_t{1});
    std::uniform_int_distribution<int> percent(0, 99);
    if (c.mask == Mask::kBool)
      for (uint8_t& x : visible.data) x = percent(random) < 70;
    if (c.mask == Mask::kBlocks) {
      fill_tiles(visible.data, c.num_heads, c.seqlen_q, c.seqlen_k, random);
      blocks = BlockLists(visible.data, c.num_heads, c.seqlen_q, c.seqlen_k);
    }
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t i = 0; i < c.seqlen_q; ++i) {
        int32_t& first = starts.at(b, 0, i, 0) = percent(random) < 50 ? 0 : percent(random);
        int32_t& last = ends.at(b, 0, i, 0) = static_cast<int32_t>(c.seqlen_k) - percent(random) / 3;
        if (c.mask != Mask::kRanges) continue;
        for (int64_t h = 0; h < c.num_heads; ++h)
          for (int64_t j = 0; j < c.seqlen_k; ++j) visible.at(b, h, i, j) = j >= first && j < last;
      }
  }

  template <typename U>
  Tensor rows_view(Array<U>& array) {
    Tensor view = array.view();
    if (c.packed()) view.batch = 0;
    return view;
  }

  void set_tensors(fastattn::AttentionBackwardParams& p) {
    p.q = rows_view(q);
    p.k = rows_view(k);
    p.v = rows_view(v);
    p.out = rows_view(out);
    p.lse = rows_view(lse);
    p.dout = rows_view(dout);
    p.dlse = rows_view(dlse);
    p.dq = rows_view(dq);
    p.dk = rows_view(dk);
    p.dv = rows_view(dv);
  }

  void set_options(fastattn::AttentionBackwardParams& p) {
    if (c.score == Score::kAdditive) {
      p.score_weights = w.data.data();
      p.dscore_weights = dw.data.data();
    }
    if (c.has_sinks) {
      p.sinks = sinks.data.data();
      p.dsinks = dsinks.data.data();
    }
    p.dropout_p = c.dropout_p;
    if (c.dropout_p > 0) p.dropout_seed = &seed;
    if (c.packed()) {
      p.cu_seqlens_q = cu_q.data();
      p.cu_seqlens_k = cu_k.data();
    }
    if (c.cached()) p.seqlens_k = c.lengths_k.data();
    if (c.page_size > 0) {
      p.block_table = {table.data(), pages(), 0, 1, 1};
      p.page_size = c.page_size;
    }
    if (c.mask == Mask::kBool) p.mask = visible.view();
    if (c.mask == Mask::kBlocks) p.block_mask = blocks.view();
    if (c.mask == Mask::kRanges) {
      p.key_starts = {starts.data.data(), c.seqlen_q, 0, 1, 0};
      p.key_ends = {ends.data.data(), c.seqlen_q, 0, 1, 0};
    }
    set_bias(p);
  }

  void set_bias(fastattn::AttentionBackwardParams& p) {
    if (c.bias == Bias::kNone) return;
    Tensor view{bias.data.data(), 0, bias.heads == 1 ? 0 : bias.rows * bias.cols, bias.cols, 1};
    if (c.bias == Bias::kDiagonals) {
      view.row = 1;
      p.diag = p.ddiag = view;
      p.diag_lo = 1 - c.seqlen_k;
      p.ddiag.data = dbias.data.data();
      p.num_diagonals = bias.cols;
      return;
    }
    if (bias.rows == 1) view.row = 0;
    if (bias.cols == 1) view.col = 0;
    p.bias_dtype = sizeof(A) == 8 ? DType::kFloat64 : DType::kFloat32;
    p.bias = p.dbias = view;
    p.dbias.data = dbias.data.data();
  }
};

}  // namespace smoke

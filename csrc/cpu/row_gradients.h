// What the backward pass knows of each query row before it meets a key.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../parallel.h"
#include "buffer.h"
#include "exact.h"
#include "rows.h"
#include "score.h"

namespace fastattn::FASTATTN_ISA {

// Per query row of the whole call, by [head][row]: lse (made +inf for an empty row, so that P = exp(S - lse)
// = 0), delta = dO·O - dlse, and residual = log(sum exp(S - lse)), which is 0 but for what rounding took from
// lse. Where lse is large, as in a row biased by the most negative float, that can be all of log(number of
// keys), and P must be exp((S - lse) - residual).
template <class T>
class RowGradients {
 public:
  explicit RowGradients(const AttentionBackwardParams& p);

  const T* lse(int64_t b, int64_t h) const { return lse_.data() + index(b, h); }
  const T* residual(int64_t b, int64_t h) const { return residual_.data() + index(b, h); }
  const T* delta(int64_t b, int64_t h) const { return delta_.data() + index(b, h); }

 private:
  int64_t index(int64_t b, int64_t h) const {
    return h * rows_ + (p_.cu_seqlens_q != nullptr ? p_.cu_seqlens_q[b] : b * p_.seqlen_q);
  }

  const AttentionBackwardParams& p_;
  int64_t rows_;
  Buffer<T> lse_, residual_, delta_;
};

// residual[r] = log(sum exp(s - lse[r])) over the keys (and sink) of row i0 + r, from the same products as
// the pass that follows: only then do its rows of P add up to 1.
template <class T>
void lse_residuals(const AttentionParams& p, int64_t b, int64_t h, int64_t i0, int64_t rows, const T* lse,
                   T* residual) {
  constexpr int64_t kStrip = 256;
  static thread_local Buffer<T> panels, scores, copies;
  const Sequence seq = sequence_of(p, b);
  const ScoreRules<T> rules(p, b, h, seq);
  const Rows keys = Rows::of_keys(p, p.k, b, h / (p.num_heads / p.num_heads_kv), seq);
  const Rows queries(p, p.q, b, h, seq.q_begin);
  panels.ensure(kStrip * p.head_dim);
  scores.ensure(rows * kStrip);
  copies.ensure(rows * round_to_lanes<T>(p.head_dim));
  const Block<T> block = block_copied<T>(queries, p.dtype, i0, rows, p.head_dim, copies.data());
  for (int64_t r = 0; r < rows; ++r)
    residual[r] = p.sinks == nullptr ? T{0} : std::exp(static_cast<const T*>(p.sinks)[h] - lse[r]);
  const KeyRange hull = rules.rows_keys(i0, i0 + rows);
  for (int64_t j0 = hull.begin / kStrip * kStrip; j0 < hull.end; j0 += kStrip) {
    const int64_t keys_here = std::min(kStrip, seq.len_k - j0);
    pack_panels<T>([&](int64_t c) { return keys(j0 + c); }, p.dtype, keys_here, p.head_dim,
                   static_cast<T>(p.scale), panels.data());
    gemm_panels<T>(rows, 0, round_to_lanes<T>(keys_here), p.head_dim, block.data, block.stride, panels.data(),
                   scores.data(), kStrip);
    for (int64_t r = 0; r < rows; ++r)
      rules.for_each_run(i0 + r, i0 + r + 1, j0, j0 + kStrip, [&](const Run& run) {
        T s[kStrip];
        const int64_t n = run.end - run.begin, padded = round_to_lanes<T>(n);
        std::copy_n(scores.data() + r * kStrip + run.begin - j0, n, s);
        rules.apply(run, i0 + r, run.begin, n, padded, s, nullptr);
        Vec<T> total{};
        for (int64_t c = 0; c < padded; c += kLanes<T>) total += vexp<T>(load(s + c) - lse[r]);
        residual[r] += reduce_add<T>(total);
      });
  }
  for (int64_t r = 0; r < rows; ++r) residual[r] = std::log(residual[r]);
}

// delta[i] = dO_i·O_i, added up in the order in which the products of panels add up dP = dO·V: in a row that
// puts all its weight on one key, O is that key's V, and dP - delta is exactly 0.
template <class T>
void row_products(const AttentionParams& p, const Rows& outs, const Rows& douts, int64_t rows, T* delta) {
  const int64_t dim = p.head_dim_v;
  Vector<T> out(kPanel<T> * dim), dout(kPanel<T> * dim);
  for (int64_t i = 0; i < rows; i += kPanel<T>) {
    const int64_t n = std::min(kPanel<T>, rows - i);
    pack_panel<T>([&](int64_t r) { return outs(i + r); }, p.dtype, n, dim, T{1}, out.data());
    pack_panel<T>([&](int64_t r) { return douts(i + r); }, p.dtype, n, dim, T{1}, dout.data());
    for (int64_t r = 0; r < n; r += kLanes<T>) {
      Vec<T> sum{};
      for (int64_t d = 0; d < dim; ++d)
        sum += load(dout.data() + d * kPanel<T> + r) * load(out.data() + d * kPanel<T> + r);
      std::memcpy(delta + i + r, &sum, std::min<int64_t>(kLanes<T>, n - r) * sizeof(T));
    }
  }
}

template <class T>
RowGradients<T>::RowGradients(const AttentionBackwardParams& p) : p_(p) {
  // Below this magnitude what rounding takes from lse is a few units in the last place of P.
  constexpr T kLargeLse = static_cast<T>(64);
  rows_ = p.cu_seqlens_q != nullptr ? p.cu_seqlens_q[p.batch] : p.batch * p.seqlen_q;
  lse_.ensure(p.num_heads * rows_);
  residual_.ensure(p.num_heads * rows_);
  delta_.ensure(p.num_heads * rows_);
  parallel_tasks(p.num_threads, p.batch * p.num_heads, [&](int, int64_t n) {
    const int64_t b = n / p.num_heads, h = n % p.num_heads;
    const Sequence s = sequence_of(p, b);
    const Rows outs(p, p.out, b, h, s.q_begin), douts(p, p.dout, b, h, s.q_begin);
    T* lse_row = lse_.data() + index(b, h);
    T* residual_row = residual_.data() + index(b, h);
    T* delta_row = delta_.data() + index(b, h);
    row_products(p, outs, douts, s.len_q, delta_row);
    for (int64_t i = 0; i < s.len_q; ++i) {
      // An empty row's out is 0 whatever its dO holds.
      if (!std::isfinite(delta_row[i]) && !ScoreRules<T>(p, b, h, s).sees_any(i)) delta_row[i] = T{0};
      if (p.dlse.data != nullptr)
        delta_row[i] -= static_cast<const T*>(p.dlse.data)[p.dlse.offset(b, h, s.q_begin + i)];
      const T lse = static_cast<const T*>(p.lse.data)[p.lse.offset(b, h, s.q_begin + i)];
      lse_row[i] = lse == -kInfinity<T> ? kInfinity<T> : lse;
    }
    std::fill(residual_row, residual_row + s.len_q, T{0});
    // The forward pass added up the scores of very few rows in another order, dot_rows': there every row gets
    // one.
    const T least = s.len_q <= kDotRows ? T{0} : kLargeLse;
    const auto large = [least](T lse) { return std::abs(lse) >= least && std::abs(lse) < kInfinity<T>; };
    for (int64_t i = 0; i < s.len_q; i += kMaskTile) {
      const int64_t rows = std::min(kMaskTile, s.len_q - i);
      if (!std::any_of(lse_row + i, lse_row + i + rows, large)) continue;
      lse_residuals<T>(p, b, h, i, rows, lse_row + i, residual_row + i);
      for (int64_t r = i; r < i + rows; ++r)
        if (!large(lse_row[r])) residual_row[r] = T{0};
    }
  });
}

}  // namespace fastattn::FASTATTN_ISA

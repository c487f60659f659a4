// What the backward pass knows of each query row before it meets a key.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../parallel.h"
#include "buffer.h"
#include "few_rows.h"
#include "rows.h"
#include "score.h"
#include "score_strips.h"
#include "softmax.h"
#include "weight_gradients.h"

namespace fastattn::FASTATTN_ISA {

// Per query row of the whole call, by [head][row]: lse in two parts, P = exp((S - lse) - residual), and delta
// = dO·O - dlse; where statistics have gradients, also the product P·dP of those. An empty row's lse is +inf,
// which makes its P = 0. The residual is 0 where lse is so small that rounding took nothing that matters from
// it. Where it is large, as in a row biased by the most negative float, rounding can take all of log(number
// of keys): there `lse` is the largest score, and the residual the rest.
template <class T>
class RowGradients {
 public:
  explicit RowGradients(const AttentionBackwardParams& p);

  const T* lse(int64_t b, int64_t h) const { return lse_.data() + index(b, h); }
  const T* residual(int64_t b, int64_t h) const { return residual_.data() + index(b, h); }
  const T* delta(int64_t b, int64_t h) const { return delta_.data() + index(b, h); }

  // nullptr where no statistics have gradients.
  const T* products(int64_t b, int64_t h) const {
    return products_.data() == nullptr ? nullptr : products_.data() + index(b, h);
  }

 private:
  void compute(int64_t b, int64_t h, int64_t i0, int64_t rows);
  void split_large(int64_t b, int64_t h, int64_t i0, int64_t rows);

  int64_t index(int64_t b, int64_t h) const {
    return h * rows_ + (p_.cu_seqlens_q != nullptr ? p_.cu_seqlens_q[b] : b * p_.seqlen_q);
  }

  const AttentionBackwardParams& p_;
  int64_t rows_;
  Buffer<T> lse_, residual_, delta_, products_;
};

// Splits the lse of rows [i0, i0 + rows) into their largest score and the rest, residual = log(sum exp(S -
// max)), with the sink, from the same products as the pass that follows: only then do its rows of P add up
// to 1. Of use where lse is finite; then every visible score is, and a NaN is a key that a bias of -inf
// hides.
template <class T>
void split_lse(const AttentionParams& p, int64_t b, int64_t h, int64_t i0, int64_t rows,
               RowState<T>* states) {
  for (int64_t r = 0; r < rows; ++r)
    states[r] = p.sinks == nullptr ? RowState<T>{} : sink_state(static_cast<const T*>(p.sinks)[h]);
  const ScoreRules<T> rules(p, b, h, sequence_of(p, b));
  for_each_strip<T>(p, rules, b, h, i0, rows, [&](const Run&, int64_t r, T* s, int64_t padded) {
    for (int64_t c = 0; c < padded; c += kLanes<T>) {
      const Vec<T> x = load(s + c);
      store(s + c, x == x ? x : splat(-kInfinity<T>));
    }
    softmax_update<T>(s, padded, states[r]);
  });
}

// delta[i] = dO_i·O_i, added up in the order in which the products of panels add up dP = dO·V, one chain
// along head_dim_v: in a row that puts all its weight on one key, O is that key's V, and dP - delta is
// exactly 0.
template <class T>
void row_products(const AttentionParams& p, const Rows& outs, const Rows& douts, int64_t rows, T* delta) {
  constexpr int64_t kN = kLanes<T>;
  const int64_t dim = p.head_dim_v;
  with_source<T>(p.dtype, [&](auto* type) {
    using Source = decltype(type);
    for (int64_t i = 0; i < rows; i += kN) {
      const int64_t n = std::min(kN, rows - i);
      int64_t done = 0;
      Vec<T> sum{};
#if defined(FASTATTN_HAVE_SHUFFLE)
      constexpr int kE = kPiece<T>;
      Source out_rows[kN], dout_rows[kN];
      for (int64_t r = 0; r < kN; ++r) {
        out_rows[r] = static_cast<Source>(outs(i + std::min(r, n - 1)));
        dout_rows[r] = static_cast<Source>(douts(i + std::min(r, n - 1)));
      }
      for (; done + kE <= dim; done += kE) {
        Vec<T> out[kE], dout[kE];
        load_columns<T>([&](int r) { return load_piece<T>(out_rows[r] + done); }, out);
        load_columns<T>([&](int r) { return load_piece<T>(dout_rows[r] + done); }, dout);
#pragma GCC unroll 4
        for (int d = 0; d < kE; ++d) sum += dout[d] * out[d];
      }
#endif
      for (int64_t r = 0; r < n; ++r) {
        const Source out = static_cast<Source>(outs(i + r)), dout = static_cast<Source>(douts(i + r));
        T x = sum[r];
        for (int64_t d = done; d < dim; ++d) x += to_accumulator<T>(dout[d]) * to_accumulator<T>(out[d]);
        delta[i + r] = x;
      }
    }
  });
}

template <class T>
RowGradients<T>::RowGradients(const AttentionBackwardParams& p) : p_(p) {
  rows_ = p.cu_seqlens_q != nullptr ? p.cu_seqlens_q[p.batch] : p.batch * p.seqlen_q;
  lse_.ensure(p.num_heads * rows_);
  residual_.ensure(p.num_heads * rows_);
  delta_.ensure(p.num_heads * rows_);
  if (WeightGradients<T>(p, 0, 0, Sequence{}).wanted()) products_.ensure(p.num_heads * rows_);
  const int64_t tiles = (p.seqlen_q + kMaskTile - 1) / kMaskTile;
  parallel_tasks(p.num_threads, p.batch * p.num_heads * tiles, [&](int, int64_t n) {
    const int64_t b = n / tiles / p.num_heads, h = n / tiles % p.num_heads, i0 = n % tiles * kMaskTile;
    const int64_t rows = std::min(kMaskTile, sequence_of(p, b).len_q - i0);
    if (rows > 0) compute(b, h, i0, rows);
  });
}

// products[r] = sum_j P dP of rows [i0, i0 + rows), for the dP of statistics' gradients: unlike that of a
// value, no output has this sum. On the way the rows' P are added up, and what keeps them from 1 joins the
// residual. Hidden keys are left out where what they hold is not finite.
template <class T>
void find_weight_products(const AttentionParams& p, const WeightGradients<T>& gradients, int64_t b, int64_t h,
                          int64_t i0, int64_t rows, const T* lse, T* residual, T* products) {
  const ScoreRules<T> rules(p, b, h, sequence_of(p, b));
  double dots[kMaskTile] = {}, sums[kMaskTile] = {};
  for_each_strip<T>(p, rules, b, h, i0, rows, [&](const Run& run, int64_t r, T* s, int64_t padded) {
    const int64_t n = run.end - run.begin;
    T dp[kStrip] = {};
    gradients.add(i0 + r, run.begin, n, s, lse[r], residual[r], T{0}, dp);
    Vec<T> sum{}, product{};
    for (int64_t c = 0; c < padded; c += kLanes<T>) {
      const Vec<T> e = vexp<T>((load(s + c) - lse[r]) - residual[r]);
      store(s + c, e);
      sum += e;
      product += e * load(dp + c);
    }
    double e_sum = reduce_add<T>(sum), e_product = reduce_add<T>(product);
    if (e_sum + e_product != e_sum + e_product) {
      bool visible[kStrip];
      rules.mark_visible(run, i0 + r, run.begin, n, visible);
      e_sum = e_product = 0;
      for (int64_t c = 0; c < n; ++c) {
        e_sum += visible[c] ? s[c] : T{0};
        e_product += visible[c] ? s[c] * dp[c] : T{0};
      }
    }
    sums[r] += e_sum;
    dots[r] += e_product;
  });
  for (int64_t r = 0; r < rows; ++r) {
    products[r] = T{0};
    if (lse[r] == kInfinity<T>) continue;
    double total = sums[r];
    if (p.sinks != nullptr) total += std::exp((static_cast<const T*>(p.sinks)[h] - lse[r]) - residual[r]);
    residual[r] += static_cast<T>(std::log(total));
    products[r] = static_cast<T>(dots[r] / total);
  }
}

template <class T>
void RowGradients<T>::compute(int64_t b, int64_t h, int64_t i0, int64_t rows) {
  const Sequence s = sequence_of(p_, b);
  T* lse = lse_.data() + index(b, h) + i0;
  T* residual = residual_.data() + index(b, h) + i0;
  T* delta = delta_.data() + index(b, h) + i0;
  const int64_t first = s.q_begin + i0;
  row_products(p_, Rows(p_, p_.out, b, h, first), Rows(p_, p_.dout, b, h, first), rows, delta);
  for (int64_t r = 0; r < rows; ++r) {
    // An empty row's out is 0 whatever its dO holds.
    if (!std::isfinite(delta[r]) && !ScoreRules<T>(p_, b, h, s).sees_any(i0 + r)) delta[r] = T{0};
    if (p_.dlse.data != nullptr)
      delta[r] -= static_cast<const T*>(p_.dlse.data)[p_.dlse.offset(b, h, first + r)];
    lse[r] = static_cast<const T*>(p_.lse.data)[p_.lse.offset(b, h, first + r)];
    if (lse[r] == -kInfinity<T>) lse[r] = kInfinity<T>;
  }
  std::fill(residual, residual + rows, T{0});
  split_large(b, h, i0, rows);
  const WeightGradients<T> gradients(p_, b, h, s);
  if (gradients.wanted())
    find_weight_products<T>(p_, gradients, b, h, i0, rows, lse, residual,
                            products_.data() + index(b, h) + i0);
}

// Gives the rows whose lse is large a residual.
template <class T>
void RowGradients<T>::split_large(int64_t b, int64_t h, int64_t i0, int64_t rows) {
  // Below this magnitude what rounding takes from lse is a few units in the last place of P. The forward pass
  // added up the scores of very few rows in another order, dot_rows': there every row gets a residual.
  constexpr T kLargeLse = static_cast<T>(64);
  const T least = sequence_of(p_, b).len_q <= kDotRows ? T{0} : kLargeLse;
  T* lse = lse_.data() + index(b, h) + i0;
  T* residual = residual_.data() + index(b, h) + i0;
  const auto large = [least](T x) { return std::abs(x) >= least && std::abs(x) < kInfinity<T>; };
  if (!std::any_of(lse, lse + rows, large)) return;
  RowState<T> states[kMaskTile];
  split_lse<T>(p_, b, h, i0, rows, states);
  for (int64_t r = 0; r < rows; ++r) {
    if (!large(lse[r])) continue;
    lse[r] = states[r].max;
    residual[r] = std::log(states[r].sum);
  }
}

}  // namespace fastattn::FASTATTN_ISA

// Statistics of the weights before dropout: by their definitions in double, and the kernel's beside them.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "cpu/kernels.h"
#include "error.h"
#include "problem.h"

namespace smoke {

using fastattn::PoolMode;

constexpr int64_t kTopK = 3;

template <typename A>
struct Summary {
  Array<A> lse, entropy, distance, max_weight;  // [B, Hq, Lq, 1]
  Array<A> received;                            // [B, Hq, 1, Lk]
  Array<A> topk_weights;                        // [B, Hq, Lq, kTopK]
  Array<A> pooled;                              // [B, Hq, R, C]
  Array<int64_t> max_index, topk_indices;

  explicit Summary(const Case& c, A start)
      : lse(c.batch, c.num_heads, c.seqlen_q, 1),
        entropy(lse),
        distance(lse),
        max_weight(lse),
        received(c.batch, c.num_heads, 1, c.seqlen_k),
        topk_weights(c.batch, c.num_heads, c.seqlen_q, kTopK),
        pooled(c.batch, c.num_heads, std::min<int64_t>(3, c.seqlen_q), std::min<int64_t>(5, c.seqlen_k)),
        max_index(c.batch, c.num_heads, c.seqlen_q, 1),
        topk_indices(c.batch, c.num_heads, c.seqlen_q, kTopK) {
    for (Array<A>* array : {&lse, &entropy, &distance, &max_weight, &received, &topk_weights, &pooled})
      std::fill(array->data.begin(), array->data.end(), start);
  }
};

inline double weight(const Problem<double>& x, int64_t b, int64_t h, int64_t i, int64_t j) {
  return x.sees(b, h, i, j) ? std::exp(x.scores.at(b, h, i, j) - x.lse.at(b, h, i, 0)) : 0;
}

inline void add_row(Summary<double>& s, const Problem<double>& x, PoolMode mode, int64_t b, int64_t h,
                    int64_t i) {
  const Case& c = x.c;
  const int64_t rows = s.pooled.rows, cols = s.pooled.cols;
  const int64_t r = fastattn::cell_of(i, rows, c.seqlen_q);
  const int64_t height =
      fastattn::cell_begin(r + 1, rows, c.seqlen_q) - fastattn::cell_begin(r, rows, c.seqlen_q);
  std::vector<double> sorted;
  for (int64_t j = 0; j < c.seqlen_k; ++j) {
    const double p = weight(x, b, h, i, j);
    sorted.push_back(p);
    s.entropy.at(b, h, i, 0) -= p > 0 ? p * std::log(p) : 0;
    s.distance.at(b, h, i, 0) += p * std::fabs(static_cast<double>(i + c.seqlen_k - c.seqlen_q - j));
    s.received.at(b, h, 0, j) += p;
    const int64_t n = fastattn::cell_of(j, cols, c.seqlen_k);
    const int64_t width =
        fastattn::cell_begin(n + 1, cols, c.seqlen_k) - fastattn::cell_begin(n, cols, c.seqlen_k);
    double& cell = s.pooled.at(b, h, r, n);
    if (mode == PoolMode::kMax) cell = std::max(cell, p);
    if (mode == PoolMode::kSum) cell += p;
    if (mode == PoolMode::kMean) cell += p / static_cast<double>(height * width);
  }
  sorted.resize(std::max<size_t>(sorted.size(), kTopK));
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  s.max_weight.at(b, h, i, 0) = sorted[0];
  std::copy_n(sorted.begin(), kTopK, &s.topk_weights.at(b, h, i, 0));
}

inline Summary<double> define_summary(const Problem<double>& x, PoolMode mode) {
  Summary<double> s(x.c, 0);
  s.lse = x.lse;
  for (int64_t b = 0; b < x.c.batch; ++b)
    for (int64_t h = 0; h < x.c.num_heads; ++h)
      for (int64_t i = 0; i < x.c.seqlen_q; ++i) add_row(s, x, mode, b, h, i);
  return s;
}

// The kernel's; lse is the one that a forward pass has left in x where it is given.
template <typename T>
Summary<typename Problem<T>::A> run_summary(Problem<T>& x, PoolMode mode, bool lse_given) {
  using A = typename Problem<T>::A;
  Summary<A> s(x.c, std::numeric_limits<A>::quiet_NaN());
  fastattn::SummaryParams p;
  static_cast<fastattn::AttentionParams&>(p) = x.params();
  p.v = p.out = Tensor{};
  p.dropout_p = 0;
  p.dropout_seed = nullptr;
  p.lse = s.lse.view();
  if (lse_given) p.given = x.lse.view();
  p.entropy = s.entropy.view();
  p.distance = s.distance.view();
  p.max_weight = s.max_weight.view();
  p.max_index = s.max_index.view();
  p.received = s.received.view();
  p.top_k = kTopK;
  p.topk_weights = s.topk_weights.view();
  p.topk_indices = s.topk_indices.view();
  p.pool_rows = s.pooled.rows;
  p.pool_cols = s.pooled.cols;
  p.pool_mode = mode;
  p.pooled = s.pooled.view();
  fastattn::cpu_kernels().summary_fwd(p);
  return s;
}

// The weights at the indices of a row's keys, 0 for -1: those that differ by rounding may change places.
inline Array<double> weights_at(const Problem<double>& x, const Array<int64_t>& index) {
  Array<double> found(x.c.batch, x.c.num_heads, x.c.seqlen_q, index.cols);
  for (int64_t b = 0; b < x.c.batch; ++b)
    for (int64_t h = 0; h < x.c.num_heads; ++h)
      for (int64_t i = 0; i < x.c.seqlen_q; ++i)
        for (int64_t n = 0; n < index.cols; ++n) {
          const int64_t j = index.at(b, h, i, n);
          found.at(b, h, i, n) = j < 0 ? 0 : weight(x, b, h, i, j);
        }
  return found;
}

template <typename T>
void add_summary_results(Problem<T>& x, const Problem<double>& exact, std::vector<Result>& results) {
  for (const PoolMode mode : {PoolMode::kMean, PoolMode::kSum, PoolMode::kMax})
    for (const bool lse_given : {false, true}) {
      const auto got = run_summary(x, mode, lse_given);
      const Summary<double> want = define_summary(exact, mode);
      results.push_back({"summary's lse", error(got.lse, want.lse)});
      results.push_back({"entropy", error(got.entropy, want.entropy)});
      results.push_back({"distance", error(got.distance, want.distance)});
      results.push_back({"received", error(got.received, want.received)});
      results.push_back({"pooled", error(got.pooled, want.pooled)});
      results.push_back({"max_weight", error(got.max_weight, want.max_weight)});
      results.push_back({"max_index", error(weights_at(exact, got.max_index), want.max_weight)});
      results.push_back({"topk_weights", error(got.topk_weights, want.topk_weights)});
      results.push_back({"topk_indices", error(weights_at(exact, got.topk_indices), want.topk_weights)});
    }
}

}  // namespace smoke

// Gradients of statistics of the weights: by definition in double, and from attention's backward pass.
#pragma once

#include <cmath>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "definition.h"
#include "error.h"
#include "summary.h"

namespace smoke {

// What is given: the gradients of the statistics, of which the pooled cells hold sums.
template <typename A>
struct Upstream {
  Array<A> entropy, distance, received, pooled;

  explicit Upstream(const Case& c) {
    const Summary<A> shapes(c, 0);
    entropy = distance = shapes.entropy;
    received = shapes.received;
    pooled = shapes.pooled;
    std::mt19937 random(11);
    std::normal_distribution<double> normal;
    for (Array<A>* array : {&entropy, &distance, &received, &pooled})
      for (A& x : array->data) x = static_cast<A>(BFloat16(normal(random)));
    for (A& x : distance.data) x /= 256;  // distances are hundreds, and would drown the other statistics
  }
};

inline void define_summary_gradients(Problem<double>& x) {
  const Case& c = x.c;
  const Upstream<double> up(c);
  clear_sums(x);
  std::vector<double> dp(c.seqlen_k);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.num_heads; ++h)
      for (int64_t i = 0; i < c.seqlen_q; ++i) {
        Row row(x, b, h, i);
        row.forward();
        const int64_t cell_row = fastattn::cell_of(i, up.pooled.rows, c.seqlen_q);
        for (int64_t j = 0; j < c.seqlen_k; ++j) {
          const double p = row.probability(j);
          const double away = static_cast<double>(std::abs(i + c.seqlen_k - c.seqlen_q - j));
          dp[j] = up.distance.at(b, h, i, 0) * away + up.received.at(b, h, 0, j) +
                  up.pooled.at(b, h, cell_row, fastattn::cell_of(j, up.pooled.cols, c.seqlen_k)) -
                  up.entropy.at(b, h, i, 0) * (p > 0 ? std::log(p) + 1 : 0);
        }
        row.backward_of(dp);
      }
}

// lse: what a forward pass of the same problem has found.
template <typename T>
void add_summary_gradients(const Case& c, const Array<typename Problem<T>::A>& lse,
                           std::vector<Result>& results) {
  Problem<double> want(c);
  define_summary_gradients(want);
  Problem<T> x(c);
  x.lse = lse;
  Upstream<typename Problem<T>::A> up(c);
  fastattn::AttentionBackwardParams p = x.params();
  p.head_dim_v = 0;
  p.dropout_p = 0;
  p.dropout_seed = nullptr;
  p.dentropy = up.entropy.view();
  p.ddistance = up.distance.view();
  p.dreceived = up.received.view();
  p.dpooled = up.pooled.view();
  p.pool_rows = up.pooled.rows;
  p.pool_cols = up.pooled.cols;
  fastattn::cpu_kernels().attention_bwd(p);
  results.push_back({"summary's dq", error(x.dq, want.dq)});
  results.push_back({"summary's dk", error(x.dk, want.dk)});
  results.push_back({"summary's dbias", error(x.dbias, want.dbias)});
  if (c.has_sinks) results.push_back({"summary's dsinks", error(x.dsinks, want.dsinks)});
}

}  // namespace smoke

// Attention and its gradients by the definition: one row after the other, in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "philox.h"
#include "problem.h"

namespace smoke {

inline double dot(const double* x, const double* y, int64_t n) {
  double sum = 0;
  for (int64_t c = 0; c < n; ++c) sum += x[c] * y[c];
  return sum;
}

// The score of a pair before the softcap, and its derivatives by q, k and w.
struct Pair {
  double score = 0;
  std::vector<double> by_q, by_k, by_w;

  Pair(const Case& c, const double* q, const double* k, const double* w)
      : by_q(c.head_dim), by_k(c.head_dim), by_w(c.head_dim) {
    const double scale = 1 / std::sqrt(static_cast<double>(c.head_dim));
    double squared = 0;
    for (int64_t d = 0; d < c.head_dim; ++d) {
      const bool is_dot = c.score == Score::kDot, is_additive = c.score == Score::kAdditive;
      const double t = is_additive ? std::tanh(q[d] + k[d]) : 0;
      by_q[d] = is_dot ? scale * k[d] : is_additive ? w[d] * (1 - t * t) : k[d] - q[d];
      by_k[d] = is_dot ? scale * q[d] : is_additive ? w[d] * (1 - t * t) : q[d] - k[d];
      by_w[d] = t;
      score += is_dot ? scale * q[d] * k[d] : w[d] * t;
      squared += (q[d] - k[d]) * (q[d] - k[d]);
    }
    if (fastattn::is_distance(c.score)) of_distance(c.score, squared);
  }

 private:
  void of_distance(Score kernel, double squared) {
    const double r = std::sqrt(squared);
    double value = std::exp(-squared / 2), slope = 1;
    if (kernel == Score::kEpanechnikov) {
      value = 1 - squared;
      slope = 2 / value;
    } else if (kernel == Score::kTriangular) {
      value = 1 - r;
      slope = r > 0 ? 1 / (r * value) : 0;  // at r = 0, where there is no derivative, as the kernels
    } else if (kernel == Score::kBoxcar) {
      value = r <= 1 ? 1 : 0;
      slope = 0;
    }
    score = value > 0 ? std::log(value) : -kInfinity;
    for (double& x : by_q) x *= slope;
    for (double& x : by_k) x *= slope;
  }
};

// One row of one head.
class Row {
 public:
  Row(Problem<double>& problem, int64_t b, int64_t h, int64_t i)
      : x(problem),
        c(problem.c),
        b_(b),
        h_(h),
        i_(i),
        g_(h / (c.num_heads / c.num_heads_kv)),
        entry_(x.entry(b)),
        row_(x.row_q(b, i)),
        keys_(c.len_k(b)),
        p_(keys_),
        kept_(keys_),
        slope_(keys_, 1.0) {}

  void forward() {
    double sum = c.has_sinks ? std::exp(x.sinks.at(0, h_, 0, 0)) : 0.0;
    for (int64_t j = 0; j < keys_; ++j)
      if (x.sees(b_, h_, i_, j)) sum += p_[j] = std::exp(score(j));
    for (double& value : p_) value = sum > 0 ? value / sum : 0.0;
    sum_ = sum;
    x.lse.at(entry_, h_, row_, 0) = std::log(sum);
    double* out = &x.out.at(entry_, h_, row_, 0);
    std::fill_n(out, c.head_dim_v, 0.0);
    for (int64_t j = 0; j < keys_; ++j) {
      kept_[j] = keep(j);
      for (int64_t d = 0; d < c.head_dim_v; ++d) out[d] += kept_[j] * p_[j] * value(j)[d];
    }
  }

  void backward() {
    const double* dout = &x.dout.at(entry_, h_, row_, 0);
    std::vector<double> dp(keys_);
    for (int64_t j = 0; j < keys_; ++j) {
      if (p_[j] == 0) continue;
      dp[j] = kept_[j] * dot(dout, value(j), c.head_dim_v);
      double* dv = &x.dv.at(x.key_entry(b_, j), g_, x.row_k(b_, j), 0);
      for (int64_t d = 0; d < c.head_dim_v; ++d) dv[d] += kept_[j] * p_[j] * dout[d];
    }
    backward_of(dp);
  }

  // From the gradients of the weights before dropout, and that of lse.
  void backward_of(const std::vector<double>& dp) {
    double* dq = &x.dq.at(entry_, h_, row_, 0);
    const double delta = dot(p_.data(), dp.data(), keys_) - x.dlse.at(entry_, h_, row_, 0);
    if (c.has_sinks) x.dsinks.at(0, h_, 0, 0) -= delta * std::exp(x.sinks.at(0, h_, 0, 0)) / sum_;
    std::fill_n(dq, c.head_dim, 0.0);
    for (int64_t j = 0; j < keys_; ++j) {
      if (p_[j] == 0) continue;
      const double ds = p_[j] * (dp[j] - delta);
      if (c.bias != Bias::kNone) x.dbias.data[x.bias_index(b_, h_, i_, j)] += ds;
      const Pair of(c, query(), key(j), x.w.data.data());
      double* dk = &x.dk.at(x.key_entry(b_, j), g_, x.row_k(b_, j), 0);
      for (int64_t d = 0; d < c.head_dim; ++d) dq[d] += ds * slope_[j] * of.by_q[d];
      for (int64_t d = 0; d < c.head_dim; ++d) dk[d] += ds * slope_[j] * of.by_k[d];
      for (int64_t d = 0; d < c.head_dim; ++d) x.dw.data[d] += ds * slope_[j] * of.by_w[d];
    }
  }

  // The score of a visible key.
  double score(int64_t j) {
    double s = Pair(c, query(), key(j), x.w.data.data()).score;
    if (c.softcap > 0) {
      const double t = std::tanh(s / c.softcap);
      s = c.softcap * t;
      slope_[j] = 1 - t * t;
    }
    return c.bias == Bias::kNone ? s : s + x.bias.data[x.bias_index(b_, h_, i_, j)];
  }

  // The weight after dropout, and before.
  double weight(int64_t j) const { return kept_[j] * p_[j]; }
  double probability(int64_t j) const { return p_[j]; }

 private:
  const double* query() const { return &x.q.at(entry_, h_, row_, 0); }
  const double* key(int64_t j) const { return &x.k.at(x.key_entry(b_, j), g_, x.row_k(b_, j), 0); }
  const double* value(int64_t j) const { return &x.v.at(x.key_entry(b_, j), g_, x.row_k(b_, j), 0); }

  double keep(int64_t j) const {
    if (c.dropout_p == 0) return 1;
    const uint32_t word =
        fastattn::dropout_word(static_cast<uint64_t>(x.seed), static_cast<uint32_t>(b_ * c.num_heads + h_),
                               static_cast<uint32_t>(i_), static_cast<uint32_t>(j));
    return word >= static_cast<uint32_t>(c.dropout_p * 4294967296.0) ? 1 / (1 - c.dropout_p) : 0;
  }

  Problem<double>& x;
  const Case& c;
  const int64_t b_, h_, i_, g_, entry_, row_, keys_;
  std::vector<double> p_, kept_, slope_;
  double sum_ = 0;
};

inline void clear_sums(Problem<double>& x) {
  for (Array<double>* array : {&x.dk, &x.dv, &x.dsinks, &x.dw, &x.dbias})
    std::fill(array->data.begin(), array->data.end(), 0.0);
}

inline void define(Problem<double>& x) {
  x.weights = x.scores = Array<double>(x.c.batch, x.c.num_heads, x.c.seqlen_q, x.c.seqlen_k);
  clear_sums(x);
  for (int64_t b = 0; b < x.c.batch; ++b)
    for (int64_t h = 0; h < x.c.num_heads; ++h)
      for (int64_t i = 0; i < x.c.len_q(b); ++i) {
        Row row(x, b, h, i);
        row.forward();
        row.backward();
        for (int64_t j = 0; j < x.c.len_k(b); ++j) {
          x.weights.at(b, h, i, j) = row.weight(j);
          x.scores.at(b, h, i, j) = x.sees(b, h, i, j) ? row.score(j) : -kInfinity;
        }
      }
}

}  // namespace smoke

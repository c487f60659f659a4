// Runs the CPU kernels without Python and compares them with loops: under qemu for other processors (see
// scripts/test_aarch64.sh) and under the sanitizers. Every instruction set of the build that runs here is
// tried.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace {

using fastattn::AttentionBackwardParams;
using fastattn::DType;
using fastattn::Score;
using fastattn::SummaryParams;

struct Case {
  const char* name;
  int64_t batch, num_heads, num_heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v;
  int64_t lo = -fastattn::kUnbounded, hi = fastattn::kUnbounded;  // band, aligned bottom right
  double softcap = 0;
  bool has_sinks = false;
  int num_threads = 1;
  Score score = Score::kDot;
};

const Case kCases[] = {
    {"one", 1, 1, 1, 1, 1, 1, 1},
    {"dense", 2, 2, 2, 67, 131, 64, 64},
    {"causal gqa", 1, 4, 2, 97, 97, 40, 24, -fastattn::kUnbounded, 0, 0, false, 2},
    {"window softcap sinks", 1, 2, 1, 101, 150, 33, 65, -30, 7, 5.0, true, 2},
    {"few rows", 1, 4, 2, 3, 170, 40, 29, -fastattn::kUnbounded, 0, 0, true},
    {"long", 1, 1, 1, 300, 700, 128, 128, -fastattn::kUnbounded, 0},
    {"empty rows", 1, 1, 1, 90, 50, 16, 16, -fastattn::kUnbounded, 0, 0, true},
    {"additive", 2, 2, 1, 67, 131, 19, 24, -fastattn::kUnbounded, 0, 0, false, 2, Score::kAdditive},
    {"additive few rows", 1, 1, 1, 3, 90, 33, 8, -fastattn::kUnbounded, 0, 0, true, 1, Score::kAdditive},
    {"gaussian", 1, 2, 2, 41, 300, 5, 9, -40, 20, 0, false, 2, Score::kGaussian},
    {"epanechnikov", 1, 1, 1, 50, 130, 1, 3, -60, 60, 0, false, 1, Score::kEpanechnikov},
    {"triangular", 1, 2, 1, 30, 70, 1, 3, -60, 60, 0, false, 1, Score::kTriangular},
};

// Contiguous [batch, heads, rows, cols].
template <typename T>
struct Array {
  int64_t heads, rows, cols;
  std::vector<T> data;

  Array(int64_t batch, int64_t num_heads, int64_t num_rows, int64_t num_cols)
      : heads(num_heads), rows(num_rows), cols(num_cols), data(batch * num_heads * num_rows * num_cols) {}

  T& at(int64_t b, int64_t h, int64_t i, int64_t c) { return data[((b * heads + h) * rows + i) * cols + c]; }
  const T& at(int64_t b, int64_t h, int64_t i, int64_t c) const {
    return data[((b * heads + h) * rows + i) * cols + c];
  }
  fastattn::Tensor view() { return {data.data(), heads * rows * cols, rows * cols, cols, 1}; }
};

constexpr int64_t kTopK = 3;

template <typename T>
struct Problem {
  Array<T> q, k, v, out, lse, dout, dlse, dq, dk, dv, sinks, dsinks, w, dw;
  Array<T> entropy, distance, max_weight, received, topk_weights, pooled;  // of a summary
  std::vector<int64_t> max_index, topk_indices;

  Problem(const Case& c, unsigned seed)
      : q(c.batch, c.num_heads, c.seqlen_q, c.head_dim),
        k(c.batch, c.num_heads_kv, c.seqlen_k, c.head_dim),
        v(c.batch, c.num_heads_kv, c.seqlen_k, c.head_dim_v),
        out(c.batch, c.num_heads, c.seqlen_q, c.head_dim_v),
        lse(c.batch, c.num_heads, c.seqlen_q, 1),
        dout(c.batch, c.num_heads, c.seqlen_q, c.head_dim_v),
        dlse(c.batch, c.num_heads, c.seqlen_q, 1),
        dq(q),
        dk(k),
        dv(v),
        sinks(1, c.num_heads, 1, 1),
        dsinks(1, c.num_heads, 1, 1),
        w(1, 1, 1, c.head_dim),
        dw(w),
        entropy(lse),
        distance(lse),
        max_weight(lse),
        received(c.batch, c.num_heads, 1, c.seqlen_k),
        topk_weights(c.batch, c.num_heads, c.seqlen_q, kTopK),
        pooled(c.batch, c.num_heads, 1, 1),
        max_index(lse.data.size()),
        topk_indices(topk_weights.data.size()) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (Array<T>* array : {&q, &k, &v, &dout, &dlse, &sinks, &w})
      for (T& x : array->data) x = static_cast<T>(normal(random));
    for (Array<T>* array : {&out, &lse, &dq, &dk, &dv, &dsinks, &dw})
      std::fill(array->data.begin(), array->data.end(), std::numeric_limits<T>::quiet_NaN());
  }

  AttentionBackwardParams params(const Case& c) {
    AttentionBackwardParams p;
    p.dtype = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
    p.num_threads = c.num_threads;
    p.batch = c.batch;
    p.num_heads = c.num_heads;
    p.num_heads_kv = c.num_heads_kv;
    p.seqlen_q = c.seqlen_q;
    p.seqlen_k = c.seqlen_k;
    p.head_dim = c.head_dim;
    p.head_dim_v = c.head_dim_v;
    p.score = c.score;
    p.scale = c.score == Score::kDot ? 1 / std::sqrt(static_cast<double>(c.head_dim)) : 1.0;
    if (c.score == Score::kAdditive) {
      p.score_weights = w.data.data();
      p.dscore_weights = dw.data.data();
    }
    p.softcap = c.softcap;
    p.band.lo_bottom = c.lo;
    p.band.hi_bottom = c.hi;
    p.q = q.view();
    p.k = k.view();
    p.v = v.view();
    p.out = out.view();
    p.lse = lse.view();
    p.dout = dout.view();
    p.dlse = dlse.view();
    p.dq = dq.view();
    p.dk = dk.view();
    p.dv = dv.view();
    if (c.has_sinks) {
      p.sinks = sinks.data.data();
      p.dsinks = dsinks.data.data();
    }
    return p;
  }

  // lse is that of attention's forward pass.
  SummaryParams summary_params(const Case& c) {
    SummaryParams p;
    static_cast<fastattn::AttentionParams&>(p) = params(c);
    p.lse_given = true;
    p.entropy = entropy.view();
    p.distance = distance.view();
    p.max_weight = max_weight.view();
    p.max_index = {max_index.data(), c.num_heads * c.seqlen_q, c.seqlen_q, 1, 1};
    p.received = received.view();
    p.top_k = kTopK;
    p.topk_weights = topk_weights.view();
    p.topk_indices = topk_weights.view();
    p.topk_indices.data = topk_indices.data();
    p.pool_rows = p.pool_cols = 1;
    p.pooled = pooled.view();
    return p;
  }
};

double dot(const double* x, const double* y, int64_t n) {
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
      const double t = std::tanh(q[d] + k[d]);
      const bool is_dot = c.score == Score::kDot, is_additive = c.score == Score::kAdditive;
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
      slope = 1 / (r * value);
    }
    score = value > 0 ? std::log(value) : -std::numeric_limits<double>::infinity();
    for (double& x : by_q) x *= slope;
    for (double& x : by_k) x *= slope;
  }
};
// The statistics of one row's weights.
void naive_statistics(const Case& c, Problem<double>& x, int64_t b, int64_t h, int64_t i,
                      const std::vector<double>& p) {
  const int64_t position = i + c.seqlen_k - c.seqlen_q;
  double entropy = 0, distance = 0;
  for (int64_t j = 0; j < c.seqlen_k; ++j) {
    entropy -= p[j] > 0 ? p[j] * std::log(p[j]) : 0.0;
    distance += p[j] * static_cast<double>(std::abs(position - j));
    x.received.at(b, h, 0, j) += p[j];
    x.pooled.at(b, h, 0, 0) += p[j] / static_cast<double>(c.seqlen_q * c.seqlen_k);
  }
  x.entropy.at(b, h, i, 0) = entropy;
  x.distance.at(b, h, i, 0) = distance;
  std::vector<double> ordered = p;
  ordered.resize(std::max<size_t>(p.size(), kTopK), 0.0);
  std::sort(ordered.begin(), ordered.end(), std::greater<double>());
  x.max_weight.at(b, h, i, 0) = ordered[0];
  std::copy(ordered.begin(), ordered.begin() + kTopK, &x.topk_weights.at(b, h, i, 0));
}

// One row of one head, forward and backward, by the definition.
void naive_row(const Case& c, Problem<double>& x, int64_t b, int64_t h, int64_t i) {
  const int64_t g = h / (c.num_heads / c.num_heads_kv), offset = c.seqlen_k - c.seqlen_q;
  std::vector<double> p(c.seqlen_k), slope(c.seqlen_k, 1.0);
  double sum = c.has_sinks ? std::exp(x.sinks.at(0, h, 0, 0)) : 0.0;
  for (int64_t j = 0; j < c.seqlen_k; ++j) {
    if (j < i + offset + c.lo || j > i + offset + c.hi) continue;
    double s = Pair(c, &x.q.at(b, h, i, 0), &x.k.at(b, g, j, 0), x.w.data.data()).score;
    if (c.softcap > 0) {
      const double t = std::tanh(s / c.softcap);
      s = c.softcap * t;
      slope[j] = 1 - t * t;
    }
    sum += p[j] = std::exp(s);
  }
  for (double& value : p) value = sum > 0 ? value / sum : 0.0;
  x.lse.at(b, h, i, 0) = std::log(sum);
  naive_statistics(c, x, b, h, i, p);
  for (int64_t d = 0; d < c.head_dim_v; ++d) x.out.at(b, h, i, d) = 0;
  for (int64_t j = 0; j < c.seqlen_k; ++j)
    for (int64_t d = 0; d < c.head_dim_v; ++d) x.out.at(b, h, i, d) += p[j] * x.v.at(b, g, j, d);

  const double* dout = &x.dout.at(b, h, i, 0);
  const double delta = dot(dout, &x.out.at(b, h, i, 0), c.head_dim_v) - x.dlse.at(b, h, i, 0);
  if (c.has_sinks) x.dsinks.at(0, h, 0, 0) -= delta * std::exp(x.sinks.at(0, h, 0, 0)) / sum;
  for (int64_t d = 0; d < c.head_dim; ++d) x.dq.at(b, h, i, d) = 0;
  for (int64_t j = 0; j < c.seqlen_k; ++j) {
    if (p[j] == 0) continue;
    const double ds = p[j] * (dot(dout, &x.v.at(b, g, j, 0), c.head_dim_v) - delta) * slope[j];
    const Pair pair(c, &x.q.at(b, h, i, 0), &x.k.at(b, g, j, 0), x.w.data.data());
    for (int64_t d = 0; d < c.head_dim_v; ++d) x.dv.at(b, g, j, d) += p[j] * dout[d];
    for (int64_t d = 0; d < c.head_dim; ++d) x.dq.at(b, h, i, d) += ds * pair.by_q[d];
    for (int64_t d = 0; d < c.head_dim; ++d) x.dk.at(b, g, j, d) += ds * pair.by_k[d];
    for (int64_t d = 0; d < c.head_dim; ++d) x.dw.at(0, 0, 0, d) += ds * pair.by_w[d];
  }
}

void naive(const Case& c, Problem<double>& x) {
  for (Array<double>* array : {&x.dk, &x.dv, &x.dsinks, &x.dw, &x.received, &x.pooled})
    std::fill(array->data.begin(), array->data.end(), 0.0);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.num_heads; ++h)
      for (int64_t i = 0; i < c.seqlen_q; ++i) naive_row(c, x, b, h, i);
}

// The largest difference relative to the largest finite value; NaN where one is NaN or an infinity is missed.
template <typename T>
double error(const Array<T>& got, const Array<double>& want) {
  double difference = 0, scale = 1e-30;
  for (size_t n = 0; n < want.data.size(); ++n) {
    const double x = got.data[n], y = want.data[n];
    if (x == y) continue;
    if (!std::isfinite(x) || !std::isfinite(y)) return std::numeric_limits<double>::quiet_NaN();
    difference = std::max(difference, std::fabs(x - y));
    scale = std::max(scale, std::fabs(y));
  }
  return difference / std::max(scale, 1.0);
}

template <typename T>
bool run(const Case& c, const char* isa) {
  Problem<T> x(c, 7);
  Problem<double> want(c, 7);
  // The definition in double of the very numbers that the kernel gets.
  const std::pair<Array<double>*, Array<T>*> inputs[] = {
      {&want.q, &x.q},       {&want.k, &x.k},         {&want.v, &x.v}, {&want.dout, &x.dout},
      {&want.dlse, &x.dlse}, {&want.sinks, &x.sinks}, {&want.w, &x.w}};
  for (const auto& [to, from] : inputs) std::copy(from->data.begin(), from->data.end(), to->data.begin());
  naive(c, want);
  const AttentionBackwardParams p = x.params(c);
  fastattn::cpu_kernels().attention_fwd(p);
  fastattn::cpu_kernels().attention_bwd(p);
  const bool has_summary = c.score == Score::kDot;
  if (has_summary) fastattn::cpu_kernels().summary_fwd(x.summary_params(c));
  const auto summary_error = [&](const auto& got, const auto& exact) {
    return has_summary ? error(got, exact) : 0.0;
  };
  const double bound = sizeof(T) == 8 ? 1e-13 : 2e-5;  // about 100 ulp of the largest value
  bool passed = true;
  const struct {
    const char* name;
    double error;
  } results[] = {{"out", error(x.out, want.out)},
                 {"lse", error(x.lse, want.lse)},
                 {"dq", error(x.dq, want.dq)},
                 {"dk", error(x.dk, want.dk)},
                 {"dv", error(x.dv, want.dv)},
                 {"dsinks", c.has_sinks ? error(x.dsinks, want.dsinks) : 0.0},
                 {"dw", c.score == Score::kAdditive ? error(x.dw, want.dw) : 0.0},
                 {"entropy", summary_error(x.entropy, want.entropy)},
                 {"distance", summary_error(x.distance, want.distance)},
                 {"max_weight", summary_error(x.max_weight, want.max_weight)},
                 {"received", summary_error(x.received, want.received)},
                 {"topk_weights", summary_error(x.topk_weights, want.topk_weights)},
                 {"pooled", summary_error(x.pooled, want.pooled)}};
  for (const auto& result : results) {
    if (result.error <= bound) continue;
    std::printf("FAILED %s float%zu %s: error of %s is %g, bound %g\n", isa, 8 * sizeof(T), c.name,
                result.name, result.error, bound);
    passed = false;
  }
  return passed;
}

}  // namespace

int main() {
  int passed = 0, failed = 0;
  for (const std::string& isa : fastattn::available_isas()) {
    fastattn::set_cpu_isa(isa);
    for (const Case& c : kCases) {
      for (const bool ok : {run<float>(c, isa.c_str()), run<double>(c, isa.c_str())})
        ++(ok ? passed : failed);
    }
    std::printf("%s done\n", isa.c_str());
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}

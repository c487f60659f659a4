// Scores that are sums over the features d of a function of the pair (q_id, k_jd), in place of the product
// q·k: w_d tanh(q_id + k_jd), or (q_id - k_jd)^2, of which score.h takes the logarithm of a kernel. They are
// read and written as the products of gemm.h are, so that everything around them is the same code.
// docs/kernels/additive.md derives the gradients.
#pragma once

#include <algorithm>

#include "convert.h"
#include "gemm.h"

namespace fastattn::FASTATTN_ISA {

// The pair functions: `add` adds a feature's part to the sum; `differentiate` adds ds times the derivatives
// by q_id (but for the factor that `finish_pairs` gives the sums) and by w_d, and returns that by k_jd.
template <class T>
struct AdditivePair {
  const T* w;  // [D]

  FASTATTN_INLINE Vec<T> add(Vec<T> sum, int64_t d, Vec<T> q, Vec<T> k) const {
    return sum + splat(w[d]) * vtanh(q + k);
  }
  static FASTATTN_INLINE Vec<T> differentiate(Vec<T> ds, Vec<T> q, Vec<T> k, Vec<T>& dq, Vec<T>& dw) {
    const Vec<T> t = vtanh(q + k);
    const Vec<T> u = ds * t;
    const Vec<T> g = ds - u * t;
    dw += u;
    dq += g;
    return g;
  }
};

template <class T>
struct DistancePair {
  FASTATTN_INLINE Vec<T> add(Vec<T> sum, int64_t, Vec<T> q, Vec<T> k) const {
    const Vec<T> x = q - k;
    return sum + x * x;
  }
  // ds is that of -r^2 / 2.
  static FASTATTN_INLINE Vec<T> differentiate(Vec<T> ds, Vec<T> q, Vec<T> k, Vec<T>& dq, Vec<T>&) {
    const Vec<T> g = ds * (k - q);
    dq += g;
    return -g;
  }
};

// Rows and vectors of a register tile: enough independent chains for the latency of the division.
constexpr int kPairRows = 2;
constexpr int kPairWidth = 2;

template <class T, int kM, int kN, class Pair>
void pair_tile(const Pair& pair, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc,
               int64_t depth) {
  Vec<T> acc[kM][kN] = {};
  for (int64_t d = 0; d < depth; ++d) {
#pragma GCC unroll 2
    for (int n = 0; n < kN; ++n) {
      const Vec<T> k = load(b + d * ldb + n * kLanes<T>);
#pragma GCC unroll 2
      for (int m = 0; m < kM; ++m) acc[m][n] = pair.add(acc[m][n], d, splat(a[m * lda + d]), k);
    }
  }
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < kN; ++n) store(c + m * ldc + n * kLanes<T>, acc[m][n]);
}

// What gemm_panels does, for a pair function.
template <class T, class Pair>
void pair_panels(const Pair& pair, int64_t rows, int64_t begin, int64_t end, int64_t depth, const T* a,
                 int64_t lda, const T* panels, T* c, int64_t ldc) {
  for (int64_t n = begin; n < end;) {
    const int64_t offset = n % kPanel<T>;
    const bool wide = n + 2 * kLanes<T> <= end && offset + 2 * kLanes<T> <= kPanel<T>;
    const T* b = panels + n / kPanel<T> * kPanel<T> * depth + offset;
    for (int64_t m = 0; m < rows; m += kPairRows) {
      const auto tile = m + 1 == rows ? (wide ? pair_tile<T, 1, 2, Pair> : pair_tile<T, 1, 1, Pair>)
                                      : (wide ? pair_tile<T, 2, 2, Pair> : pair_tile<T, 2, 1, Pair>);
      tile(pair, a + m * lda, lda, b, kPanel<T>, c + m * ldc + n, ldc, depth);
    }
    n += (wide ? kPairWidth : 1) * kLanes<T>;
  }
}

// C[rows, columns begin..end of the packed panels]: q·k (the panels hold scale), the additive score, or r^2.
template <class T>
void score_products(const AttentionParams& p, int64_t rows, int64_t begin, int64_t end, const T* a,
                    int64_t lda, const T* panels, T* c, int64_t ldc) {
  if (p.score == Score::kDot) {
    gemm_panels<T>(rows, begin, end, p.head_dim, a, lda, panels, c, ldc);
  } else if (p.score == Score::kAdditive) {
    const AdditivePair<T> pair{static_cast<const T*>(p.score_weights)};
    pair_panels<T>(pair, rows, begin, end, p.head_dim, a, lda, panels, c, ldc);
  } else {
    pair_panels<T>(DistancePair<T>{}, rows, begin, end, p.head_dim, a, lda, panels, c, ldc);
  }
}

// A tile of rows and keys for pair_gradients; dq, dk, dw have whole vectors, as q and k do.
template <class T>
struct PairTile {
  const T *ds, *q, *k;  // [rows, 64 apart], [rows, ldq], [keys, ldk]
  int64_t ldq, ldk;
  T *dq, *dk;  // [rows, width], [keys, width]
  // [width], in double: a sum over all pairs of a call, most of which cancels, as each row's ds add up to 0.
  double* dw;
  int64_t width, ldds;
};

template <class T, int kM, class Pair>
void pair_gradient_rows(const PairTile<T>& t, int64_t i, int64_t begin, int64_t end) {
  for (int64_t d = 0; d < t.width; d += kLanes<T>) {
    Vec<T> q[kM], dq[kM] = {}, dw{};
    for (int m = 0; m < kM; ++m) q[m] = load(t.q + (i + m) * t.ldq + d);
    for (int64_t j = begin; j < end; ++j) {
      const Vec<T> k = load(t.k + j * t.ldk + d);
      Vec<T> dk = load(t.dk + j * t.width + d);
#pragma GCC unroll 2
      for (int m = 0; m < kM; ++m)
        dk += Pair::differentiate(splat(t.ds[(i + m) * t.ldds + j]), q[m], k, dq[m], dw);
      store(t.dk + j * t.width + d, dk);
    }
    for (int m = 0; m < kM; ++m) {
      T* p = t.dq + (i + m) * t.width + d;
      store(p, load(p) + dq[m]);
    }
    for (int64_t l = 0; l < kLanes<T>; ++l) t.dw[d + l] += static_cast<double>(dw[l]);
  }
}

// Adds what the pairs of rows [0, rows) and keys [begin, end) give to dq, dk and dw.
template <class T>
void pair_gradients(Score score, const PairTile<T>& tile, int64_t rows, int64_t begin, int64_t end) {
  const bool additive = score == Score::kAdditive;
  const auto pairs =
      additive ? pair_gradient_rows<T, 2, AdditivePair<T>> : pair_gradient_rows<T, 2, DistancePair<T>>;
  const auto single =
      additive ? pair_gradient_rows<T, 1, AdditivePair<T>> : pair_gradient_rows<T, 1, DistancePair<T>>;
  int64_t i = 0;
  for (; i + 2 <= rows; i += 2) pairs(tile, i, begin, end);
  if (i < rows) single(tile, i, begin, end);
}

// The factor of a finished sum dq_i or dk_j [head_dim] that does not depend on the pair.
template <class T>
void finish_pairs(const AttentionParams& p, T* sum) {
  if (p.score != Score::kAdditive) return;
  const T* w = static_cast<const T*>(p.score_weights);
  for (int64_t d = 0; d < p.head_dim; ++d) sum[d] *= w[d];
}

// One pair of rows: what ds is multiplied by in dq, dk and dw [head_dim]; q and k have whole vectors.
template <class T>
void pair_slopes(const AttentionParams& p, const T* q, const T* k, T* by_q, T* by_k, T* by_w) {
  for (int64_t d = 0; d < p.head_dim; ++d) {
    by_w[d] = T{0};
    if (p.score == Score::kDot) {
      by_q[d] = k[d];
      by_k[d] = q[d];
    } else if (p.score == Score::kAdditive) {
      by_w[d] = std::tanh(q[d] + k[d]);
      by_q[d] = by_k[d] = T{1} - by_w[d] * by_w[d];
    } else {
      by_q[d] = k[d] - q[d];
      by_k[d] = q[d] - k[d];
    }
  }
}

}  // namespace fastattn::FASTATTN_ISA

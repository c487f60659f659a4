// Gradients of statistics of the weights: what entropy, distance, received mass and pooled sums add to dP.
#pragma once

#include <algorithm>

#include "score.h"
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

template <class T>
class WeightGradients {
 public:
  WeightGradients(const AttentionBackwardParams& p, int64_t b, int64_t h, const Sequence& seq)
      : p_(p), seq_(seq) {
    if (p.dentropy.data != nullptr) entropy_ = row_of(p.dentropy, b, h, 0);
    if (p.ddistance.data != nullptr) distance_ = row_of(p.ddistance, b, h, 0);
    if (p.dreceived.data != nullptr) received_ = row_of(p.dreceived, b, h, 0);
    if (p.dpooled.data != nullptr) pooled_ = row_of(p.dpooled, b, h, 0);
  }

  bool wanted() const {
    return entropy_ != nullptr || distance_ != nullptr || received_ != nullptr || pooled_ != nullptr;
  }

  // dp[c] += dL/dp - product of row i and key j0 + c, c < n, whose ln p is (s[c] - lse) - residual. Both
  // arrays reach to a whole number of vectors.
  void add(int64_t i, int64_t j0, int64_t n, const T* s, T lse, T residual, T product, T* dp) const {
    if (entropy_ != nullptr) add_entropy(entropy_[i * p_.dentropy.row], n, s, lse, residual, dp);
    if (distance_ != nullptr) {
      const T factor = distance_[i * p_.ddistance.row];
      const int64_t ahead = i + seq_.offset() - j0;
      for (int64_t c = 0; c < n; ++c) dp[c] += factor * static_cast<T>(std::abs(ahead - c));
    }
    if (received_ != nullptr)
      for (int64_t c = 0; c < n; ++c) dp[c] += received_[j0 + c];
    if (pooled_ != nullptr) add_pooled(i, j0, n, dp);
    for (int64_t c = 0; c < n; ++c) dp[c] -= product;
  }

 private:
  static const T* row_of(const Tensor& t, int64_t b, int64_t h, int64_t i) {
    return static_cast<const T*>(t.data) + t.offset(b, h, i);
  }

  // d(-p ln p)/dp = -(ln p + 1), for weights that are not 0.
  static void add_entropy(T factor, int64_t n, const T* s, T lse, T residual, T* dp) {
    constexpr T kLeast = static_cast<T>(-1000);
    for (int64_t c = 0; c < n; c += kLanes<T>) {
      const Vec<T> log_p = vmax<T>(splat(kLeast), (load(s + c) - lse) - residual);
      store(dp + c, load(dp + c) - factor * (log_p + T{1}));
    }
  }

  void add_pooled(int64_t i, int64_t j0, int64_t n, T* dp) const {
    const T* cells = pooled_ + cell_of(i, p_.pool_rows, seq_.len_q) * p_.dpooled.row;
    CellWalk walk(j0, p_.pool_cols, seq_.len_k);
    for (int64_t c = 0; c < n; walk.next()) {
      const int64_t next = std::min(n, walk.end - j0);
      for (; c < next; ++c) dp[c] += cells[walk.cell];
    }
  }

  const AttentionBackwardParams& p_;
  const Sequence seq_;
  const T *entropy_ = nullptr, *distance_ = nullptr, *received_ = nullptr, *pooled_ = nullptr;
};

}  // namespace fastattn::FASTATTN_ISA

// The running softmax of the two rows whose scores a thread holds, a quarter of each.
#pragma once

#include "arguments.h"
#include "machine.h"

namespace fastattn::cuda {

constexpr float kInfinity = __builtin_huge_valf();

// A fragment of a [64, N] matrix in a warpgroup: element 4 n + 2 e + c is that of row lane / 4 + 8 e of the
// warp's 16 and of column 8 n + 2 (lane % 4) + c.
FASTATTN_DEVICE constexpr int row_of(int element) { return element / 2 % 2; }
FASTATTN_DEVICE constexpr int column_of(int element) { return element / 4 * 8 + element % 2; }

// A row keeps its maximum until a score exceeds it by so many powers of two. Weights up to 256 are as exact
// as those up to 1, and what was summed before hardly ever shrinks.
constexpr float kSlack = 8;

struct Softmax {
  float max[2] = {-kInfinity, -kInfinity};  // or less by kSlack at most, in the unit of the scores
  float sum[2] = {0, 0};                    // of the columns that this thread holds

  // Turns scores into exp(unit * ln(2) * (s - max)) and returns the factors by which what was summed before
  // shrinks. With one factor for both, the difference costs no instruction: fma(s, unit, -max * unit). Where
  // scores are as large as the largest float (kExact), that product would overflow, and the difference comes
  // first.
  template <bool kExact, int kCount>
  FASTATTN_DEVICE void add(float (&s)[kCount], float unit, float (&factor)[2]) {
    float top[2] = {max[0], max[1]}, base[2];
#pragma unroll
    for (int n = 0; n < kCount; ++n) top[row_of(n)] = fmaxf(top[row_of(n)], s[n]);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      top[e] = fmaxf(top[e], shuffle_xor(top[e], 1));
      top[e] = fmaxf(top[e], shuffle_xor(top[e], 2));
      if ((top[e] - max[e]) * unit <= kSlack) top[e] = max[e];
      base[e] = top[e] == -kInfinity ? 0 : top[e];  // of a row that has seen nothing yet
      factor[e] = exp2_fast((max[e] - base[e]) * unit);
      max[e] = top[e];
      sum[e] *= factor[e];
      if constexpr (!kExact) base[e] *= unit;
    }
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int e = row_of(n);
      s[n] = kExact ? exp2_fast((s[n] - base[e]) * unit) : exp2_fast(fmaf(s[n], unit, -base[e]));
      sum[e] += s[n];
    }
  }

  // The sums of whole rows.
  FASTATTN_DEVICE void finish() {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      sum[e] += shuffle_xor(sum[e], 1);
      sum[e] += shuffle_xor(sum[e], 2);
    }
  }
};

}  // namespace fastattn::cuda

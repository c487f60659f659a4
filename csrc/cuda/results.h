// What a row's largest score and the sum of its weights say.
#pragma once

#include "softmax.h"

namespace fastattn::cuda {

struct RowResult {
  float factor;  // of the sums of exp(score - max) v, which makes them out
  float lse;
};

// scale: from the unit of max to natural scores.
FASTATTN_DEVICE RowResult result_of(const ForwardArguments& a, int32_t h, float max, float sum, float scale) {
  float top = max * scale, shrink = 1;
  if (a.call.sinks != nullptr) {  // one more logit, which carries no value
    const float sink = static_cast<const float*>(a.call.sinks)[h];
    const float both = fmaxf(top, sink), base = both == -kInfinity ? 0 : both;
    shrink = exp2_fast((top - base) * kLog2E);
    sum = sum * shrink + exp2_fast((sink - base) * kLog2E);
    top = both;
  }
  if (sum == 0) return {0, -kInfinity};
  return {a.keep_scale * shrink / sum, top + kLn2 * log2_fast(sum)};
}

}  // namespace fastattn::cuda

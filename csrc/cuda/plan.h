// From a call to what a kernel is given: which kernel, which tensor maps, which schedule.
#pragma once

#include "arguments.h"
#include "configs.h"

namespace fastattn::cuda {

// A call, and what AttentionParams does not say of it.
struct ForwardCall {
  AttentionParams params;
  int64_t total_q = 0, total_k = 0;  // rows of packed tensors
};

struct ForwardPlan {
  ForwardArguments arguments;  // without the encoded tensor maps
  TensorMapSpec q, k, v;
  int head_dim;  // of the kernel
  Variant variant;
};

// The call's tensors meet what supports() of fastattn/backends/cuda.py asks for, and the copy engine: 16-byte
// aligned, with strides that are multiples of 16 bytes.
ForwardPlan plan_forward(const ForwardCall& call);

// What each part of a call's keys leaves behind, in float32 numbers.
int64_t partial_size(const ForwardPlan& plan);

// Divides the keys of each tile of rows among `parts` items. room: partial_size for each of them, aligned to
// 8 bytes.
void divide_keys(ForwardPlan& plan, int parts, float* room);

}  // namespace fastattn::cuda

// The compiled kernels. Each (element, head dim) is a translation unit of its own, so that they compile side
// by side.
#pragma once

#include "arguments.h"
#include "configs.h"
#include "elements.h"

namespace fastattn::cuda {

static_assert(sizeof(ForwardArguments) <= 4096, "what a kernel may be given");

template <class Element, int kHeadDim>
struct ForwardKernels {
  // Starts a kernel on a stream of the current device. Throws std::runtime_error where that fails.
  static void launch(Variant variant, const ForwardArguments& a, int blocks, int device, void* stream);
};

// Ends a call whose keys were divided: starts attention_combine behind the kernel of the parts.
template <class Element>
void launch_combine(const ForwardArguments& a, void* stream);

}  // namespace fastattn::cuda

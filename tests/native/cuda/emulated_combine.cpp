// csrc/cuda/attention_combine.cu for the emulated device.
#include "cuda/combine.h"
#include "cuda/kernels.h"
#include "emulated_device.h"

namespace fastattn::cuda {

template <class Element>
void launch_combine(const ForwardArguments& a, void*) {
  const int blocks = static_cast<int>(combine_blocks(a));
  emulated::Launch launch{kCombineThreads, 0, 0, blocks, [](uint32_t) { return std::string("no barrier"); }};
  for (launch.block = 0; launch.block < blocks; ++launch.block)
    emulated::run_block(launch, emulated::device_options().block, [&] { attention_combine<Element>(a); });
}

template void launch_combine<BFloat16>(const ForwardArguments& a, void*);
template void launch_combine<Float16>(const ForwardArguments& a, void*);

}  // namespace fastattn::cuda

// csrc/cuda/sm90_attention_fwd.cu for the emulated device: the blocks of a launch run one after the other.
#include "cuda/kernels.h"
#include "cuda/sm90_attention_fwd.h"
#include "emulated_device.h"

namespace fastattn::cuda {

namespace {

// What the n-th barrier of shared memory is for.
std::string barrier_name(int n, int stages) {
  if (n < 2) return n == 0 ? "q is there" : "q may be overwritten";
  const char* const names[] = {"k is there", "k may be overwritten", "v is there", "v may be overwritten"};
  return std::string(names[(n - 2) / stages]) + ", stage " + std::to_string((n - 2) % stages);
}

template <class Traits>
void run(const ForwardArguments& a, int blocks) {
  const uint32_t first = emulated::kSharedBase + Traits::kBarriersAt;
  emulated::device_options().keys = Traits::kKeys;
  emulated::Options options = emulated::device_options().block;
  options.fault_barrier = first + 8 * options.fault_barrier;
  emulated::Launch launch{Traits::kThreads, static_cast<uint32_t>(Traits::kConfig.shared_bytes()), 0, blocks,
                          [&](uint32_t barrier) {
                            return "'" +
                                   barrier_name(static_cast<int>(barrier - first) / 8, Traits::kStages) + "'";
                          }};
  for (launch.block = 0; launch.block < blocks; ++launch.block)
    emulated::run_block(launch, options, [&] { attention_fwd<Traits>(a); });
}

}  // namespace

template <class Element, int kHeadDim>
void ForwardKernels<Element, kHeadDim>::launch(Variant variant, const ForwardArguments& a, int blocks, int,
                                               void*) {
  with_kernel<Element, kHeadDim>(variant, [&](auto traits) { run<decltype(traits)>(a, blocks); });
}

template struct ForwardKernels<FASTATTN_ELEMENT, FASTATTN_HEAD_DIM>;

}  // namespace fastattn::cuda

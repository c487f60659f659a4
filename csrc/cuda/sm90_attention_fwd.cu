// The forward kernels of one element type and head dim: compiled with FASTATTN_ELEMENT and FASTATTN_HEAD_DIM
// defined.
#include "sm90_attention_fwd.h"

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastattn::cuda {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    sm90_attention_fwd(const __grid_constant__ ForwardArguments arguments) {
  attention_fwd<Traits>(arguments);
}

namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Lets a kernel have more shared memory than 48 KB; where this is the first use of the kernel, the driver
// loads it. Neither is work of a stream, yet CUDA may refuse such calls while one is captured into a graph.
void allow_shared_memory(const void* kernel, int bytes) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), "sm90_attention_fwd could not ask for shared memory");
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  cudaThreadExchangeStreamCaptureMode(&mode);
  check(error, "sm90_attention_fwd could not get its shared memory");
}

template <class Traits>
void launch_one(const ForwardArguments& a, int blocks, int device, void* stream) {
  constexpr int kShared = Traits::kConfig.shared_bytes();
  const void* kernel = reinterpret_cast<const void*>(&sm90_attention_fwd<Traits>);
  static std::atomic<uint64_t> allowed{0};  // devices, a bit each
  const uint64_t bit = uint64_t{1} << (device & 63);
  if (device > 63 || (allowed.load(std::memory_order_relaxed) & bit) == 0) {
    allow_shared_memory(kernel, kShared);
    allowed.fetch_or(bit, std::memory_order_relaxed);
  }
  void* parameters[] = {const_cast<ForwardArguments*>(&a)};
  check(cudaLaunchKernel(kernel, dim3(blocks), dim3(Traits::kThreads), parameters, kShared,
                         static_cast<cudaStream_t>(stream)),
        "sm90_attention_fwd could not be launched");
}

}  // namespace

template <class Element, int kHeadDim>
void ForwardKernels<Element, kHeadDim>::launch(Variant variant, const ForwardArguments& a, int blocks,
                                               int device, void* stream) {
  with_kernel<Element, kHeadDim>(
      variant, [&](auto traits) { launch_one<decltype(traits)>(a, blocks, device, stream); });
}

template struct ForwardKernels<FASTATTN_ELEMENT, FASTATTN_HEAD_DIM>;

}  // namespace fastattn::cuda

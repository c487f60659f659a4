// The kernel that ends a call whose keys were divided.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "combine.h"
#include "kernels.h"

namespace fastattn::cuda {

template <class Element>
__global__ void __launch_bounds__(kCombineThreads)
    attention_combine_kernel(const __grid_constant__ ForwardArguments arguments) {
  attention_combine<Element>(arguments);
}

template <class Element>
void launch_combine(const ForwardArguments& a, void* stream) {
  const void* kernel = reinterpret_cast<const void*>(&attention_combine_kernel<Element>);
  void* parameters[] = {const_cast<ForwardArguments*>(&a)};
  const cudaError_t error =
      cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(combine_blocks(a))), dim3(kCombineThreads),
                       parameters, 0, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("attention_combine could not be launched: ") +
                             cudaGetErrorString(error));
}

template void launch_combine<BFloat16>(const ForwardArguments& a, void* stream);
template void launch_combine<Float16>(const ForwardArguments& a, void* stream);

}  // namespace fastattn::cuda

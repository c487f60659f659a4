#include "runtime.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <array>
#include <mutex>
#include <stdexcept>

namespace fastattn::cuda {

namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// The driver is not linked, so that the library loads where there is none; cudart finds its functions.
template <class Function>
Function* driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found) != cudaSuccess ||
      found != cudaDriverEntryPointSuccess)
    throw std::runtime_error(std::string("the CUDA driver has no ") + name);
  return reinterpret_cast<Function*>(function);
}

}  // namespace

std::string runtime_problem() {
  int driver = 0, runtime = 0, count = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no CUDA driver";
  cudaRuntimeGetVersion(&runtime);
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver)
    return "the driver is one for CUDA " + version_text(driver) +
           ", and fastattn._cuda was built with CUDA " + version_text(runtime);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count > 0 ? "" : "there is no CUDA device";
}

const char* runtime_device_type() { return "cuda"; }

DeviceFacts device_facts(int device) {
  static std::mutex lock;
  static std::array<DeviceFacts, 64> known{};
  if (device < 0 || device >= static_cast<int>(known.size()))
    throw std::runtime_error("no device has the number " + std::to_string(device));
  const std::lock_guard<std::mutex> guard(lock);
  DeviceFacts& facts = known[device];
  if (facts.capability == 0) {
    int major = 0, minor = 0, multiprocessors = 0;
    for (const auto& [attribute, value] : {std::pair(cudaDevAttrComputeCapabilityMajor, &major),
                                           std::pair(cudaDevAttrComputeCapabilityMinor, &minor),
                                           std::pair(cudaDevAttrMultiProcessorCount, &multiprocessors)}) {
      const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device);
      if (error != cudaSuccess)
        throw std::runtime_error("device " + std::to_string(device) + ": " + cudaGetErrorString(error));
    }
    facts = {10 * major + minor, multiprocessors};
  }
  return facts;
}

TensorMap encode(const TensorMapSpec& spec, DType dtype) {
  static auto* const encode_tiled =
      driver_function<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap),
                "the driver writes a CUtensorMap");
  TensorMap map;
  cuuint64_t size[kMaxRank], stride[kMaxRank - 1];
  cuuint32_t step[kMaxRank];
  for (int d = 0; d < spec.rank; ++d) {
    size[d] = spec.size[d];
    step[d] = 1;
    if (d > 0) stride[d - 1] = spec.stride[d - 1];
  }
  const CUresult result = encode_tiled(
      reinterpret_cast<CUtensorMap*>(&map),
      dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      static_cast<cuuint32_t>(spec.rank), spec.address, size, stride, spec.box, step,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      spec.swizzle == Swizzle::k128Bytes ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("the CUDA driver refuses a tensor map, with error " +
                             std::to_string(static_cast<int>(result)));
  return map;
}

}  // namespace fastattn::cuda

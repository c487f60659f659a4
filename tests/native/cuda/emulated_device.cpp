// csrc/cuda/runtime.h, and kernels' launches, for the emulated device.
#include "emulated_device.h"

#include <cstring>
#include <stdexcept>

#include "cuda/runtime.h"

namespace fastattn::cuda {

emulated::DeviceOptions& emulated::device_options() {
  static DeviceOptions options;
  return options;
}

std::string runtime_problem() { return ""; }
const char* runtime_device_type() { return "cpu"; }
DeviceFacts device_facts(int) { return {90, emulated::device_options().multiprocessors}; }

TensorMap encode(const TensorMapSpec& spec, DType) {
  static_assert(sizeof(TensorMapSpec) <= sizeof(TensorMap), "the emulation keeps the parameters as they are");
  const auto refuse = [](const std::string& why) { throw std::runtime_error("tensor map: " + why); };
  if (reinterpret_cast<uintptr_t>(spec.address) % 16 != 0) refuse("its address is not a multiple of 16");
  for (int d = 0; d < spec.rank; ++d) {
    if (spec.size[d] == 0 || spec.size[d] > uint64_t{1} << 32) refuse("a size is out of range");
    if (spec.box[d] == 0 || spec.box[d] > 256) refuse("a box is out of range");
    if (d > 0 && (spec.stride[d - 1] % 16 != 0 || spec.stride[d - 1] == 0 || spec.stride[d - 1] >> 40 != 0))
      refuse("stride " + std::to_string(spec.stride[d - 1]) + " is no multiple of 16 below 2^40");
  }
  TensorMap map{};
  std::memcpy(&map, &spec, sizeof(spec));
  return map;
}

}  // namespace fastattn::cuda

// What starts kernels: the CUDA runtime, or in tests the emulation of a device.
#pragma once

#include <string>

#include "arguments.h"
#include "tensor_map.h"

namespace fastattn::cuda {

// Why nothing can run here, or an empty text.
std::string runtime_problem();

// The kind of memory that kernels read, as torch names it: "cuda", or "cpu" of the emulation.
const char* runtime_device_type();

struct DeviceFacts {
  int capability;  // 90 for 9.0
  int multiprocessors;
};

// Of a device, read once for each.
DeviceFacts device_facts(int device);

// Throws std::runtime_error where the driver does not take the parameters.
TensorMap encode(const TensorMapSpec& spec, DType dtype);

}  // namespace fastattn::cuda

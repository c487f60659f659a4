// The machine that kernels are written for: PTX on a device, and in tests an emulation of it on the host
// (tests/native/cuda/emulation.h), which runs the very same kernels.
#pragma once

#include <cstdint>

#include "elements.h"
#include "tensor_map.h"

#if defined(__CUDACC__)
#define FASTATTN_DEVICE __device__ __forceinline__
#else
#define FASTATTN_DEVICE inline __attribute__((always_inline))
#endif

namespace fastattn::cuda {

// The 64-bit descriptor by which wgmma finds a matrix in shared memory: 16-bit elements, swizzled rows.
// `leading` is the distance in bytes between blocks of one swizzled row's width, read where such a row lies
// along M or N; `stride` that between groups of eight rows.
FASTATTN_DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride,
                                           Swizzle swizzle) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

// The descriptor of a matrix that starts so many bytes behind another's: addresses end within the lower word.
FASTATTN_DEVICE uint64_t moved(uint64_t descriptor, uint32_t bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
  return descriptor >> 32 << 32 | low;
}

}  // namespace fastattn::cuda

#if defined(__CUDACC__)
#include "ptx.h"
#else
#include "emulation.h"
#endif

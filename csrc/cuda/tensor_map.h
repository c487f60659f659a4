// What a bulk-tensor copy is told of a tensor: made by the host, read by the copy engine.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

// How 16-byte pieces of rows of 128 or 64 bytes are permuted in shared memory, numbered as in the descriptors
// of wgmma. Without it the eight rows that a matrix core reads at a time would lie in the same banks.
enum class Swizzle : int { k128Bytes = 1, k64Bytes = 2 };

// Width of a row in shared memory, of which a tensor's columns fill several.
constexpr int swizzle_bytes(Swizzle swizzle) { return swizzle == Swizzle::k128Bytes ? 128 : 64; }

constexpr int kMaxRank = 5;

// The arguments of cuTensorMapEncodeTiled for 16-bit elements. Dimension 0 is the columns, of stride 1.
struct TensorMapSpec {
  void* address = nullptr;  // a multiple of 16
  uint64_t size[kMaxRank] = {1, 1, 1, 1, 1};
  uint64_t stride[kMaxRank - 1] = {16, 16, 16, 16};  // bytes, of dimensions 1 to rank - 1; multiples of 16
  uint32_t box[kMaxRank] = {1, 1, 1, 1, 1};          // elements that one copy brings
  int32_t rank = 0;
  Swizzle swizzle = Swizzle::k128Bytes;
};

// The encoded form, which only the driver and the copy engine know.
struct alignas(128) TensorMap {
  uint64_t words[16];
};

// First element of a copy, dimension 0 first. What lies outside the tensor is filled with zeros.
struct Coordinates {
  int32_t at[kMaxRank];
};

}  // namespace fastattn::cuda

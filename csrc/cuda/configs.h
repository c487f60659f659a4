// Every forward kernel that is compiled, and its tile: the one place to look when tuning.
#pragma once

#include <cstdint>

#include "tensor_map.h"

namespace fastattn::cuda {

// What lies between q·k and softmax decides which kernel runs.
enum class Variant : int {
  kRange = 0,    // scale > 0; each row sees one range of keys: lengths, bands, key ranges
  kGeneral = 1,  // all of the rest: block lists, bool masks, biases, softcap, dropout, any scale
  kFull = 2,     // as kRange, where each row sees every key: at some head dims, wider tiles of keys
};

struct TileConfig {
  int head_dim;  // columns of q, k and v in shared memory
  Variant variant;
  int keys;                // of a tile of k and v; with block lists the 64 of their tiles
  int stages;              // tiles of k, and of v, in shared memory
  int consumers;           // warpgroups that multiply, 64 rows each
  bool ping_pong;          // warpgroups take turns: one multiplies while another makes its softmax
  int producer_registers;  // of a thread, after setmaxnreg
  int consumer_registers;

  constexpr int rows() const { return 64 * consumers; }
  constexpr int threads() const { return 128 * (consumers + 1); }
  // Rows in shared memory are as wide as the widest swizzle that divides the head dim.
  constexpr Swizzle swizzle() const { return head_dim % 64 == 0 ? Swizzle::k128Bytes : Swizzle::k64Bytes; }
  constexpr int chunk() const { return swizzle_bytes(swizzle()) / 2; }  // columns of such a row
  constexpr int chunks() const { return head_dim / chunk(); }
  constexpr int q_bytes() const { return 2 * rows() * head_dim; }
  constexpr int kv_bytes() const { return 2 * keys * head_dim; }
  constexpr int barriers() const { return 2 + 4 * stages; }
  constexpr int shared_bytes() const { return q_bytes() + 2 * stages * kv_bytes() + 8 * barriers(); }
};

// Other head dims that are multiples of 8 take the next wider one of these; the copy engine fills up with
// zeros.
constexpr int kHeadDims[] = {64, 96, 128, 192, 256};

// Of 64 K registers: 128 x 56 + 256 x 224 with two consumers, 128 x 56 + 384 x 152 with three. With fewer
// than 56 the producer's sizes and strides spill. Keys: as many as leave no consumer's register spilled
// (docs/kernels/cuda.md).
constexpr TileConfig kConfigs[] = {
    {64, Variant::kRange, 112, 2, 3, true, 56, 152},    {96, Variant::kRange, 128, 2, 2, true, 56, 224},
    {128, Variant::kRange, 128, 2, 2, true, 56, 224},   {192, Variant::kRange, 112, 2, 2, false, 56, 224},
    {256, Variant::kRange, 64, 2, 2, false, 56, 224},   {64, Variant::kGeneral, 64, 4, 2, false, 56, 224},
    {96, Variant::kGeneral, 64, 4, 2, false, 56, 224},  {128, Variant::kGeneral, 64, 3, 2, false, 56, 224},
    {192, Variant::kGeneral, 64, 2, 2, false, 56, 224}, {256, Variant::kGeneral, 64, 2, 2, false, 56, 224},
    {128, Variant::kFull, 176, 2, 2, true, 56, 224},
};
constexpr int kNumConfigs = sizeof(kConfigs) / sizeof(kConfigs[0]);

constexpr int kSharedMemory = 232448;  // bytes that one block may have on sm_90

constexpr bool all_fit() {
  for (const TileConfig& config : kConfigs)
    if (config.shared_bytes() > kSharedMemory) return false;
  return true;
}
static_assert(all_fit(), "a tile needs more shared memory than there is");

constexpr const TileConfig& config_of(int head_dim, Variant variant) {
  for (const TileConfig& config : kConfigs)
    if (config.head_dim == head_dim && config.variant == variant) return config;
  return kConfigs[0];
}

constexpr bool is_listed(int head_dim, Variant variant) {
  const TileConfig& found = config_of(head_dim, variant);
  return found.head_dim == head_dim && found.variant == variant;
}

// The compiled head dim that holds one of n columns; 0 where there is none.
constexpr int padded_head_dim(int64_t n) {
  for (const int head_dim : kHeadDims)
    if (n <= head_dim) return head_dim;
  return 0;
}

}  // namespace fastattn::cuda

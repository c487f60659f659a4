// A kernel's constants, and where things lie in shared memory.
#pragma once

#include "configs.h"
#include "machine.h"

namespace fastattn::cuda {

template <class ElementType, int kHeadDim, Variant kVariant>
struct Traits {
  using Element = ElementType;
  static constexpr TileConfig kConfig = config_of(kHeadDim, kVariant);
  static_assert(is_listed(kHeadDim, kVariant), "no such kernel in configs.h");
  static constexpr bool kGeneral = kVariant == Variant::kGeneral;
  static constexpr int kDim = kHeadDim;
  static constexpr int kKeys = kConfig.keys;
  static constexpr int kStages = kConfig.stages;
  static constexpr int kConsumers = kConfig.consumers;
  static constexpr int kRows = kConfig.rows();
  static constexpr int kThreads = kConfig.threads();
  static constexpr bool kPingPong = kConfig.ping_pong;
  static constexpr int kProducerRegisters = kConfig.producer_registers;
  static constexpr int kConsumerRegisters = kConfig.consumer_registers;
  static constexpr Swizzle kSwizzle = kConfig.swizzle();
  static constexpr int kRowBytes = swizzle_bytes(kSwizzle);  // of a swizzled row
  static constexpr int kChunk = kConfig.chunk();             // columns of it
  static constexpr int kChunks = kConfig.chunks();
  static constexpr int kQBytes = kConfig.q_bytes();
  static constexpr int kKvBytes = kConfig.kv_bytes();
  static constexpr int kBarriersAt = kQBytes + 2 * kStages * kKvBytes;
};

// Calls run with the traits of a variant's kernel.
template <class Element, int kHeadDim, class Run>
void with_kernel(Variant variant, const Run& run) {
  if constexpr (is_listed(kHeadDim, Variant::kFull)) {
    if (variant == Variant::kFull) return run(Traits<Element, kHeadDim, Variant::kFull>{});
  }
  if (variant == Variant::kRange) return run(Traits<Element, kHeadDim, Variant::kRange>{});
  run(Traits<Element, kHeadDim, Variant::kGeneral>{});
}

// q, the stages of k, the stages of v, barriers. A matrix is [chunk][row][64 or 32 columns]: rows of one
// swizzle's width, as a copy brings them and as products read them.
template <class Traits>
struct SharedMap {
  uint32_t base;

  FASTATTN_DEVICE uint32_t q() const { return base; }
  FASTATTN_DEVICE uint32_t k(int stage) const { return base + Traits::kQBytes + stage * Traits::kKvBytes; }
  FASTATTN_DEVICE uint32_t v(int stage) const { return k(Traits::kStages + stage); }

  FASTATTN_DEVICE uint32_t q_full() const { return barrier(0); }
  FASTATTN_DEVICE uint32_t q_empty() const { return barrier(1); }
  FASTATTN_DEVICE uint32_t k_full(int stage) const { return barrier(2 + stage); }
  FASTATTN_DEVICE uint32_t k_empty(int stage) const { return barrier(2 + Traits::kStages + stage); }
  FASTATTN_DEVICE uint32_t v_full(int stage) const { return barrier(2 + 2 * Traits::kStages + stage); }
  FASTATTN_DEVICE uint32_t v_empty(int stage) const { return barrier(2 + 3 * Traits::kStages + stage); }

 private:
  FASTATTN_DEVICE uint32_t barrier(int n) const { return base + Traits::kBarriersAt + 8 * n; }
};

// How often the stages were used: the n-th use is of one stage, in one phase of its barriers.
template <class Traits>
struct Use {
  uint32_t count = 0;

  FASTATTN_DEVICE int stage() const { return count % Traits::kStages; }
  FASTATTN_DEVICE uint32_t parity() const { return count / Traits::kStages & 1; }
  FASTATTN_DEVICE Use after() const { return {count + 1}; }
};

}  // namespace fastattn::cuda

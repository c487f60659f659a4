// The instructions of sm_90a that kernels use, one function each. tests/native/cuda/emulation.h has the same
// functions for the host; a kernel calls nothing else that a device alone has.
#pragma once

#include "ptx_wgmma.h"

namespace fastattn::cuda {

// --- Who and where
// -------------------------------------------------------------------------------------------

FASTATTN_DEVICE int thread_index() { return threadIdx.x; }
FASTATTN_DEVICE int block_index() { return blockIdx.x; }
FASTATTN_DEVICE int block_count() { return gridDim.x; }

// The same value in all lanes of a warp, so that the compiler keeps it once.
FASTATTN_DEVICE int uniform(int x) { return __shfl_sync(0xFFFFFFFFu, x, 0); }

// First byte of the block's shared memory, which no swizzle may shift: a multiple of 1024.
FASTATTN_DEVICE uint32_t shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return uniform(static_cast<int>(__cvta_generic_to_shared(memory)));
}

// 0, but known only when x is; x is not negative.
FASTATTN_DEVICE uint32_t zero_behind(float x) {
  uint32_t zero;
  asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %1, 0f00000000;\nselp.u32 %0, 8, 0, p;\n}"
               : "=r"(zero)
               : "f"(x));
  return zero;
}

// The same value, of which the compiler knows nothing: what was derived from x before is derived again, and
// takes no registers until then.
FASTATTN_DEVICE int forgotten(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// --- Warps
// ---------------------------------------------------------------------------------------------------

template <class T>
FASTATTN_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, x, mask);
}
template <class T>
FASTATTN_DEVICE T shuffle(T x, int lane) {
  return __shfl_sync(0xFFFFFFFFu, x, lane);
}
FASTATTN_DEVICE uint32_t ballot(bool x) { return __ballot_sync(0xFFFFFFFFu, x); }
FASTATTN_DEVICE bool any(bool x) { return __any_sync(0xFFFFFFFFu, x) != 0; }
FASTATTN_DEVICE void sync_warp() { __syncwarp(); }

// --- Blocks and named barriers (0 is sync_block's)
// -----------------------------------------------------------

FASTATTN_DEVICE void sync_block() { __syncthreads(); }
FASTATTN_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FASTATTN_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- Registers of a warpgroup
// --------------------------------------------------------------------------------

template <int kCount>
FASTATTN_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
FASTATTN_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// --- Barriers in shared memory
// -------------------------------------------------------------------------------

FASTATTN_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
// Makes initialised barriers visible to the copy engine; sync_block must follow.
FASTATTN_DEVICE void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
FASTATTN_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and lets the phase wait for so many bytes of copies.
FASTATTN_DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Waits until the phase of the given parity is complete.
FASTATTN_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// --- Bulk-tensor copies, global to shared
// --------------------------------------------------------------------

FASTATTN_DEVICE void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// Brings the map's box from `from` on to `address`, and tells `barrier` of its bytes.
FASTATTN_DEVICE void copy_5d(uint32_t address, const TensorMap& map, const Coordinates& from,
                             uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(address),
      "l"(&map), "r"(barrier), "r"(from.at[0]), "r"(from.at[1]), "r"(from.at[2]), "r"(from.at[3]),
      "r"(from.at[4])
      : "memory");
}
FASTATTN_DEVICE void copy_4d(uint32_t address, const TensorMap& map, const Coordinates& from,
                             uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(address),
      "l"(&map), "r"(barrier), "r"(from.at[0]), "r"(from.at[1]), "r"(from.at[2]), "r"(from.at[3])
      : "memory");
}

// --- Numbers
// -------------------------------------------------------------------------------------------------

FASTATTN_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTATTN_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class Element>
FASTATTN_DEVICE uint32_t pack(float low, float high) {
  uint32_t both;
  if constexpr (sizeof(Element) == sizeof(BFloat16) && Names<Element>::kIsBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
  return both;
}
FASTATTN_DEVICE float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
FASTATTN_DEVICE float to_float(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Two numbers to an address that is a multiple of 8.
FASTATTN_DEVICE void store_8_bytes(float* to, float first, float second) {
  *reinterpret_cast<float2*>(to) = make_float2(first, second);
}
// 16 bytes to an address that is a multiple of 16.
FASTATTN_DEVICE void store_16_bytes(void* to, const uint32_t (&words)[4]) {
  *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace fastattn::cuda

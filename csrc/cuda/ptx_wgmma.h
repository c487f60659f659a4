// Matrix products of a warpgroup: D[64, N] += A[64, 16] B[16, N], D in float32 registers, B in shared memory.
#pragma once

#include "machine.h"

namespace fastattn::cuda {

template <class Element>
struct Names;
template <>
struct Names<BFloat16> {
  static constexpr bool kIsBFloat16 = true;
};
template <>
struct Names<Float16> {
  static constexpr bool kIsBFloat16 = false;
};

// Registers may be written by the products that follow: comes before the first product after any other
// instruction has written an accumulator or a fragment of A.
FASTATTN_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes a group of products.
FASTATTN_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending groups are not complete.
template <int kPending>
FASTATTN_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving other uses of accumulators across this point.
template <int kCount>
FASTATTN_DEVICE void hold(float (&d)[kCount]) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) asm volatile("" : "+f"(d[n])::"memory");
}

// The accumulators as operands %0, %1, ..., in blocks of 16 (and the first 8 of a block).
#define FASTATTN_D0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTATTN_D1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTATTN_D2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTATTN_D3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTATTN_D4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define FASTATTN_D5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTATTN_D6 \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define FASTATTN_D7 \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FASTATTN_H2 "%32, %33, %34, %35, %36, %37, %38, %39"
#define FASTATTN_H3 "%48, %49, %50, %51, %52, %53, %54, %55"
#define FASTATTN_H5 "%80, %81, %82, %83, %84, %85, %86, %87"
#define FASTATTN_O8(b)                                                                        \
  "+f"(d[b]), "+f"(d[b + 1]), "+f"(d[b + 2]), "+f"(d[b + 3]), "+f"(d[b + 4]), "+f"(d[b + 5]), \
      "+f"(d[b + 6]), "+f"(d[b + 7])
#define FASTATTN_O16(b) FASTATTN_O8(b), FASTATTN_O8(b + 8)
#define FASTATTN_O32(b) FASTATTN_O16(b), FASTATTN_O16(b + 16)
#define FASTATTN_O64(b) FASTATTN_O32(b), FASTATTN_O32(b + 32)

// For each N: the list of accumulators, the operands, and the numbers of the operands behind them: for SS the
// descriptors of A and B and `accumulate`, for RS four registers of A, the descriptor of B and `accumulate`.
#define FASTATTN_LIST_64 FASTATTN_D0 ", " FASTATTN_D1
#define FASTATTN_OUT_64 FASTATTN_O32(0)
#define FASTATTN_SS_64 "%32, %33"
#define FASTATTN_SS_ADD_64 "%34"
#define FASTATTN_RS_64 "{%32, %33, %34, %35}, %36"
#define FASTATTN_RS_ADD_64 "%37"
#define FASTATTN_LIST_80 FASTATTN_D0 ", " FASTATTN_D1 ", " FASTATTN_H2
#define FASTATTN_OUT_80 FASTATTN_O32(0), FASTATTN_O8(32)
#define FASTATTN_SS_80 "%40, %41"
#define FASTATTN_SS_ADD_80 "%42"
#define FASTATTN_LIST_96 FASTATTN_D0 ", " FASTATTN_D1 ", " FASTATTN_D2
#define FASTATTN_OUT_96 FASTATTN_O32(0), FASTATTN_O16(32)
#define FASTATTN_SS_96 "%48, %49"
#define FASTATTN_SS_ADD_96 "%50"
#define FASTATTN_RS_96 "{%48, %49, %50, %51}, %52"
#define FASTATTN_RS_ADD_96 "%53"
#define FASTATTN_LIST_112 FASTATTN_D0 ", " FASTATTN_D1 ", " FASTATTN_D2 ", " FASTATTN_H3
#define FASTATTN_OUT_112 FASTATTN_O32(0), FASTATTN_O16(32), FASTATTN_O8(48)
#define FASTATTN_SS_112 "%56, %57"
#define FASTATTN_SS_ADD_112 "%58"
#define FASTATTN_LIST_128 FASTATTN_D0 ", " FASTATTN_D1 ", " FASTATTN_D2 ", " FASTATTN_D3
#define FASTATTN_OUT_128 FASTATTN_O64(0)
#define FASTATTN_SS_128 "%64, %65"
#define FASTATTN_SS_ADD_128 "%66"
#define FASTATTN_RS_128 "{%64, %65, %66, %67}, %68"
#define FASTATTN_RS_ADD_128 "%69"
#define FASTATTN_LIST_176 \
  FASTATTN_D0 ", " FASTATTN_D1 ", " FASTATTN_D2 ", " FASTATTN_D3 ", " FASTATTN_D4 ", " FASTATTN_H5
#define FASTATTN_OUT_176 FASTATTN_O64(0), FASTATTN_O16(64), FASTATTN_O8(80)
#define FASTATTN_SS_176 "%88, %89"
#define FASTATTN_SS_ADD_176 "%90"
#define FASTATTN_LIST_192 \
  FASTATTN_D0 ", " FASTATTN_D1 ", " FASTATTN_D2 ", " FASTATTN_D3 ", " FASTATTN_D4 ", " FASTATTN_D5
#define FASTATTN_OUT_192 FASTATTN_O64(0), FASTATTN_O32(64)
#define FASTATTN_RS_192 "{%96, %97, %98, %99}, %100"
#define FASTATTN_RS_ADD_192 "%101"
#define FASTATTN_LIST_256                                                                          \
  FASTATTN_D0 ", " FASTATTN_D1 ", " FASTATTN_D2 ", " FASTATTN_D3 ", " FASTATTN_D4 ", " FASTATTN_D5 \
              ", " FASTATTN_D6 ", " FASTATTN_D7
#define FASTATTN_OUT_256 FASTATTN_O64(0), FASTATTN_O64(64)
#define FASTATTN_RS_256 "{%128, %129, %130, %131}, %132"
#define FASTATTN_RS_ADD_256 "%133"

// K-major operands: a row for each row of A, and for each column of D.
#define FASTATTN_PRODUCT_SS(N, TYPE)                                                                        \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " FASTATTN_SS_ADD_##N                                  \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FASTATTN_LIST_##N \
               "}, " FASTATTN_SS_##N ", add, 1, 1, 0, 0;\n}"                                                \
               : FASTATTN_OUT_##N                                                                           \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
// B is MN-major: a row for each of its own rows.
#define FASTATTN_PRODUCT_RS(N, TYPE)                                                                        \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " FASTATTN_RS_ADD_##N                                  \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FASTATTN_LIST_##N \
               "}, " FASTATTN_RS_##N ", add, 1, 1, 1;\n}"                                                   \
               : FASTATTN_OUT_##N                                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)))
#define FASTATTN_PRODUCT(KIND, N)                                                  \
  if constexpr (kN == N) {                                                         \
    if constexpr (Names<Element>::kIsBFloat16) FASTATTN_PRODUCT_##KIND(N, "bf16"); \
    if constexpr (!Names<Element>::kIsBFloat16) FASTATTN_PRODUCT_##KIND(N, "f16"); \
  }

// d = (accumulate ? d : 0) + A B', A [64, 16] and B [N, 16] by descriptors.
template <class Element, int kN>
FASTATTN_DEVICE void product_shared(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kN == 64 || kN == 80 || kN == 96 || kN == 112 || kN == 128 || kN == 176, "no such product");
  FASTATTN_PRODUCT(SS, 64)
  FASTATTN_PRODUCT(SS, 80)
  FASTATTN_PRODUCT(SS, 96)
  FASTATTN_PRODUCT(SS, 112)
  FASTATTN_PRODUCT(SS, 128)
  FASTATTN_PRODUCT(SS, 176)
}

// d = (accumulate ? d : 0) + A B, A [64, 16] as the fragments of the warpgroup's threads, B [16, N] by
// descriptor.
template <class Element, int kN>
FASTATTN_DEVICE void product_registers(float (&d)[kN / 2], const uint32_t* a, uint64_t b, bool accumulate) {
  static_assert(kN == 64 || kN == 96 || kN == 128 || kN == 192 || kN == 256, "no such product");
  FASTATTN_PRODUCT(RS, 64)
  FASTATTN_PRODUCT(RS, 96)
  FASTATTN_PRODUCT(RS, 128)
  FASTATTN_PRODUCT(RS, 192)
  FASTATTN_PRODUCT(RS, 256)
}

}  // namespace fastattn::cuda

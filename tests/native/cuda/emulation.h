// csrc/cuda/ptx.h for the host: the same functions, on a machine that is as late, and as careless, as the
// real one may be. Each thread of a block is a fiber; copies and products complete at random times, and what
// is not complete reads as NaN. emulation.cpp says what is checked.
#pragma once

#include <cmath>
#include <cstring>

namespace fastattn::cuda {

namespace emulated {

enum class Elements : int { kBFloat16, kFloat16 };

// One product as one thread issues it. `a_fragment` is read when the product is made, which may be late.
struct Product {
  Elements elements;
  int columns;
  float* d;
  const uint32_t* a_fragment;  // nullptr: A is in shared memory
  uint64_t a, b;
  bool accumulate;
};

int thread_index();
int block_index();
int block_count();

uint64_t exchange(uint64_t value, int from_lane, bool is_xor);
uint32_t ballot(bool value);
int uniform(int value);
void sync_warp();
void named_barrier(int id, int threads, bool waits);

void barrier_init(uint32_t barrier, int arrivals);
void barrier_arrive(uint32_t barrier, uint32_t expected_bytes);
void barrier_wait(uint32_t barrier, uint32_t parity);
void copy(uint32_t address, const TensorMap& map, const Coordinates& from, uint32_t barrier, int rank);

void issue(const Product& product);
void products_begin();
void products_commit();
void products_wait(int pending);

float exp2(float x);
float log2(float x);
float from_float16(uint16_t bits);
uint16_t to_float16(float x);
uint16_t to_bfloat16(float x);

template <class Element>
struct ElementsOf;
template <>
struct ElementsOf<BFloat16> {
  static constexpr Elements kValue = Elements::kBFloat16;
};
template <>
struct ElementsOf<Float16> {
  static constexpr Elements kValue = Elements::kFloat16;
};

constexpr uint32_t kSharedBase = 1024;  // what a real block has below its memory

}  // namespace emulated

inline int thread_index() { return emulated::thread_index(); }
inline int block_index() { return emulated::block_index(); }
inline int block_count() { return emulated::block_count(); }
inline uint32_t shared_memory() { return emulated::kSharedBase; }
inline int uniform(int x) { return emulated::uniform(x); }
inline int forgotten(int x) { return x; }
inline uint32_t zero_behind(float x) { return x < 0 ? 8 : 0; }

template <class T>
T exchanged(T x, int lane, bool is_xor) {
  static_assert(sizeof(T) <= 8, "one register or two");
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  bits = emulated::exchange(bits, lane, is_xor);
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}
template <class T>
T shuffle_xor(T x, int mask) {
  return exchanged(x, mask, true);
}
template <class T>
T shuffle(T x, int lane) {
  return exchanged(x, lane, false);
}
inline uint32_t ballot(bool x) { return emulated::ballot(x); }
inline bool any(bool x) { return emulated::ballot(x) != 0; }
inline void sync_warp() { emulated::sync_warp(); }

inline void sync_block() { emulated::named_barrier(0, 0, true); }
inline void named_barrier_sync(int id, int threads) { emulated::named_barrier(id, threads, true); }
inline void named_barrier_arrive(int id, int threads) { emulated::named_barrier(id, threads, false); }

template <int kCount>
void fewer_registers() {}
template <int kCount>
void more_registers() {}

inline void barrier_init(uint32_t barrier, int arrivals) { emulated::barrier_init(barrier, arrivals); }
inline void fence_barrier_init() {}
inline void barrier_arrive(uint32_t barrier) { emulated::barrier_arrive(barrier, 0); }
inline void barrier_expect(uint32_t barrier, uint32_t bytes) { emulated::barrier_arrive(barrier, bytes); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) { emulated::barrier_wait(barrier, parity); }

inline void prefetch(const TensorMap&) {}
inline void copy_5d(uint32_t address, const TensorMap& map, const Coordinates& from, uint32_t barrier) {
  emulated::copy(address, map, from, barrier, 5);
}
inline void copy_4d(uint32_t address, const TensorMap& map, const Coordinates& from, uint32_t barrier) {
  emulated::copy(address, map, from, barrier, 4);
}

inline void products_begin() { emulated::products_begin(); }
inline void products_commit() { emulated::products_commit(); }
template <int kPending>
void products_wait() {
  emulated::products_wait(kPending);
}
template <int kCount>
void hold(float (&)[kCount]) {}
template <class Element, int kN>
void product_shared(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  emulated::issue({emulated::ElementsOf<Element>::kValue, kN, d, nullptr, a, b, accumulate});
}
template <class Element, int kN>
void product_registers(float (&d)[kN / 2], const uint32_t* a, uint64_t b, bool accumulate) {
  emulated::issue({emulated::ElementsOf<Element>::kValue, kN, d, a, 0, b, accumulate});
}

inline float exp2_fast(float x) { return emulated::exp2(x); }
inline float log2_fast(float x) { return emulated::log2(x); }

template <class Element>
uint32_t pack(float low, float high) {
  const auto round = emulated::ElementsOf<Element>::kValue == emulated::Elements::kBFloat16
                         ? emulated::to_bfloat16
                         : emulated::to_float16;
  return round(low) | static_cast<uint32_t>(round(high)) << 16;
}
inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}
inline float to_float(Float16 x) { return emulated::from_float16(x.bits); }
inline void store_8_bytes(float* to, float first, float second) {
  to[0] = first;
  to[1] = second;
}
inline void store_16_bytes(void* to, const uint32_t (&words)[4]) { std::memcpy(to, words, 16); }

}  // namespace fastattn::cuda

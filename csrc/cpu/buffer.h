// Scratch memory: aligned to a cache line, grown on demand, never shrunk, uninitialised.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "simd.h"

namespace fastattn::FASTATTN_ISA {

template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  // At least n elements; what they held before is lost if the buffer had to grow.
  T* ensure(int64_t n) {
    if (n <= size_) return data_;
    std::free(data_);
    size_ = 0;
    const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + kCacheLine - 1) / kCacheLine * kCacheLine;
    data_ = static_cast<T*>(std::aligned_alloc(kCacheLine, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
    size_ = n;
    return data_;
  }

  T* data() const { return data_; }

 private:
  static constexpr size_t kCacheLine = 64;
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// A std::vector whose code is this instruction set's own: std::vector<float> would be shared by all.
template <class T>
struct Allocator : std::allocator<T> {
  Allocator() = default;
  template <class U>
  Allocator(const Allocator<U>&) {}
  template <class U>
  struct rebind {
    using other = Allocator<U>;
  };
};

template <class T>
using Vector = std::vector<T, Allocator<T>>;

}  // namespace fastattn::FASTATTN_ISA

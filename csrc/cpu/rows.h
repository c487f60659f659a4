// Rows of q, k, v by (batch, head, index), whatever the layout: dense, packed sequences, or a paged cache.
#pragma once

#include "convert.h"

namespace fastattn::FASTATTN_ISA {

class Rows {
 public:
  Rows(const AttentionParams& p, const Tensor& t, int64_t b, int64_t h, int64_t begin)
      : p_(p), t_(t), b_(b), h_(h), size_(element_size(p.dtype)) {
    base_ = static_cast<const char*>(t.data) + t.offset(b, h, begin) * size_;
  }

  // A cache's rows may lie in pages.
  static Rows of_keys(const AttentionParams& p, const Tensor& t, int64_t b, int64_t h, const Sequence& s) {
    Rows rows(p, t, b, h, s.k_begin);
    rows.paged_ = p.block_table.data != nullptr;
    return rows;
  }

  const void* operator()(int64_t i) const {
    if (!paged_) return base_ + i * t_.row * size_;
    const int32_t* pages = static_cast<const int32_t*>(p_.block_table.data) + b_ * p_.block_table.batch;
    const int64_t page = pages[i / p_.page_size * p_.block_table.row];
    return static_cast<const char*>(t_.data) + t_.offset(page, h_, i % p_.page_size) * size_;
  }

  // Whether row i is at operator()(0) + i * stride() elements.
  bool strided() const { return !paged_; }
  int64_t stride() const { return t_.row; }

 private:
  const AttentionParams& p_;
  const Tensor& t_;
  int64_t b_, h_, size_;
  const char* base_;
  bool paged_ = false;
};

// The stride of copied rows of n elements: an odd number of cache lines, which spreads a column of rows over
// all sets of a cache. Rows a power of two of lines apart share a few sets and push one another out.
template <class T>
constexpr int64_t copy_stride(int64_t n) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  return ((n + kLine - 1) / kLine | 1) * kLine;
}

// Whether kernels can read rows where they lie: in the accumulator's type, whole vectors, one stride apart.
template <class T>
bool readable_in_place(const Rows& rows, DType dtype, int64_t dim) {
  return in_accumulator_type(dtype) && dim % kLanes<T> == 0 && rows.strided();
}

// Whether rows lie next to one another. Those of several heads side by side have a stride that leaves them
// few sets of the caches and a page each: read often enough, a copy is better.
inline bool adjacent(const Rows& rows, int64_t dim) { return rows.strided() && rows.stride() == dim; }

// Whether a strip of columns of many rows can be read where it lies: longer rows leave it fewer sets of the
// L1, and more pages, than a product with them needs.
template <class T>
bool close_rows(const Rows& rows, int64_t dim) {
  return adjacent(rows, dim) && dim * static_cast<int64_t>(sizeof(T)) <= 256;
}

// Whether products can read strips of columns of a tile's 64 rows where they lie. Rows further apart, those
// of many heads side by side, fall into few sets of the L1 and so many pages that its TLB has room for little
// else.
template <class T>
bool strips_in_place(const Rows& rows, DType dtype, int64_t dim) {
  return readable_in_place<T>(rows, dtype, dim) && rows.stride() * static_cast<int64_t>(sizeof(T)) <= 2048;
}

// A block of rows in the accumulator's type, padded to whole vectors, where they lie or copied.
template <class T>
struct Block {
  const T* data;
  int64_t stride;
};

template <class T>
Block<T> block_in_place(const Rows& rows, int64_t first) {
  return {static_cast<const T*>(rows(first)), rows.stride()};
}

template <class T>
Block<T> block_copied(const Rows& rows, DType dtype, int64_t first, int64_t count, int64_t dim, T* scratch) {
  const int64_t stride = copy_stride<T>(dim);
  pack_rows<T>([&](int64_t r) { return rows(first + r); }, dtype, count, dim, scratch, stride);
  return {scratch, stride};
}

}  // namespace fastattn::FASTATTN_ISA

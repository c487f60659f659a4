// Rows of Q or dO as the products of a backward tile read them.
#pragma once

#include "buffer.h"
#include "rows.h"

namespace fastattn::FASTATTN_ISA {

// Of copied rows of either that a task keeps: about what stays in L2 and L3 beside its tile of keys.
constexpr int64_t kKeptBytes = 1 << 20;

// One head's rows, a tile at a time: where they lie if products can read them there, else copied. Copies are
// kept for the next tile of keys if they are few.
template <class T>
class TileRows {
 public:
  // Copies lie in `buffer`, which `heads` of as many rows share; this one is the `index`-th of them. With 0
  // heads none are kept, and tiles may begin anywhere.
  TileRows(const Rows& rows, DType dtype, int64_t dim, int64_t num_rows, Buffer<T>& buffer, int64_t index,
           int64_t heads)
      : rows_(rows), dtype_(dtype), dim_(dim), in_place_(strips_in_place<T>(rows, dtype, dim)) {
    if (in_place_) return;
    const int64_t tiles = (num_rows + kMaskTile - 1) / kMaskTile, tile = kMaskTile * copy_stride<T>(dim);
    const int64_t all = heads * tiles * tile;
    if (heads > 0 && all * static_cast<int64_t>(sizeof(T)) <= kKeptBytes) is_there_.resize(tiles, false);
    copies_ = is_there_.empty() ? buffer.ensure(tile) : buffer.ensure(all) + index * tiles * tile;
  }

  // Rows [i0, i1), at most a tile; from the beginning of one where copies are kept.
  Block<T> load(int64_t i0, int64_t i1) {
    if (in_place_) return block_in_place<T>(rows_, i0);
    if (is_there_.empty()) return block_copied<T>(rows_, dtype_, i0, i1 - i0, dim_, copies_);
    const int64_t stride = copy_stride<T>(dim_);
    T* copy = copies_ + i0 * stride;
    char& is_there = is_there_[i0 / kMaskTile];
    if (!is_there) block_copied<T>(rows_, dtype_, i0, i1 - i0, dim_, copy);
    is_there = true;
    return {copy, stride};
  }

 private:
  const Rows rows_;
  const DType dtype_;
  const int64_t dim_;
  const bool in_place_;
  T* copies_ = nullptr;
  Vector<char> is_there_;  // a tile's copy; empty where none are kept
};

}  // namespace fastattn::FASTATTN_ISA

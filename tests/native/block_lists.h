// The lists of 64x64 tiles of a mask that all batch entries share, made from the mask itself.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "params.h"

namespace smoke {

constexpr int64_t kTile = fastattn::kMaskTile;

// visible [B, H, Lq, Lk]: of each tile nothing, all, or half of the pairs; the same for every batch entry.
inline void fill_tiles(std::vector<uint8_t>& visible, int64_t heads, int64_t rows, int64_t cols,
                       std::mt19937& random) {
  const int64_t size = heads * rows * cols;
  std::vector<unsigned> kinds;
  for (int64_t n = 0; n < heads * (rows / kTile + 1) * (cols / kTile + 1); ++n) kinds.push_back(random() % 3);
  for (int64_t n = 0; n < size; ++n) {
    const int64_t h = n / (rows * cols), i = n / cols % rows, j = n % cols;
    const unsigned kind = kinds[(h * (rows / kTile + 1) + i / kTile) * (cols / kTile + 1) + j / kTile];
    visible[n] = kind == 0 ? 0 : kind == 1 ? 1 : random() % 2;
  }
  for (size_t n = size; n < visible.size(); ++n) visible[n] = visible[n - size];
}

class BlockLists {
 public:
  BlockLists() = default;
  BlockLists(const std::vector<uint8_t>& visible, int64_t heads, int64_t rows, int64_t cols)
      : row_tiles_((rows + kTile - 1) / kTile), col_tiles_((cols + kTile - 1) / kTile) {
    const int64_t tiles = row_tiles_ * col_tiles_;
    std::vector<int32_t> index(heads * tiles);  // -2: nothing, -1: all, else where its bits are
    for (int64_t n = 0; n < heads * tiles; ++n) {
      const int64_t i = n / col_tiles_ % row_tiles_ * kTile, j = n % col_tiles_ * kTile;
      index[n] = add_tile(visible.data() + n / tiles * rows * cols, i, j, rows, cols);
    }
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t r = 0; r < row_tiles_; ++r) {
        row_ptr_.push_back(static_cast<int32_t>(row_list_.size()));
        for (int64_t t = 0; t < col_tiles_; ++t)
          add(index[h * tiles + r * col_tiles_ + t], t, row_list_, row_bits_);
      }
      row_ptr_.push_back(static_cast<int32_t>(row_list_.size()));
      for (int64_t t = 0; t < col_tiles_; ++t) {
        col_ptr_.push_back(static_cast<int32_t>(col_list_.size()));
        for (int64_t r = 0; r < row_tiles_; ++r)
          add(index[h * tiles + r * col_tiles_ + t], r, col_list_, col_bits_);
      }
      col_ptr_.push_back(static_cast<int32_t>(col_list_.size()));
    }
  }

  fastattn::BlockMask view() const {
    fastattn::BlockMask m;
    m.row_ptr = row_ptr_.data();
    m.row_tiles = row_list_.data();
    m.row_bits = row_bits_.data();
    m.col_ptr = col_ptr_.data();
    m.col_tiles = col_list_.data();
    m.col_bits = col_bits_.data();
    m.bits = bits_.data();
    m.row_head = row_tiles_ + 1;
    m.col_head = col_tiles_ + 1;
    return m;
  }

 private:
  static void add(int32_t index, int64_t tile, std::vector<int32_t>& list, std::vector<int32_t>& bits) {
    if (index == -2) return;
    list.push_back(static_cast<int32_t>(tile));
    bits.push_back(index);
  }

  int32_t add_tile(const uint8_t* visible, int64_t i0, int64_t j0, int64_t rows, int64_t cols) {
    uint64_t words[kTile] = {};
    int64_t count = 0, size = 0;
    for (int64_t i = i0; i < i0 + kTile && i < rows; ++i)
      for (int64_t j = j0; j < j0 + kTile && j < cols; ++j, ++size) {
        if (!visible[i * cols + j]) continue;
        words[i - i0] |= uint64_t{1} << (j - j0);
        ++count;
      }
    if (count == 0) return -2;
    if (count == size) return -1;
    bits_.insert(bits_.end(), words, words + kTile);
    return static_cast<int32_t>(bits_.size() / kTile - 1);
  }

  int64_t row_tiles_ = 0, col_tiles_ = 0;
  std::vector<int32_t> row_ptr_, row_list_, row_bits_, col_ptr_, col_list_, col_bits_;
  std::vector<uint64_t> bits_;
};

}  // namespace smoke

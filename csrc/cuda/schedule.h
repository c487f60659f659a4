// Which tiles of rows a block computes, and in which order: known from the sizes alone, so blocks need no
// counter.
#pragma once

#include <cstdint>

#include "../params.h"

namespace fastattn::cuda {

struct WorkItem {
  int32_t row_tile, head, batch;  // head: of q, or of k where a tile packs all heads of a group
  int32_t part;                   // of the tile's keys
};

// Tiles of all heads, each as often as its keys have parts. Heads come in sections whose keys and values fit
// into the L2 cache together, and within a section tiles come from the last rows to the first: with a causal
// mask from the longest to the shortest.
struct Schedule {
  int32_t row_tiles = 0;
  int32_t heads = 0;    // of q, or of k where tiles pack the heads of a group
  int32_t section = 1;  // heads (of any batch entry) in a section; the last one may be smaller
  int32_t all_heads = 0;
  int32_t parts = 1;  // of the keys of each tile, which lie side by side
  int32_t size = 0;   // items

  FASTATTN_INLINE WorkItem item(int32_t number) const {
    const int32_t index = number / parts;
    const int32_t per_section = section * row_tiles;
    const int32_t first = index / per_section * section, within = index % per_section;
    const int32_t width = all_heads - first < section ? all_heads - first : section;
    const int32_t head = first + within % width;
    return {row_tiles - 1 - within / width, head % heads, head / heads, number % parts};
  }
};

// The items that one of `blocks` blocks takes: dealt out there and back, so that whoever got the longest tile
// of a round gets the shortest of the next.
class Deal {
 public:
  FASTATTN_INLINE Deal(int32_t size, int32_t block, int32_t blocks)
      : size_(size), blocks_(blocks), start_(0), within_(block) {}

  FASTATTN_INLINE bool more() const { return index() < size_; }
  FASTATTN_INLINE int32_t index() const { return start_ + within_; }
  FASTATTN_INLINE void next() {
    start_ += blocks_;
    within_ = blocks_ - 1 - within_;
  }

 private:
  int32_t size_, blocks_, start_, within_;  // start_: of the round
};

}  // namespace fastattn::cuda

// The two rows of a tile whose scores a thread holds.
#pragma once

#include "softmax.h"
#include "tiles.h"

namespace fastattn::cuda {

struct ThreadRows {
  int32_t i[2];  // query position, h the head; of a row that is not there, those of the tile's last
  int32_t h[2];
  bool exists[2];
  KeyRange range[2];

  FASTATTN_DEVICE ThreadRows(const ForwardArguments& a, const RowTile& tile, int consumer) {
    const int thread = thread_index() % 128;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int32_t row = 64 * consumer + thread / 32 * 16 + thread % 32 / 4 + 8 * e;
      const int32_t position = row / a.group;
      i[e] = smaller(tile.i0 + position, tile.last);
      h[e] = tile.h + row % a.group;
      exists[e] = position < a.positions && tile.i0 + position <= tile.last;
      range[e] = key_range(a, tile.entry, tile.b, i[e]);
    }
  }

  // Hides what lies outside the rows' ranges of keys from scores of keys from j0 on.
  template <int kCount>
  FASTATTN_DEVICE void hide_outside(int32_t j0, float (&s)[kCount]) const {
    const int32_t column = j0 + 2 * (thread_index() % 4);
    uint32_t from[2], width[2];  // one unsigned comparison tests both ends
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      from[e] = static_cast<uint32_t>(column - range[e].begin);
      width[e] = range[e].end > range[e].begin ? range[e].end - range[e].begin : 0;
    }
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int e = row_of(n);
      s[n] = from[e] + column_of(n) < width[e] ? s[n] : -kInfinity;
    }
  }
};

}  // namespace fastattn::cuda

// What lies between q·k and softmax in the general kernels: a new mask or bias is added here. Scores are
// natural.
#pragma once

#include "../philox.h"
#include "rows.h"

namespace fastattn::cuda {

// The element (b, h, i, j) of a tensor that broadcasts.
FASTATTN_DEVICE int64_t pair_offset(const Tensor& t, int32_t b, int32_t h, int32_t i, int32_t j) {
  return t.offset(b, h, i) + j * t.col;
}

FASTATTN_DEVICE float scaled(const ForwardArguments& a, float product) {
  const float s = product * a.scale;
  return a.softcap == 0 ? s : a.softcap * tanhf(s / a.softcap);
}

// With a bias of -inf, -inf whatever s is: a NaN is hidden too.
FASTATTN_DEVICE float biased(const ForwardArguments& a, float s, int32_t b, int32_t h, int32_t i, int32_t j) {
  const int64_t at = pair_offset(a.call.bias, b, h, i, j);
  float bias;
  if (a.call.bias_dtype == DType::kFloat32) {
    bias = static_cast<const float*>(a.call.bias.data)[at];
  } else if (a.call.bias_dtype == DType::kBFloat16) {
    bias = to_float(static_cast<const BFloat16*>(a.call.bias.data)[at]);
  } else {
    bias = to_float(static_cast<const Float16*>(a.call.bias.data)[at]);
  }
  return bias == -kInfinity ? bias : s + bias;
}

FASTATTN_DEVICE float diagonal(const ForwardArguments& a, const Entry& entry, int32_t b, int32_t h, int32_t i,
                               int32_t j) {
  const Tensor& t = a.call.diag;
  const int64_t r = j - i - (a.call.diag_bottom_right ? entry.offset() : 0) - a.call.diag_lo;
  return static_cast<const float*>(t.data)[b * t.batch + h * t.head + r];
}

FASTATTN_DEVICE bool is_visible(const ForwardArguments& a, int32_t b, int32_t h, int32_t i, int32_t j) {
  return static_cast<const uint8_t*>(a.call.mask.data)[pair_offset(a.call.mask, b, h, i, j)] != 0;
}

// Which columns of a tile of a block mask a row sees, one bit each.
FASTATTN_DEVICE uint64_t visible_bits(const ForwardArguments& a, int32_t bits, int32_t i) {
  if (bits == kAllBits) return ~uint64_t{0};
  if (bits == kHidden) return 0;
  return a.call.block_mask.bits[bits * kMaskTile + i % kMaskTile];
}

// From products to scores; -inf for a hidden pair. Addresses are kept inside; what is read in vain is hidden.
template <int kCount>
FASTATTN_DEVICE void make_scores(const ForwardArguments& a, const RowTile& tile, const ThreadRows& rows,
                                 const KeyTile& key, float (&s)[kCount]) {
  const int32_t column = key.j0 + 2 * (thread_index() % 4), last = tile.entry.len_k - 1;
#pragma unroll
  for (int n = 0; n < kCount; ++n) s[n] = scaled(a, s[n]);
  if (a.call.bias.data != nullptr) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int e = row_of(n);
      s[n] = biased(a, s[n], tile.b, rows.h[e], rows.i[e], smaller(column + column_of(n), last));
    }
  }
  if (a.call.diag.data != nullptr) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int e = row_of(n);
      s[n] += diagonal(a, tile.entry, tile.b, rows.h[e], rows.i[e], smaller(column + column_of(n), last));
    }
  }
  if (a.call.mask.data != nullptr) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int e = row_of(n);
      const bool seen = is_visible(a, tile.b, rows.h[e], rows.i[e], smaller(column + column_of(n), last));
      s[n] = seen ? s[n] : -kInfinity;
    }
  }
  if (key.bits != kAllBits) {
    uint64_t seen[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) seen[e] = visible_bits(a, key.bits, rows.i[e]) >> (2 * (thread_index() % 4));
#pragma unroll
    for (int n = 0; n < kCount; ++n) s[n] = (seen[row_of(n)] >> column_of(n) & 1) != 0 ? s[n] : -kInfinity;
  }
}

// Multiplies by 0 what dropout drops; a NaN stays one. A thread holds the columns 8 n + 2 (lane % 4) + c of
// 64, which are all four words of each Philox call that it makes.
template <int kCount>
FASTATTN_DEVICE void drop(const ForwardArguments& a, const RowTile& tile, const ThreadRows& rows, int32_t j0,
                          float (&p)[kCount]) {
  static_assert(kCount == 32, "64 keys");
  const uint64_t seed = static_cast<uint64_t>(*a.call.dropout_seed);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const uint32_t bh = static_cast<uint32_t>(tile.b * a.call.num_heads + rows.h[e]);
#pragma unroll
    for (int low = 0; low < 4; ++low) {  // the column within 16: 8 (low / 2) + 2 (lane % 4) + low % 2
      const uint32_t column = 8 * (low / 2) + 2 * (thread_index() % 4) + low % 2;
      const Philox4 words = philox4x32(16 * (j0 / 64) + column, rows.i[e], bh, 0, seed);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        float& element = p[4 * (2 * w + low / 2) + 2 * e + low % 2];
        element *= words.word[w] >= a.drop_below ? 1.f : 0.f;
      }
    }
  }
}

}  // namespace fastattn::cuda

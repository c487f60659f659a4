// From scale * q·k (or what pair_scores.h puts in its place) to the score that softmax reads, for one (batch,
// head): softcap, or the logarithm of a kernel of the distance, then bias, then mask.
// A new kind of mask or bias is added here, and in no kernel.
#pragma once

#include <algorithm>
#include <cstdint>

#include "convert.h"
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

struct KeyRange {
  int64_t begin = 0;
  int64_t end = 0;

  bool empty() const { return begin >= end; }
};

// Keys per strip where rows are taken one after the other, outside the fast path's tiles.
constexpr int64_t kStrip = 4 * kMaskTile;

// Consecutive keys that some row of a 64-row tile sees. With a block mask, tile_bits[t] belongs to the t-th
// 64-key tile that the run touches (-1: all of it is visible); else it is nullptr.
struct Run {
  int64_t begin = 0;
  int64_t end = 0;
  const int32_t* tile_bits = nullptr;
};

template <class T>
class ScoreRules {
 public:
  ScoreRules(const AttentionParams& params, int64_t batch, int64_t head, const Sequence& sequence)
      : p_(params), b_(batch), h_(head), seq_(sequence) {
    lo_ = std::max(p_.band.lo_top, p_.band.lo_bottom + seq_.offset());
    hi_ = std::min(p_.band.hi_top, p_.band.hi_bottom + seq_.offset());
    has_ranges_ = p_.key_starts.data != nullptr || p_.key_ends.data != nullptr;
  }

  // The keys that the band and the key ranges leave to row i.
  KeyRange row_keys(int64_t i) const {
    KeyRange r{std::max<int64_t>(0, i + lo_), std::min(seq_.len_k, i + hi_ + 1)};
    if (has_ranges_) {
      if (p_.key_starts.data != nullptr) r.begin = std::max<int64_t>(r.begin, key_bound(p_.key_starts, i));
      if (p_.key_ends.data != nullptr) r.end = std::min<int64_t>(r.end, key_bound(p_.key_ends, i));
    }
    return r;
  }

  // The smallest range that holds row_keys of each row in [i0, i1).
  KeyRange rows_keys(int64_t i0, int64_t i1) const {
    if (!has_ranges_) {
      return {std::max<int64_t>(0, i0 + lo_), std::min(seq_.len_k, i1 + hi_)};
    }
    KeyRange hull{seq_.len_k, 0};
    for (int64_t i = i0; i < i1; ++i) {
      const KeyRange r = row_keys(i);
      if (r.empty()) continue;
      hull.begin = std::min(hull.begin, r.begin);
      hull.end = std::max(hull.end, r.end);
    }
    return hull;
  }

  // The rows outside which no row's band reaches the keys [j0, j1).
  KeyRange keys_rows(int64_t j0, int64_t j1) const {
    return {std::max<int64_t>(0, j0 - hi_), std::min(seq_.len_q, j1 - lo_)};
  }

  // Calls visit(run) for the runs of keys within [j0, j1) that rows [i0, i1) of one 64-row tile may see.
  template <class Visit>
  void for_each_run(int64_t i0, int64_t i1, int64_t j0, int64_t j1, const Visit& visit) const {
    KeyRange hull = rows_keys(i0, i1);
    hull.begin = std::max(hull.begin, j0);
    hull.end = std::min(hull.end, j1);
    if (hull.empty()) return;
    const BlockMask& mask = p_.block_mask;
    if (mask.row_ptr == nullptr) return visit(Run{hull.begin, hull.end, nullptr});
    const int32_t* ptr = mask.row_ptr + b_ * mask.row_batch + h_ * mask.row_head + i0 / kMaskTile;
    const int32_t* last = mask.row_tiles + ptr[1];
    const int32_t* tile = std::lower_bound(mask.row_tiles + ptr[0], last, hull.begin / kMaskTile);
    while (tile < last && *tile * kMaskTile < hull.end) {
      const int32_t* stop = tile + 1;
      while (stop < last && *stop == stop[-1] + 1 && *stop * kMaskTile < hull.end) ++stop;
      visit(Run{std::max(hull.begin, *tile * kMaskTile), std::min(hull.end, (stop[-1] + 1) * kMaskTile),
                mask.row_bits + (tile - mask.row_tiles)});
      tile = stop;
    }
  }

  // Calls visit(query tile, tile_bits) for the 64-row tiles that may see keys [j0, j1) of one 64-key tile.
  template <class Visit>
  void for_each_query_tile(int64_t j0, int64_t j1, const Visit& visit) const {
    const KeyRange rows = keys_rows(j0, j1);
    if (rows.empty()) return;
    const int64_t first = rows.begin / kMaskTile, last = (rows.end - 1) / kMaskTile;
    const BlockMask& mask = p_.block_mask;
    if (mask.col_ptr == nullptr) {
      for (int64_t tile = first; tile <= last; ++tile) visit(tile, static_cast<const int32_t*>(nullptr));
      return;
    }
    const int32_t* ptr = mask.col_ptr + b_ * mask.col_batch + h_ * mask.col_head + j0 / kMaskTile;
    for (int32_t n = ptr[0]; n < ptr[1]; ++n)
      if (mask.col_tiles[n] >= first && mask.col_tiles[n] <= last)
        visit(mask.col_tiles[n], mask.col_bits + n);
  }

  // The rows outside which no row sees any of the keys [j0, j1): the tightest that is cheap to know.
  KeyRange visiting_rows(int64_t j0, int64_t j1) const {
    KeyRange rows = keys_rows(j0, j1);
    const BlockMask& mask = p_.block_mask;
    if (rows.empty() || mask.col_ptr == nullptr) return rows;
    KeyRange hull{seq_.len_q, 0};
    const int32_t* ptr = mask.col_ptr + b_ * mask.col_batch + h_ * mask.col_head;
    for (int64_t tile = j0 / kMaskTile; tile * kMaskTile < j1; ++tile) {
      if (ptr[tile] == ptr[tile + 1]) continue;
      hull.begin = std::min<int64_t>(hull.begin, mask.col_tiles[ptr[tile]] * kMaskTile);
      hull.end = std::max<int64_t>(hull.end, (mask.col_tiles[ptr[tile + 1] - 1] + 1) * kMaskTile);
    }
    return {std::max(rows.begin, hull.begin), std::min(rows.end, hull.end)};
  }

  // Whether a score's derivative by what apply() is given is other than 1.
  bool has_slope() const { return p_.softcap > 0 || is_distance(p_.score); }

  // Whether a pair may be out of a kernel's support, where its score is -inf: it counts as hidden.
  bool has_support() const { return is_distance(p_.score); }
  bool hides(T score) const { return has_support() && score == -kInfinity<T>; }

  // s[0, n) holds scale * q·k (the additive score, r^2) of row i with keys [j0, j0 + n), all inside run; on
  // return the scores, and -inf where masked and in the padding [n, padded). slope, where not nullptr, gets
  // the derivatives, by -r^2/2 where a distance is given.
  void apply(const Run& run, int64_t i, int64_t j0, int64_t n, int64_t padded, T* s, T* slope) const {
    if (p_.softcap > 0) apply_softcap(padded, s, slope);
    if (is_distance(p_.score)) apply_kernel(padded, s, slope);
    if (p_.bias.data != nullptr) add_bias(i, j0, n, s);
    if (p_.diag.data != nullptr) add_diagonal(i, j0, n, s);
    apply_mask(run, i, j0, n, padded, s);
  }

  void apply_mask(const Run& run, int64_t i, int64_t j0, int64_t n, int64_t padded, T* s) const {
    const KeyRange row = row_keys(i);
    const int64_t begin = std::clamp<int64_t>(row.begin - j0, 0, padded);
    const int64_t end = std::clamp<int64_t>(std::min(row.end - j0, n), begin, padded);
    std::fill(s, s + begin, -kInfinity<T>);
    std::fill(s + end, s + padded, -kInfinity<T>);
    if (p_.mask.data != nullptr) apply_bool(i, j0 + begin, end - begin, s + begin);
    if (run.tile_bits != nullptr) apply_bits(run, i, j0, n, s);
  }

  // visible[c] of row i and key j0 + c, for n <= kStrip keys inside run: whether neither the mask nor a bias
  // of -inf hides it. What q and k hold plays no part.
  void mark_visible(const Run& run, int64_t i, int64_t j0, int64_t n, bool* visible) const {
    T s[kStrip] = {};
    if (p_.bias.data != nullptr) add_bias(i, j0, n, s);
    if (p_.diag.data != nullptr) add_diagonal(i, j0, n, s);
    apply_mask(run, i, j0, n, n, s);
    for (int64_t c = 0; c < n; ++c) visible[c] = s[c] != -kInfinity<T>;
  }

  // Whether any key is visible to row i.
  bool sees_any(int64_t i) const {
    const KeyRange row = row_keys(i);
    bool seen = false;
    for (int64_t j0 = row.begin / kStrip * kStrip; j0 < row.end && !seen; j0 += kStrip)
      for_each_run(i, i + 1, j0, j0 + kStrip, [&](const Run& run) {
        const int64_t n = run.end - run.begin;
        bool visible[kStrip];
        mark_visible(run, i, run.begin, n, visible);
        for (int64_t c = 0; c < n; ++c) seen |= visible[c];
      });
    return seen;
  }

  // Index into the diagonals of the pair (i, j).
  int64_t diagonal_of(int64_t i, int64_t j) const {
    return j - i - (p_.diag_bottom_right ? seq_.offset() : 0) - p_.diag_lo;
  }

 private:
  int64_t key_bound(const Tensor& bounds, int64_t i) const {
    return static_cast<const int32_t*>(bounds.data)[b_ * bounds.batch + i * bounds.row];
  }

  void apply_softcap(int64_t padded, T* s, T* slope) const {
    const T cap = static_cast<T>(p_.softcap), inverse = static_cast<T>(1.0 / p_.softcap);
    for (int64_t n = 0; n < padded; n += kLanes<T>) {
      const Vec<T> t = vtanh(load(s + n) * inverse);
      store(s + n, t * cap);
      if (slope != nullptr) store(slope + n, 1 - t * t);
    }
  }

  // s holds r^2.
  void apply_kernel(int64_t padded, T* s, T* slope) const {
    const Score kernel = p_.score;
    for (int64_t n = 0; n < padded; n += kLanes<T>) {
      const Vec<T> squared = load(s + n);
      Vec<T> score, by_half_square{};
      if (kernel == Score::kGaussian) {
        score = squared * T(-0.5);
        by_half_square = splat(T{1});
      } else if (kernel == Score::kBoxcar) {
        score = squared <= T{1} ? Vec<T>{} : splat(-kInfinity<T>);
      } else if (kernel == Score::kEpanechnikov) {
        const Vec<T> value = T{1} - squared;
        score = vlog<T>(value);
        by_half_square = value > T{0} ? T{2} / value : by_half_square;
      } else {
        const Vec<T> r = vsqrt<T>(squared), value = T{1} - r;
        score = vlog<T>(value);
        // The slope of r at 0 is taken to be 0.
        by_half_square = value > T{0} ? (r > T{0} ? T{1} / (r * value) : by_half_square) : by_half_square;
      }
      store(s + n, squared == squared ? score : squared);
      if (slope != nullptr) store(slope + n, by_half_square);
    }
  }

  void add_bias(int64_t i, int64_t j0, int64_t n, T* s) const {
    const int64_t offset = p_.bias.offset(b_, h_, i) + j0 * p_.bias.col;
    if (p_.bias.col == 1 && (p_.bias_dtype == DType::kFloat32 || p_.bias_dtype == DType::kFloat64)) {
      const T* bias = static_cast<const T*>(p_.bias.data) + offset;
      for (int64_t c = 0; c < n; ++c) s[c] += bias[c];
      return;
    }
    const char* base = static_cast<const char*>(p_.bias.data);
    const int64_t size = element_size(p_.bias_dtype);
    for (int64_t c = 0; c < n; ++c) {
      T x;
      load_row<T>(base + (offset + c * p_.bias.col) * size, p_.bias_dtype, 1, T{1}, &x);
      s[c] += x;
    }
  }

  void add_diagonal(int64_t i, int64_t j0, int64_t n, T* s) const {
    const T* diag = static_cast<const T*>(p_.diag.data) + p_.diag.offset(b_, h_, 0) + diagonal_of(i, j0);
    for (int64_t c = 0; c < n; ++c) s[c] += diag[c];
  }

  void apply_bool(int64_t i, int64_t j0, int64_t n, T* s) const {
    const int64_t stride = p_.mask.col;
    const uint8_t* visible =
        static_cast<const uint8_t*>(p_.mask.data) + p_.mask.offset(b_, h_, i) + j0 * stride;
    if (stride == 1) {
      for (int64_t c = 0; c < n; ++c) s[c] = visible[c] ? s[c] : -kInfinity<T>;
    } else {
      for (int64_t c = 0; c < n; ++c) s[c] = visible[c * stride] ? s[c] : -kInfinity<T>;
    }
  }

  void apply_bits(const Run& run, int64_t i, int64_t j0, int64_t n, T* s) const {
    const int64_t first_tile = run.begin / kMaskTile;
    for (int64_t c = 0; c < n;) {
      const int64_t j = j0 + c;
      const int64_t stop = std::min(n, (j / kMaskTile + 1) * kMaskTile - j0);
      const int32_t bits_row = run.tile_bits[j / kMaskTile - first_tile];
      if (bits_row >= 0) {
        uint64_t bits = p_.block_mask.bits[bits_row * kMaskTile + i % kMaskTile] >> (j % kMaskTile);
        for (; c + kLanes<T> <= stop; c += kLanes<T>, bits >>= kLanes<T>)
          store(s + c, select_bits<T>(static_cast<uint32_t>(bits & ((1u << kLanes<T>)-1)), load(s + c),
                                      splat(-kInfinity<T>)));
        for (; c < stop; ++c, bits >>= 1)
          if (!(bits & 1)) s[c] = -kInfinity<T>;
      }
      c = stop;
    }
  }

  const AttentionParams& p_;
  const int64_t b_, h_;
  const Sequence seq_;
  int64_t lo_, hi_;
  bool has_ranges_;
};

}  // namespace fastattn::FASTATTN_ISA

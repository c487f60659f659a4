// The shared heart of the backward kernels: from Q, dO and one 64-key tile to the probabilities P and the
// scores' gradient dS = P * (dP - delta), with P = exp(S - lse) recomputed and dP = dO V^T.
#pragma once

#include "buffer.h"
#include "dropout.h"
#include "pair_scores.h"
#include "row_gradients.h"
#include "rows.h"
#include "score.h"
#include "tile_rows.h"
#include "weight_gradients.h"

namespace fastattn::FASTATTN_ISA {

// Keys per tile: its panels of K and V fit in L1 and L2 at head_dim 128. It must be the block masks' tile,
// whose transposed lists say which query tiles see it.
constexpr int64_t kKeyTile = kMaskTile;
constexpr int64_t kGradGroup = 2 * kRows;  // rows whose P and dS are made together

// Packed panels and copied rows of a 64-key tile, copies of query rows, and P and dS of one 64 x 64 tile.
template <class T>
struct GradScratch {
  Buffer<T> key_panels, value_panels, keys, queries, douts, probabilities, gradients;
};

template <class T>
class GradTile {
 public:
  // This is the `index`-th of the `heads` that share the scratch; 0 heads where none do (see TileRows).
  GradTile(const AttentionBackwardParams& p, const RowGradients<T>& rows, int64_t b, int64_t h,
           GradScratch<T>& scratch, int64_t index = 0, int64_t heads = 0)
      : p_(p),
        seq_(sequence_of(p, b)),
        rules_(p, b, h, seq_),
        queries_({p, p.q, b, h, seq_.q_begin}, p.dtype, p.head_dim, seq_.len_q, scratch.queries, index,
                 heads),
        douts_({p, p.dout, b, h, seq_.q_begin}, p.dtype, p.head_dim_v, seq_.len_q, scratch.douts, index,
               heads),
        keys_(Rows::of_keys(p, p.k, b, p.head_kv(h), seq_)),
        values_(Rows::of_keys(p, p.v, b, p.head_kv(h), seq_)),
        dropout_(p),
        weight_gradients_(p, b, h, seq_),
        bh_(static_cast<uint32_t>(b * p.num_heads + h)),
        lse_(rows.lse(b, h)),
        residual_(rows.residual(b, h)),
        delta_(rows.delta(b, h)),
        products_(rows.products(b, h)) {
    key_panels_ = scratch.key_panels.ensure(kKeyTile * p.head_dim);
    value_panels_ = scratch.value_panels.ensure(kKeyTile * p.head_dim_v);
    key_copy_ = scratch.keys.ensure(kKeyTile * copy_stride<T>(p.head_dim));
    probabilities_ = scratch.probabilities.ensure(kMaskTile * kKeyTile);
    gradients_ = scratch.gradients.ensure(kMaskTile * kKeyTile);
  }

  const Sequence& sequence() const { return seq_; }
  const ScoreRules<T>& rules() const { return rules_; }
  const T* probabilities() const { return probabilities_; }  // [64][64], dropped and rescaled
  const T* gradients() const { return gradients_; }          // [64][64]
  const Block<T>& query_block() const { return query_block_; }
  const Block<T>& dout_block() const { return dout_block_; }

  // Whether the pair at `index` of probabilities() lies out of a kernel's support.
  bool hides(int64_t index) const {
    return rules_.has_support() && probabilities_[index] == T{0} && gradients_[index] == T{0};
  }

  // Turns to the keys [j0, j1) of one tile.
  void set_keys(int64_t j0, int64_t j1) {
    j0_ = j0;
    j1_ = j1;
  }

  // Packs that tile, for all heads that share its keys and the scratch.
  void pack_keys() {
    pack_panels<T>([&](int64_t c) { return keys_(j0_ + c); }, p_.dtype, j1_ - j0_, p_.head_dim,
                   static_cast<T>(p_.scale), key_panels_);
    pack_panels<T>([&](int64_t c) { return values_(j0_ + c); }, p_.dtype, j1_ - j0_, p_.head_dim_v, T{1},
                   value_panels_);
    if (!keys_in_place()) block_copied<T>(keys_, p_.dtype, j0_, j1_ - j0_, p_.head_dim, key_copy_);
  }

  // The tile's rows of K, to multiply dS with.
  Block<T> key_block() const {
    if (keys_in_place()) return block_in_place<T>(keys_, j0_);
    return {key_copy_, copy_stride<T>(p_.head_dim)};
  }

  void load_queries(int64_t i0, int64_t i1) {
    query_block_ = queries_.load(i0, i1);
    dout_block_ = douts_.load(i0, i1);
    i0_ = i0;
  }

  // The keys of the tile, relative to it, that rows [i, i + rows) may see.
  KeyRange columns(int64_t i, int64_t rows) const {
    const KeyRange hull = rules_.rows_keys(i, i + rows);
    return {std::max(hull.begin, j0_) - j0_, std::min(hull.end, j1_) - j0_};
  }

  // P and dS of rows [i, i + rows), zero outside `columns` rounded out to whole vectors. With of_bias, dS is
  // the gradient of what is added to the capped score; else that of scale * q·k.
  void compute(const int32_t* tile_bits, int64_t i, int64_t rows, const KeyRange& columns, bool of_bias) {
    const Run run{j0_, j1_, tile_bits};
    const KeyRange range{columns.begin / kLanes<T> * kLanes<T>, round_to_lanes<T>(columns.end)};
    const int64_t r0 = i - i0_, n = range.end - range.begin,
                  keys = std::min(range.end, j1_ - j0_) - range.begin;
    rules_.prefetch(i, rows, j0_ + range.begin, keys);
    T* p0 = probabilities_ + r0 * kKeyTile;
    T* ds0 = gradients_ + r0 * kKeyTile;
    score_products<T>(p_, rows, range.begin, range.end, query_block_.data + r0 * query_block_.stride,
                      query_block_.stride, key_panels_, p0, kKeyTile);
    gemm_panels<T>(rows, range.begin, range.end, p_.head_dim_v, dout_block_.data + r0 * dout_block_.stride,
                   dout_block_.stride, value_panels_, ds0, kKeyTile);
    T slope[kKeyTile], kept[kKeyTile];
    const bool sloped = rules_.has_slope() && !of_bias;
    for (int64_t r = 0; r < rows; ++r) {
      T* prob = p0 + r * kKeyTile + range.begin;
      T* ds = ds0 + r * kKeyTile + range.begin;
      rules_.apply(run, i + r, j0_ + range.begin, keys, n, prob, sloped ? slope : nullptr);
      if (dropout_.active()) {
        std::fill(kept, kept + n, dropout_.template keep_scale<T>());
        dropout_.drop(bh_, i + r, j0_ + range.begin, keys, kept);
      }
      const T lse = lse_[i + r], residual = residual_[i + r], delta = delta_[i + r];
      if (weight_gradients_.wanted())
        weight_gradients_.add(i + r, j0_ + range.begin, keys, prob, lse, residual, products_[i + r], ds);
      for (int64_t c = 0; c < n; c += kLanes<T>) {
        const Vec<T> score = load(prob + c);
        Vec<T> e = vexp<T>((score - lse) - residual);
        Vec<T> d = load(ds + c);
        if (dropout_.active()) {
          const Vec<T> k = load(kept + c);
          d = e * (d * k - delta);
          e = e * k;
        } else {
          d = e * (d - delta);
        }
        if (sloped) d *= load(slope + c);
        // dP of a hidden pair may be anything.
        if (rules_.has_support()) d = score == -kInfinity<T> ? Vec<T>{} : d;
        store(prob + c, e);
        store(ds + c, d);
      }
      clear_outside(p0 + r * kKeyTile, range);
      clear_outside(ds0 + r * kKeyTile, range);
    }
  }

  // A group of rows that sees none of the tile.
  void clear(int64_t i, int64_t rows) {
    const int64_t first = (i - i0_) * kKeyTile;
    std::fill(probabilities_ + first, probabilities_ + first + rows * kKeyTile, T{0});
    std::fill(gradients_ + first, gradients_ + first + rows * kKeyTile, T{0});
  }

 private:
  bool keys_in_place() const { return strips_in_place<T>(keys_, p_.dtype, p_.head_dim); }

  static void clear_outside(T* row, const KeyRange& range) {
    std::fill(row, row + range.begin, T{0});
    std::fill(row + range.end, row + kKeyTile, T{0});
  }

  const AttentionBackwardParams& p_;
  const Sequence seq_;
  const ScoreRules<T> rules_;
  TileRows<T> queries_, douts_;
  const Rows keys_, values_;
  const Dropout dropout_;
  const WeightGradients<T> weight_gradients_;
  const uint32_t bh_;
  const T *lse_, *residual_, *delta_, *products_;
  T *key_panels_, *value_panels_, *key_copy_, *probabilities_, *gradients_;
  Block<T> query_block_{}, dout_block_{};
  int64_t i0_ = 0, j0_ = 0, j1_ = 0;
};

template <class T>
void bias_gradients(const AttentionBackwardParams& p, const RowGradients<T>& rows);

}  // namespace fastattn::FASTATTN_ISA

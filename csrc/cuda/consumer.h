// A warpgroup that multiplies: 64 rows of a tile, in registers from the scores to out.
#pragma once

#include "output.h"

namespace fastattn::cuda {

template <class Traits>
class Consumer {
  static constexpr int kScores = Traits::kKeys / 2;   // registers of a thread: of 64 x keys scores,
  static constexpr int kSums = Traits::kDim / 2;      // of 64 x head_dim sums,
  static constexpr int kWeights = Traits::kKeys / 4;  // of the weights, in pairs

 public:
  FASTATTN_DEVICE Consumer(const ForwardArguments& a, const SharedMap<Traits>& shared, int index)
      : a_(a), shared_(shared), index_(index), leads_(thread_index() % 32 == 0) {}

  FASTATTN_DEVICE void run() {
    if (Traits::kPingPong && index_ == Traits::kConsumers - 1) pass_turn();  // to the first
    for (Deal deal(a_.schedule.size, block_index(), block_count()); deal.more(); deal.next()) {
      const RowTile tile(a_, a_.schedule.item(deal.index()));
      if (!tile.exists()) continue;
      if (64 * index_ >= (tile.last - tile.i0 + 1) * a_.group) {
        stand_by(tile);
        continue;
      }
      Softmax softmax;
      float o[kSums] = {};
      attend(tile, softmax, o);
      const RowTile again(a_, a_.schedule.item(forgotten(deal.index())));
      finish<Traits>(a_, again, ThreadRows(a_, again, index_), softmax, o);
    }
  }

 private:
  // A warpgroup that has no row of the tile, as in decoding, waits and arrives as the others do, and leaves
  // the tensor cores to them.
  FASTATTN_DEVICE void stand_by(const RowTile& tile) {
    KeyTiles<Traits> keys(a_, tile, index_);
    if (!keys.more()) return;
    barrier_wait(shared_.q_full(), q_parity_);
    q_parity_ ^= 1;
    for (bool is_first = true; keys.more(); is_first = false) {
      keys.next();
      barrier_wait(shared_.k_full(use_.stage()), use_.parity());
      if (!is_first) {
        wait_turn();
        pass_turn();
      }
      release(shared_.k_empty(use_.stage()));
      barrier_wait(shared_.v_full(use_.stage()), use_.parity());
      release(shared_.v_empty(use_.stage()));
      use_ = use_.after();
    }
    release(shared_.q_empty());
  }

  FASTATTN_DEVICE void attend(const RowTile& tile, Softmax& softmax, float (&o)[kSums]) {
    KeyTiles<Traits> keys(a_, tile, index_);
    if (!keys.more()) return;
    const ThreadRows rows(a_, tile, index_);
    barrier_wait(shared_.q_full(), q_parity_);
    q_parity_ ^= 1;
    if constexpr (Traits::kGeneral) {
      attend_in_turn(tile, rows, keys, softmax, o);
    } else {
      attend_overlapped(rows, keys, softmax, o);
    }
  }

  // One tile after the other; the other warpgroup multiplies meanwhile, or does not, as it happens.
  FASTATTN_DEVICE void attend_in_turn(const RowTile& tile, const ThreadRows& rows, KeyTiles<Traits>& keys,
                                      Softmax& softmax, float (&o)[kSums]) {
    while (keys.more()) {
      const KeyTile key = keys.next();
      use_.count = uniform(use_.count);
      const int stage = use_.stage();
      barrier_wait(shared_.k_full(stage), use_.parity());
      if (key.bits != kHidden) {
        float s[kScores], factor[2];
        products_begin();
        scores(s, stage);
        products_commit();
        products_wait<0>();
        hold(s);
        release(shared_.k_empty(stage));
        make_scores(a_, tile, rows, key, s);
        if (!key.whole) rows.hide_outside(key.j0, s);
        softmax.template add<true>(s, kLog2E, factor);
        if (a_.drop_below != 0) drop(a_, tile, rows, key.j0, s);
        uint32_t p[kWeights];
        weights(s, p);
        shrink(o, factor);
        barrier_wait(shared_.v_full(stage), use_.parity());
        products_begin();
        sums(o, p, stage);
        products_commit();
        products_wait<0>();
        hold(o);
      } else {
        release(shared_.k_empty(stage));
        barrier_wait(shared_.v_full(stage), use_.parity());
      }
      release(shared_.v_empty(stage));
      use_ = use_.after();
    }
    release(shared_.q_empty());
  }

  // The scores of a tile are multiplied while the weights of the tile before still multiply v, and their
  // softmax is made while v's product runs.
  FASTATTN_DEVICE void attend_overlapped(const ThreadRows& rows, KeyTiles<Traits>& keys, Softmax& softmax,
                                         float (&o)[kSums]) {
    // Wide sums are shrunk while the scores are multiplied, narrow ones as soon as they are there.
    constexpr bool kShrinkLate = Traits::kDim > 128;
    float s[kScores], factor[2];
    uint32_t p[kWeights];
    KeyTile key = keys.next();
    barrier_wait(shared_.k_full(use_.stage()), use_.parity());
    products_begin();
    scores(s, use_.stage());
    products_commit();
    products_wait<0>();
    hold(s);
    release(shared_.k_empty(use_.stage()));
    if (!key.whole) rows.hide_outside(key.j0, s);
    softmax.template add<false>(s, a_.scale_log2, factor);  // of sums that are still 0
    weights(s, p);
    factor[0] = factor[1] = 1;

    while (keys.more()) {
      key = keys.next();
      use_.count = uniform(use_.count);
      const Use<Traits> next = use_.after();
      barrier_wait(shared_.k_full(next.stage()), next.parity());
      wait_turn();
      products_begin();
      scores(s, next.stage());
      products_commit();
      if constexpr (kShrinkLate) shrink(o, factor);
      barrier_wait(shared_.v_full(use_.stage()), use_.parity());
      products_begin();
      sums(o, p, use_.stage());
      products_commit();
      pass_turn();
      products_wait<1>();
      hold(s);
      if (!key.whole) rows.hide_outside(key.j0, s);
      softmax.template add<false>(s, a_.scale_log2, factor);
      // k was done with before; but ptxas moves the wait below up across arithmetic, to where nothing is left
      // to do beside v's product. It does not move it across this arrival, whose address is known when the
      // softmax is.
      release(shared_.k_empty(next.stage()) + zero_behind(softmax.sum[0] + softmax.sum[1]));
      products_wait<0>();
      hold(o);
      release(shared_.v_empty(use_.stage()));
      weights(s, p);
      if constexpr (!kShrinkLate) shrink(o, factor);
      use_ = next;
    }
    release(shared_.q_empty());
    if constexpr (kShrinkLate) shrink(o, factor);
    barrier_wait(shared_.v_full(use_.stage()), use_.parity());
    products_begin();
    sums(o, p, use_.stage());
    products_commit();
    products_wait<0>();
    hold(o);
    release(shared_.v_empty(use_.stage()));
    use_ = use_.after();
  }

  // s = q k', of this warpgroup's rows.
  FASTATTN_DEVICE void scores(float (&s)[kScores], int stage) const {
    constexpr uint32_t kGroup = 8 * Traits::kRowBytes;
    const uint64_t q =
        matrix_descriptor(shared_.q() + 64 * index_ * Traits::kRowBytes, 16, kGroup, Traits::kSwizzle);
    const uint64_t k = matrix_descriptor(shared_.k(stage), 16, kGroup, Traits::kSwizzle);
#pragma unroll
    for (int d = 0; d < Traits::kDim; d += 16) {
      const int chunk = d / Traits::kChunk, within = 2 * (d % Traits::kChunk);
      product_shared<typename Traits::Element, Traits::kKeys>(
          s, moved(q, chunk * Traits::kRows * Traits::kRowBytes + within),
          moved(k, chunk * Traits::kKeys * Traits::kRowBytes + within), d > 0);
    }
  }

  // o += p v.
  FASTATTN_DEVICE void sums(float (&o)[kSums], const uint32_t (&p)[kWeights], int stage) const {
    const uint64_t v = matrix_descriptor(shared_.v(stage), Traits::kKeys * Traits::kRowBytes,
                                         8 * Traits::kRowBytes, Traits::kSwizzle);
#pragma unroll
    for (int j = 0; j < Traits::kKeys; j += 16)
      product_registers<typename Traits::Element, Traits::kDim>(o, p + j / 4, moved(v, j * Traits::kRowBytes),
                                                                true);
  }

  // Accumulators of scores, in pairs, are fragments of the left operand of the next product as they lie.
  FASTATTN_DEVICE void weights(const float (&s)[kScores], uint32_t (&p)[kWeights]) const {
#pragma unroll
    for (int n = 0; n < kWeights; ++n) p[n] = pack<typename Traits::Element>(s[2 * n], s[2 * n + 1]);
  }

  FASTATTN_DEVICE void shrink(float (&o)[kSums], const float (&factor)[2]) const {
    if (!any(factor[0] != 1 || factor[1] != 1)) return;
#pragma unroll
    for (int n = 0; n < kSums; ++n) o[n] *= factor[row_of(n)];
  }

  // A warp has done with what the copy engine may overwrite.
  FASTATTN_DEVICE void release(uint32_t barrier) const {
    sync_warp();
    if (leads_) barrier_arrive(barrier);
  }

  // Barrier n + 1 is the turn of warpgroup n; the one before arrives there.
  FASTATTN_DEVICE void wait_turn() const {
    if constexpr (Traits::kPingPong) named_barrier_sync(1 + index_, 256);
  }
  FASTATTN_DEVICE void pass_turn() const {
    if constexpr (Traits::kPingPong) named_barrier_arrive(1 + (index_ + 1) % Traits::kConsumers, 256);
  }

  const ForwardArguments& a_;
  const SharedMap<Traits>& shared_;
  const int index_;
  const bool leads_;
  uint32_t q_parity_ = 0;
  Use<Traits> use_;
};

}  // namespace fastattn::cuda

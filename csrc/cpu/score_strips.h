// Scores outside the fast path's tiles: a few rows against a strip of keys at a time.
#pragma once

#include "buffer.h"
#include "pair_scores.h"
#include "rows.h"
#include "score.h"

namespace fastattn::FASTATTN_ISA {

// Calls visit(run, r, s, padded) for each run of up to kStrip keys that rows [i0, i0 + rows) of one 64-row
// tile may see and each row i0 + r: s[0, run.end - run.begin) are the row's scores with the run's keys, -inf
// where masked and up to `padded`; visit may overwrite them. They are the bits that the products of panels
// give in any tile: each pair's score is one chain along head_dim in a lane of its own.
template <class T, class Visit>
void for_each_strip(const AttentionParams& p, const ScoreRules<T>& rules, int64_t b, int64_t h, int64_t i0,
                    int64_t rows, const Visit& visit) {
  static thread_local Buffer<T> panels, scores, copies;
  const Sequence seq = sequence_of(p, b);
  const Rows keys = Rows::of_keys(p, p.k, b, p.head_kv(h), seq);
  const Rows queries(p, p.q, b, h, seq.q_begin);
  panels.ensure(kStrip * p.head_dim);
  scores.ensure(rows * kStrip);
  copies.ensure(rows * round_to_lanes<T>(p.head_dim));
  const Block<T> block = block_copied<T>(queries, p.dtype, i0, rows, p.head_dim, copies.data());
  const KeyRange hull = rules.rows_keys(i0, i0 + rows);
  for (int64_t j0 = hull.begin / kStrip * kStrip; j0 < hull.end; j0 += kStrip)
    rules.for_each_run(i0, i0 + rows, j0, j0 + kStrip, [&](const Run& run) {
      const int64_t n = run.end - run.begin, padded = round_to_lanes<T>(n);
      pack_panels<T>([&](int64_t c) { return keys(run.begin + c); }, p.dtype, n, p.head_dim,
                     static_cast<T>(p.scale), panels.data());
      score_products<T>(p, rows, 0, padded, block.data, block.stride, panels.data(), scores.data(), kStrip);
      for (int64_t r = 0; r < rows; ++r) {
        T* s = scores.data() + r * kStrip;
        rules.apply(run, i0 + r, run.begin, n, padded, s, nullptr);
        visit(run, r, s, padded);
      }
    });
}

}  // namespace fastattn::FASTATTN_ISA

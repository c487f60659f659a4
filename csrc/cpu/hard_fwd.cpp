// Hard attention: the one key that each query attends to, by the largest score or drawn from the softmax,
// with no score kept but those of one strip.
//
// A draw is the largest of s_j - log(-log(u_j)) (the Gumbel-max trick), u_j = 1 - r_j with r_j from the word
// of Philox that dropout would read for that pair. The noise is made in double: what decides is its upper
// tail, where u is close to 1, and there float32 has too few values to tell keys apart. It is made only of
// keys that may yet win.
#include <algorithm>
#include <cmath>

#include "../parallel.h"
#include "dropout.h"
#include "isa.h"
#include "score_strips.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// The largest score so far and its key; the first of equals, and a NaN above all.
template <class T>
struct Best {
  T score = -kInfinity<T>;
  int64_t key = -1;

  // Takes in the scores x[0, n) of the keys from j0 on, n a multiple of the lanes or padded by -inf.
  void take(const T* x, int64_t n, int64_t j0) {
    if (score != score) return;
    Vec<T> top = load(x);
    Vec<Int<T>> ordered = top == top;
    for (int64_t c = kLanes<T>; c < n; c += kLanes<T>) {
      const Vec<T> next = load(x + c);
      ordered &= next == next;
      top = vmax<T>(top, next);
    }
    bool has_nan = false;
    for (int lane = 0; lane < kLanes<T>; ++lane) has_nan |= ordered[lane] == 0;
    const T max = reduce_max<T>(top);
    if (!has_nan && !(max > score)) return;
    int64_t c = 0;
    while (has_nan ? x[c] == x[c] : x[c] != max) ++c;
    score = x[c];
    key = j0 + c;
  }
};

// x[l] = s[l] + the Gumbel noise of words[l], a vector's worth.
template <class T>
void add_noise(const uint32_t* words, const T* s, double* x) {
  double u[kLanes<double>];
  for (int l = 0; l < kLanes<double>; ++l) {
    u[l] = 1.0 - (words[l] + 0.5) * 0x1p-32;
    x[l] = static_cast<double>(s[l]);
  }
  store(x, load(x) - vlog<double>(-vlog<double>(load(u))));
}

// Bit l: whether s[l] and its noise may exceed `best`, of a vector's scores s. The noise of u = 1 - r is
// -log(-log(1 - r)) <= -log(r), so that they exceed it only where r < exp(s - best): one exponential in T
// rules out nearly every key, where the noise itself takes two logarithms in double.
template <class T>
uint32_t contenders(const uint32_t* words, const T* s, double best) {
  constexpr T kMargin = static_cast<T>(1 + 1e-5);  // more than s - best and its exponential are rounded by
  const T least = std::nextafter(static_cast<T>(best), -kInfinity<T>);
  T r[kLanes<T>];  // rounded down
  for (int l = 0; l < kLanes<T>; ++l) r[l] = static_cast<T>(static_cast<int32_t>(words[l] >> 8));
  const Vec<T> gap = vmin<T>(Vec<T>{}, load(s) - least);  // NaN passes: it is the second operand
  const uint32_t out = greater_bits<T>(load(r) * static_cast<T>(0x1p-24), vexp<T>(gap) * kMargin);
  return ~out & ((1u << kLanes<T>)-1);
}

// Takes in the scores s[0, n) of row i with the keys from j0 on, each with its noise.
template <class T>
void take_noisy(Best<double>& best, uint64_t seed, uint32_t bh, int64_t i, int64_t j0, int64_t n,
                const T* s) {
  uint32_t words[64];
  T scores[64];
  for (int64_t c = 0; c < n && best.score == best.score;) {
    const int64_t block = (j0 + c) / 64, first = (j0 + c) % 64, stop = std::min(n, c + 64 - first);
    dropout_words(seed, bh, static_cast<uint32_t>(i), static_cast<uint32_t>(block), words);
    std::fill(scores, scores + 64, -kInfinity<T>);
    std::copy(s + c, s + stop, scores + first);
    for (int l = 0; l < 64; l += kLanes<T>) {
      const uint32_t bits = contenders<T>(words + l, scores + l, best.score);
      for (int g = 0; g < kLanes<T>; g += kLanes<double>) {
        if ((bits >> g & ((1u << kLanes<double>)-1)) == 0) continue;
        double x[kLanes<double>];
        add_noise<T>(words + l + g, scores + l + g, x);
        best.take(x, kLanes<double>, 64 * block + l + g);
      }
    }
    c = stop;
  }
}

// The first visible key of a row whose visible scores are all -inf, -1 where it sees none.
template <class T>
int64_t first_visible(const ScoreRules<T>& rules, int64_t i) {
  const KeyRange row = rules.row_keys(i);
  int64_t found = -1;
  for (int64_t j0 = row.begin / kStrip * kStrip; j0 < row.end && found < 0; j0 += kStrip)
    rules.for_each_run(i, i + 1, j0, j0 + kStrip, [&](const Run& run) {
      bool visible[kStrip];
      rules.mark_visible(run, i, run.begin, run.end - run.begin, visible);
      for (int64_t j = run.begin; j < run.end && found < 0; ++j)
        if (visible[j - run.begin]) found = j;
    });
  return found;
}

template <class T>
void choose_rows(const HardParams& p, int64_t b, int64_t h, int64_t i0, int64_t rows) {
  const ScoreRules<T> rules(p, b, h, sequence_of(p, b));
  const uint32_t bh = static_cast<uint32_t>(b * p.num_heads + h);
  Best<T> largest[kMaskTile];
  Best<double> drawn[kMaskTile];
  for_each_strip<T>(p, rules, b, h, i0, rows, [&](const Run& run, int64_t r, const T* s, int64_t padded) {
    if (p.seed == nullptr)
      largest[r].take(s, padded, run.begin);
    else
      take_noisy(drawn[r], static_cast<uint64_t>(*p.seed), bh, i0 + r, run.begin, run.end - run.begin, s);
  });
  for (int64_t r = 0; r < rows; ++r) {
    int64_t key = p.seed == nullptr ? largest[r].key : drawn[r].key;
    if (key < 0 && !rules.has_support()) key = first_visible(rules, i0 + r);
    static_cast<int64_t*>(p.index.data)[p.index.offset(b, h, i0 + r)] = key;
  }
}

}  // namespace

void hard_fwd(const HardParams& p) {
  const int64_t tiles = (p.seqlen_q + kMaskTile - 1) / kMaskTile;
  parallel_tasks(p.num_threads, p.batch * p.num_heads * tiles, [&](int, int64_t n) {
    const int64_t b = n / tiles / p.num_heads, h = n / tiles % p.num_heads, i0 = n % tiles * kMaskTile;
    const int64_t rows = std::min(kMaskTile, p.seqlen_q - i0);
    if (p.dtype == DType::kFloat64)
      choose_rows<double>(p, b, h, i0, rows);
    else
      choose_rows<float>(p, b, h, i0, rows);
  });
}

}  // namespace fastattn::FASTATTN_ISA

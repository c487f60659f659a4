// Dropout's decisions, a block of 64 keys at a time: the four words of one Philox call belong to the keys
// c, c + 16, c + 32 and c + 48 of the block, so that a vector of counters needs no shuffle.
#pragma once

#include <cmath>

#include "../params.h"
#include "../philox.h"
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

// Products of the low halves of 64-bit lanes; what the high halves hold does not matter.
FASTATTN_INLINE Vec<uint64_t> multiply_low_halves(Vec<uint64_t> a, uint32_t b) {
#if defined(__AVX512F__)
  return (Vec<uint64_t>)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (Vec<uint64_t>)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (Vec<uint64_t>)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xFFFFFFFFull) * static_cast<uint64_t>(b);
#endif
}

// Counters in the low halves of 64-bit lanes. The machine multiplies 32 x 32 to 64 bits there, and as it
// ignores the high halves of its operands, a round's low product needs no masking.
struct PhiloxLanes {
  Vec<uint64_t> c0, c1, c2, c3;

  FASTATTN_INLINE void round(uint32_t k0, uint32_t k1) {
    const Vec<uint64_t> p0 = multiply_low_halves(c0, kPhiloxMul0);
    const Vec<uint64_t> p1 = multiply_low_halves(c2, kPhiloxMul1);
    c0 = (p1 >> 32) ^ c1 ^ static_cast<uint64_t>(k0);
    c2 = (p0 >> 32) ^ c3 ^ static_cast<uint64_t>(k1);
    c1 = p1;
    c3 = p0;
  }
};

// words[j] for the keys [64 * block, 64 * block + 64) of row i. All chains advance together: a round of one
// waits for the multiplication of its last.
inline void dropout_words(uint64_t seed, uint32_t bh, uint32_t i, uint32_t block, uint32_t* words) {
  constexpr int kHalf = kLanes<uint64_t>;
  constexpr int kChains = 16 / kHalf;  // an even counter and the odd one above it share 64 bits in the end
  PhiloxLanes chain[kChains];
#pragma GCC unroll 8
  for (int c = 0; c < kChains; ++c) {
    chain[c] = PhiloxLanes{Vec<uint64_t>{}, splat<uint64_t>(i), splat<uint64_t>(bh), Vec<uint64_t>{}};
    for (int n = 0; n < kHalf; ++n)
      chain[c].c0[n] = uint64_t{16} * block + 2 * kHalf * (c / 2) + 2 * n + c % 2;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c) chain[c].round(k0, k1);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
#pragma GCC unroll 4
  for (int c = 0; c < kChains; c += 2) {
    const auto put = [&](int word, Vec<uint64_t> even, Vec<uint64_t> odd) {
      store(words + 16 * word + kHalf * c, (Vec<uint32_t>)((even & 0xFFFFFFFFull) | (odd << 32)));
    };
    put(0, chain[c].c0, chain[c + 1].c0);
    put(1, chain[c].c1, chain[c + 1].c1);
    put(2, chain[c].c2, chain[c + 1].c2);
    put(3, chain[c].c3, chain[c + 1].c3);
  }
}

class Dropout {
 public:
  explicit Dropout(const AttentionParams& p) : active_(p.dropout_seed != nullptr || p.dropout_p >= 1.0) {
    if (!active_) return;
    all_ = p.dropout_p >= 1.0;
    if (!all_) seed_ = static_cast<uint64_t>(*p.dropout_seed);
    threshold_ = static_cast<uint32_t>(all_ ? 0 : std::floor(p.dropout_p * 4294967296.0));
    keep_scale_ = all_ ? 0.0 : 1.0 / (1.0 - p.dropout_p);
  }

  bool active() const { return active_; }

  // What a kept probability is multiplied by.
  template <class T>
  T keep_scale() const {
    return active_ ? static_cast<T>(keep_scale_) : T{1};
  }

  // Zeroes the dropped ones among x[0, n), the keys [j0, j0 + n) of row i. A visible NaN stays NaN.
  template <class T>
  void drop(uint32_t bh, int64_t i, int64_t j0, int64_t n, T* x) const {
    uint32_t words[64];
    for (int64_t c = 0; c < n;) {
      const int64_t j = j0 + c;
      const int64_t stop = std::min(n, (j / 64 + 1) * 64 - j0);
      if (!all_) dropout_words(seed_, bh, static_cast<uint32_t>(i), static_cast<uint32_t>(j / 64), words);
      const uint32_t* word = words + j % 64;
      for (int64_t l = 0; l < stop - c; ++l) x[c + l] *= !all_ && word[l] >= threshold_ ? T{1} : T{0};
      c = stop;
    }
  }

 private:
  bool active_;
  bool all_ = false;
  uint64_t seed_ = 0;
  uint32_t threshold_ = 0;
  double keep_scale_ = 1.0;
};

}  // namespace fastattn::FASTATTN_ISA

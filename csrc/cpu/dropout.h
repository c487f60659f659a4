// Dropout's decisions, a block of 64 keys at a time: the four words of one Philox call belong to the keys
// c, c + 16, c + 32 and c + 48 of the block, so that a vector of counters needs no shuffle.
#pragma once

#include <cmath>

#include "../params.h"
#include "../philox.h"
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

// The high and low halves of 32 x 32-bit products.
FASTATTN_INLINE void multiply_wide(Vec<uint32_t> a, uint32_t b, Vec<uint32_t>& high, Vec<uint32_t>& low) {
  low = a * b;
#if defined(__AVX512F__)
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32((__m512i)a, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
  high = (Vec<uint32_t>)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(b));
  const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
  high = (Vec<uint32_t>)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#else
  for (int n = 0; n < kLanes<uint32_t>; ++n)
    high[n] = static_cast<uint32_t>((static_cast<uint64_t>(a[n]) * b) >> 32);
#endif
}

// words[j] for the keys [64 * block, 64 * block + 64) of row i.
inline void dropout_words(uint64_t seed, uint32_t bh, uint32_t i, uint32_t block, uint32_t* words) {
  for (int first = 0; first < 16; first += kLanes<uint32_t>) {
    Vec<uint32_t> c0, c1 = splat(i), c2 = splat(bh), c3 = splat(0u);
    for (int n = 0; n < kLanes<uint32_t>; ++n) c0[n] = 16 * block + first + n;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      Vec<uint32_t> high0, low0, high1, low1;
      multiply_wide(c0, kPhiloxMul0, high0, low0);
      multiply_wide(c2, kPhiloxMul1, high1, low1);
      c0 = high1 ^ c1 ^ k0;
      c2 = high0 ^ c3 ^ k1;
      c1 = low1;
      c3 = low0;
      k0 += kPhiloxWeyl0;
      k1 += kPhiloxWeyl1;
    }
    store(words + first, c0);
    store(words + 16 + first, c1);
    store(words + 32 + first, c2);
    store(words + 48 + first, c3);
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

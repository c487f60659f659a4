// Between the element types of tensors and the accumulator type of kernels, a row or a panel at a time.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "../params.h"
#include "gemm.h"
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

FASTATTN_INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

FASTATTN_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

FASTATTN_INLINE float bfloat16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }

// Round to nearest even; a NaN stays one.
FASTATTN_INLINE uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40u : rounded);
}

#if !defined(__F16C__)
// Subnormal halves are scaled by a float multiplication, which normalises them exactly.
FASTATTN_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7FFFu;
  const float scaled = bits_to_float(magnitude << 13) * bits_to_float(0x77800000u);  // 2^112
  const uint32_t bits = magnitude >= 0x7C00u ? (magnitude << 13) | 0x7F800000u : float_to_bits(scaled);
  return bits_to_float(bits | sign);
}

FASTATTN_INLINE uint16_t float_to_half(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // rounds above 65504
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits at the bottom
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3F000000u));
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | (rounded >> 13));
}
#endif

// dst[n] = factor * src[n]
template <class T>
void load_row(const void* src, DType dtype, int64_t n, T factor, T* dst) {
  if (dtype == DType::kFloat32 || dtype == DType::kFloat64) {
    const T* x = static_cast<const T*>(src);
    for (int64_t i = 0; i < n; ++i) dst[i] = factor * x[i];
    return;
  }
  const uint16_t* x = static_cast<const uint16_t*>(src);
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) dst[i] = factor * static_cast<T>(bfloat16_to_float(x[i]));
    return;
  }
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    float lane[8];
    _mm256_storeu_ps(lane, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
    for (int l = 0; l < 8; ++l) dst[i + l] = factor * static_cast<T>(lane[l]);
  }
  for (; i < n; ++i) dst[i] = factor * static_cast<T>(_cvtsh_ss(x[i]));
#else
  for (; i < n; ++i) dst[i] = factor * static_cast<T>(half_to_float(x[i]));
#endif
}

// dst[n] = factor * src[n], rounded to dtype
template <class T>
void store_row(const T* src, T factor, DType dtype, int64_t n, void* dst) {
  if (dtype == DType::kFloat32 || dtype == DType::kFloat64) {
    T* y = static_cast<T*>(dst);
    for (int64_t i = 0; i < n; ++i) y[i] = factor * src[i];
    return;
  }
  uint16_t* y = static_cast<uint16_t*>(dst);
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) y[i] = float_to_bfloat16(static_cast<float>(factor * src[i]));
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
#if defined(__F16C__)
    y[i] = _cvtss_sh(static_cast<float>(factor * src[i]), _MM_FROUND_TO_NEAREST_INT);
#else
    y[i] = float_to_half(static_cast<float>(factor * src[i]));
#endif
  }
}

template <class T>
const void* row_address(const Tensor& t, DType dtype, int64_t offset) {
  return static_cast<const char*>(t.data) + offset * element_size(dtype);
}

template <class T>
void* row_address_mutable(const Tensor& t, DType dtype, int64_t offset) {
  return static_cast<char*>(t.data) + offset * element_size(dtype);
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FASTATTN_HAVE_SHUFFLE 1
#endif
#endif

#if defined(FASTATTN_HAVE_SHUFFLE)
template <class T, int... kN>
FASTATTN_INLINE Vec<T> zip_low(Vec<T> a, Vec<T> b, std::integer_sequence<int, kN...>) {
  return __builtin_shufflevector(a, b, (kN % 2 == 0 ? kN / 2 : kLanes<T> + kN / 2)...);
}

template <class T, int... kN>
FASTATTN_INLINE Vec<T> zip_high(Vec<T> a, Vec<T> b, std::integer_sequence<int, kN...>) {
  constexpr int kHalf = kLanes<T> / 2;
  return __builtin_shufflevector(a, b, (kN % 2 == 0 ? kHalf + kN / 2 : kLanes<T> + kHalf + kN / 2)...);
}

// Zipping row m with row m + lanes/2, log2(lanes) times, transposes a square of lanes x lanes.
template <class T>
FASTATTN_INLINE void transpose_square(Vec<T>* rows) {
  constexpr int kN = kLanes<T>;
  using Lanes = std::make_integer_sequence<int, kN>;
#pragma GCC unroll 4
  for (int width = 1; width < kN; width *= 2) {
    Vec<T> next[kN];
#pragma GCC unroll 8
    for (int m = 0; m < kN / 2; ++m) {
      next[2 * m] = zip_low<T>(rows[m], rows[m + kN / 2], Lanes{});
      next[2 * m + 1] = zip_high<T>(rows[m], rows[m + kN / 2], Lanes{});
    }
#pragma GCC unroll 16
    for (int m = 0; m < kN; ++m) rows[m] = next[m];
  }
}
#endif

// One panel: dst[d * kPanel + c] = factor * row_of(c)[d], zero for c >= columns.
// staging holds kLanes padded rows.
template <class T, class RowOf>
void pack_panel(const RowOf& row_of, DType dtype, int64_t columns, int64_t dim, T factor, T* staging, T* dst) {
  constexpr int64_t kN = kLanes<T>;
  const int64_t padded = round_to_lanes<T>(dim);
  for (int64_t c0 = 0; c0 < kPanel<T>; c0 += kN) {
    for (int64_t c = 0; c < kN; ++c) {
      T* row = staging + c * padded;
      if (c0 + c < columns)
        load_row<T>(row_of(c0 + c), dtype, dim, factor, row);
      else
        std::fill(row, row + dim, T{0});
    }
    int64_t d = 0;
#if defined(FASTATTN_HAVE_SHUFFLE)
    for (; d + kN <= dim; d += kN) {
      Vec<T> square[kN];
#pragma GCC unroll 16
      for (int c = 0; c < kN; ++c) square[c] = load(staging + c * padded + d);
      transpose_square<T>(square);
#pragma GCC unroll 16
      for (int c = 0; c < kN; ++c) store(dst + (d + c) * kPanel<T> + c0, square[c]);
    }
#endif
    for (; d < dim; ++d)
      for (int64_t c = 0; c < kN; ++c) dst[d * kPanel<T> + c0 + c] = staging[c * padded + d];
  }
}

// The panels of `columns` rows: what gemm_panels reads.
template <class T, class RowOf>
void pack_panels(const RowOf& row_of, DType dtype, int64_t columns, int64_t dim, T factor, T* staging, T* dst) {
  for (int64_t c = 0; c < columns; c += kPanel<T>)
    pack_panel<T>([&](int64_t n) { return row_of(c + n); }, dtype, columns - c, dim, factor, staging, dst + c * dim);
}

// Rows padded to whole vectors: dst[r * padded + d].
template <class T, class RowOf>
void pack_rows(const RowOf& row_of, DType dtype, int64_t rows, int64_t dim, T* dst) {
  const int64_t padded = round_to_lanes<T>(dim);
  for (int64_t r = 0; r < rows; ++r) {
    load_row<T>(row_of(r), dtype, dim, T{1}, dst + r * padded);
    std::fill(dst + r * padded + dim, dst + (r + 1) * padded, T{0});
  }
}

// Whether kernels may read the rows of a tensor where they lie: in the accumulator's type, and whole vectors.
template <class T>
bool readable_in_place(DType dtype, int64_t dim) {
  return (dtype == DType::kFloat32 || dtype == DType::kFloat64) && dim % kLanes<T> == 0;
}

}  // namespace fastattn::FASTATTN_ISA

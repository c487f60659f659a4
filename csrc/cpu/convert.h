// Between the element types of tensors and the accumulator type of kernels, a row or a panel at a time.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../params.h"
#include "gemm.h"
#include "shuffle.h"
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

// A tensor's element types, as what a row is read by: T itself, or one of these.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
FASTATTN_INLINE T to_accumulator(T x) {
  return x;
}
template <class T>
FASTATTN_INLINE T to_accumulator(BFloat16 x) {
  return static_cast<T>(bfloat16_to_float(x.bits));
}
template <class T>
FASTATTN_INLINE T to_accumulator(Float16 x) {
#if defined(__F16C__)
  return static_cast<T>(_cvtsh_ss(x.bits));
#else
  return static_cast<T>(half_to_float(x.bits));
#endif
}

// Whether tensors of the type hold what kernels compute with.
FASTATTN_INLINE bool in_accumulator_type(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat64;
}

// A vector of consecutive elements.
template <class T, class Source>
FASTATTN_INLINE Vec<T> load_as(const Source* p) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Source, BFloat16> && sizeof(T) == 4)
    return (Vec<T>)_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
  if constexpr (std::is_same_v<Source, Float16> && sizeof(T) == 4)
    return (Vec<T>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<Source, BFloat16> && sizeof(T) == 4)
    return (Vec<T>)_mm256_slli_epi32(
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
  if constexpr (std::is_same_v<Source, Float16> && sizeof(T) == 4)
    return (Vec<T>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
  if constexpr (std::is_same_v<Source, T>) {
    return load(p);
  } else {
    T lane[kLanes<T>];
    for (int n = 0; n < kLanes<T>; ++n) lane[n] = to_accumulator<T>(p[n]);
    return load(lane);
  }
}

// 16 bytes of consecutive elements, in the accumulator's type.
template <class T, class Source>
FASTATTN_INLINE Piece<T> load_piece(const Source* p) {
#if defined(__AVX2__)
  if constexpr (std::is_same_v<Source, BFloat16> && sizeof(T) == 4)
    return (Piece<T>)_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
                                    16);
  if constexpr (std::is_same_v<Source, Float16> && sizeof(T) == 4)
    return (Piece<T>)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#endif
  if constexpr (std::is_same_v<Source, T>) {
    return *reinterpret_cast<const typename PieceOf<T>::unaligned*>(p);
  } else {
    Piece<T> piece;
    for (int n = 0; n < kPiece<T>; ++n) piece[n] = to_accumulator<T>(p[n]);
    return piece;
  }
}

// Calls f with a null pointer of the type that rows of dtype are read by.
template <class T, class F>
FASTATTN_INLINE void with_source(DType dtype, const F& f) {
  if (dtype == DType::kBFloat16)
    f(static_cast<const BFloat16*>(nullptr));
  else if (dtype == DType::kFloat16)
    f(static_cast<const Float16*>(nullptr));
  else
    f(static_cast<const T*>(nullptr));
}

// dst[n] = factor * src[n]
template <class T>
void load_row(const void* src, DType dtype, int64_t n, T factor, T* dst) {
  with_source<T>(dtype, [&](auto* type) {
    const auto* x = static_cast<decltype(type)>(src);
    int64_t d = 0;
    for (; d + kLanes<T> <= n; d += kLanes<T>) store(dst + d, load_as<T>(x + d) * factor);
    for (; d < n; ++d) dst[d] = to_accumulator<T>(x[d]) * factor;
  });
}

FASTATTN_INLINE void store_as(BFloat16* p, float x) { p->bits = float_to_bfloat16(x); }
FASTATTN_INLINE void store_as(Float16* p, float x) {
#if defined(__F16C__)
  p->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  p->bits = float_to_half(x);
#endif
}

// dst[n] = factor * src[n], rounded to dtype
template <class T>
void store_row(const T* src, T factor, DType dtype, int64_t n, void* dst) {
  with_source<T>(dtype, [&](auto* type) {
    using Target = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    Target* y = static_cast<Target*>(dst);
    int64_t d = 0;
    if constexpr (std::is_same_v<Target, T>) {
      for (; d + kLanes<T> <= n; d += kLanes<T>) store(y + d, load(src + d) * factor);
      for (; d < n; ++d) y[d] = src[d] * factor;
    } else {
      for (; d < n; ++d) store_as(y + d, static_cast<float>(src[d] * factor));
    }
  });
}

FASTATTN_INLINE void* row_address(const Tensor& t, DType dtype, int64_t offset) {
  return static_cast<char*>(t.data) + offset * element_size(dtype);
}

// One panel: dst[d * kPanel + c] = factor * row_of(c)[d], zero for columns <= c < columns rounded to vectors.
template <class T, class RowOf>
void pack_panel(const RowOf& row_of, DType dtype, int64_t columns, int64_t dim, T factor, T* dst) {
  constexpr int64_t kN = kLanes<T>;
  with_source<T>(dtype, [&](auto* type) {
    using Source = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const Source* rows[kN];
    for (int64_t c0 = 0; c0 < std::min(columns, kPanel<T>); c0 += kN) {
      const int64_t filled = std::min(kN, columns - c0);
      for (int64_t c = 0; c < filled; ++c) rows[c] = static_cast<const Source*>(row_of(c0 + c));
      int64_t d = 0;
#if defined(FASTATTN_HAVE_SHUFFLE)
      constexpr int kE = kPiece<T>;
      const auto pack_columns = [&](const auto& piece_of) {
        Vec<T> square[kE];
        load_columns<T>(piece_of, square);
#pragma GCC unroll 4
        for (int n = 0; n < kE; ++n) store(dst + (d + n) * kPanel<T> + c0, square[n] * factor);
      };
      if (filled == kN)
        for (; d + kE <= dim; d += kE) pack_columns([&](int c) { return load_piece<T>(rows[c] + d); });
      else
        for (; d + kE <= dim; d += kE)
          pack_columns([&](int c) { return c < filled ? load_piece<T>(rows[c] + d) : Piece<T>{}; });
#endif
      for (; d < dim; ++d) {
        T* out = dst + d * kPanel<T> + c0;
        for (int64_t c = 0; c < filled; ++c) out[c] = to_accumulator<T>(rows[c][d]) * factor;
        for (int64_t c = filled; c < kN; ++c) out[c] = T{0};
      }
    }
  });
}

// The panels of `columns` rows: what gemm_panels reads.
template <class T, class RowOf>
void pack_panels(const RowOf& row_of, DType dtype, int64_t columns, int64_t dim, T factor, T* dst) {
  for (int64_t c = 0; c < columns; c += kPanel<T>)
    pack_panel<T>([&](int64_t n) { return row_of(c + n); }, dtype, columns - c, dim, factor, dst + c * dim);
}

// Rows padded with zeros to whole vectors: dst[r * stride + d].
template <class T, class RowOf>
void pack_rows(const RowOf& row_of, DType dtype, int64_t rows, int64_t dim, T* dst, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    T* row = dst + r * stride;
    load_row<T>(row_of(r), dtype, dim, T{1}, row);
    std::fill(row + dim, row + round_to_lanes<T>(dim), T{0});
  }
}

// Rows [begin, end) of a matrix of `capacity` rows by strips of columns, each strip's rows next to one
// another: what gemm_strips reads. Columns are padded with zeros to whole vectors.
template <class T, class RowOf>
void pack_strips(const RowOf& row_of, DType dtype, int64_t begin, int64_t end, int64_t dim, T* dst,
                 int64_t capacity) {
  with_source<T>(dtype, [&](auto* type) {
    for (int64_t r = begin; r < end; ++r) {
      const auto* row = static_cast<decltype(type)>(row_of(r));
      for_each_strip_of(round_to_lanes<T>(dim) / kLanes<T>, [&](int64_t first, int64_t width) {
        T* out = dst + first * kLanes<T> * capacity + r * width * kLanes<T>;
        for (int64_t d = first * kLanes<T>; d < (first + width) * kLanes<T>; d += kLanes<T>, out += kLanes<T>)
          if (d + kLanes<T> <= dim)
            store(out, load_as<T>(row + d));
          else
            for (int64_t n = 0; n < kLanes<T>; ++n)
              out[n] = d + n < dim ? to_accumulator<T>(row[d + n]) : T{0};
      });
    }
  });
}

}  // namespace fastattn::FASTATTN_ISA

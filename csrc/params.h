// What a kernel is asked to compute: plain structs filled by bindings.cpp, read by every backend's kernels.
#pragma once

#include <cstdint>
#include <limits>

// These headers are read by files compiled for different instruction sets: a function that is not inlined
// would exist in several copies, of which the linker keeps any one.
#if defined(__CUDACC__)
#define FASTATTN_INLINE __host__ __device__ __forceinline__
#else
#define FASTATTN_INLINE inline __attribute__((always_inline))
#endif

namespace fastattn {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// What a score is made of, as numbered by fastattn.spec.SCORES. The distance scores are logarithms of kernels
// of r = |q - k|, and -inf beyond their support.
enum class Score : int {
  kDot = 0,           // scale * q·k
  kAdditive = 1,      // sum_d w_d tanh(q_d + k_d)
  kGaussian = 2,      // -r^2 / 2
  kBoxcar = 3,        // log of 1 for r <= 1
  kEpanechnikov = 4,  // log(1 - r^2) for r < 1
  kTriangular = 5,    // log(1 - r) for r < 1
};

FASTATTN_INLINE bool is_distance(Score score) { return score >= Score::kGaussian; }

FASTATTN_INLINE int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// A [batch, head, row, column] tensor by address and strides (in elements). A stride of 0 broadcasts.
// The column stride of q, k, v, out and their gradients is 1; data may be nullptr where a field says so.
struct Tensor {
  void* data = nullptr;
  int64_t batch = 0;
  int64_t head = 0;
  int64_t row = 0;
  int64_t col = 1;

  FASTATTN_INLINE int64_t offset(int64_t b, int64_t h, int64_t i) const {
    return b * batch + h * head + i * row;
  }
};

constexpr int64_t kUnbounded = std::numeric_limits<int64_t>::max() / 4;

// Row i sees keys j with  i + lo <= j <= i + hi, where lo and hi are the tighter of the top-left pair and
// the bottom-right pair moved by offset = len_k - len_q.
struct Band {
  int64_t lo_top = -kUnbounded;
  int64_t hi_top = kUnbounded;
  int64_t lo_bottom = -kUnbounded;
  int64_t hi_bottom = kUnbounded;
};

// 64x64 tiles. Lists hold absolute offsets; an entry of *_bits is -1 for a full tile, else a row of bits.
constexpr int64_t kMaskTile = 64;

struct BlockMask {
  const int32_t* row_ptr =
      nullptr;  // [B, Hq, ceil(Lq/64) + 1] by row_batch, row_head; nullptr: no block mask
  const int32_t* row_tiles = nullptr;  // [nnz] key tiles, ascending within a query tile
  const int32_t* row_bits = nullptr;   // [nnz]
  const int32_t* col_ptr = nullptr;    // [B, Hq, ceil(Lk/64) + 1] by col_batch, col_head
  const int32_t* col_tiles = nullptr;  // [nnz] query tiles, ascending within a key tile
  const int32_t* col_bits = nullptr;   // [nnz]
  const uint64_t* bits = nullptr;      // [T, 64], bit c of word r: row r of the tile sees its column c
  int64_t row_batch = 0, row_head = 0, col_batch = 0, col_head = 0;
};

struct AttentionParams {
  DType dtype = DType::kFloat32;
  int num_threads = 1;
  int64_t batch = 0, num_heads = 0, num_heads_kv = 0;
  // Maxima where lengths vary; with a block_table seqlen_k is the page size, and seqlens_k has the lengths.
  int64_t seqlen_q = 0, seqlen_k = 0;
  int64_t head_dim = 0, head_dim_v = 0;
  Score score = Score::kDot;
  const void* score_weights = nullptr;  // [D] accumulator type, w of the additive score; else nullptr
  double scale = 1.0;                   // 1 for scores other than kDot
  double softcap = 0.0;                 // 0: none

  Tensor q;    // [B, Hq, Lq, D]
  Tensor k;    // [B, Hkv, Lk, D], or [pages, Hkv, page_size, D] with a block_table
  Tensor v;    // [B, Hkv, Lk, Dv], likewise
  Tensor out;  // [B, Hq, Lq, Dv]
  Tensor lse;  // [B, Hq, Lq] accumulator type; may be nullptr in the forward pass

  Tensor weights;  // [B, Hq, Lq, Lk], or with average_weights [B, 1, Lq, Lk]; accumulator type, columns
                   // contiguous; the probabilities after dropout; may be nullptr
  bool average_weights = false;

  const void* sinks = nullptr;  // [Hq] accumulator type; may be nullptr

  Band band;
  Tensor key_starts;  // [B, Lq] int32 by batch and row strides; may be nullptr
  Tensor key_ends;    // [B, Lq] int32; may be nullptr
  Tensor mask;        // [B, Hq, Lq, Lk] bool, any strides; may be nullptr
  BlockMask block_mask;

  Tensor bias;  // [B, Hq, Lq, Lk], any strides; may be nullptr
  DType bias_dtype = DType::kFloat32;
  Tensor diag;  // [B, Hq, n] accumulator type: bias of relative position r = j - i - offset at r - diag_lo
  int64_t diag_lo = 0;
  bool diag_bottom_right = true;

  double dropout_p = 0.0;
  const int64_t* dropout_seed = nullptr;  // one element; nullptr: no dropout

  const int32_t* cu_seqlens_q = nullptr;  // [B + 1]: rows of q, out, lse are packed; nullptr: dense
  const int32_t* cu_seqlens_k = nullptr;  // [B + 1]
  const int32_t* seqlens_k = nullptr;     // [B] key lengths in a cache; may be nullptr
  Tensor block_table;                     // [B, max_pages] int32 by batch and row strides; may be nullptr
  int64_t page_size = 0;

  // The key-value head that query head h reads.
  FASTATTN_INLINE int64_t head_kv(int64_t h) const { return h / (num_heads / num_heads_kv); }
};

struct AttentionBackwardParams : AttentionParams {
  Tensor dout;   // [B, Hq, Lq, Dv]
  Tensor dlse;   // [B, Hq, Lq] accumulator type; may be nullptr
  Tensor dq;     // like q, overwritten
  Tensor dk;     // like k, overwritten
  Tensor dv;     // like v, overwritten
  Tensor dbias;  // strides of bias, accumulator type, zero-filled by the caller; may be nullptr
  Tensor ddiag;  // strides of diag, accumulator type, zero-filled by the caller; may be nullptr
  int64_t num_diagonals = 0;
  void* dsinks = nullptr;          // [Hq] accumulator type, overwritten; may be nullptr
  void* dscore_weights = nullptr;  // [D] accumulator type, overwritten; may be nullptr

  // Gradients of SummaryParams' statistics, accumulator type, which add to those of out; each may be nullptr.
  // Without out, head_dim_v is 0.
  Tensor dentropy;   // [B, Hq, Lq]
  Tensor ddistance;  // [B, Hq, Lq]
  Tensor dreceived;  // [B, Hq, Lk]
  Tensor dpooled;    // [B, Hq, pool_rows, pool_cols], of the sums of the cells
  int64_t pool_rows = 0, pool_cols = 0;
};

// Of v, out and lse nothing is read.
struct HardParams : AttentionParams {
  Tensor index;                   // [B, Hq, Lq] int64: the chosen key, -1 in a row that sees none
  const int64_t* seed = nullptr;  // one element: draw from the softmax; nullptr: take the largest score
};

// What a cell of the pooled weights holds of its pairs.
enum class PoolMode : int { kMean = 0, kSum = 1, kMax = 2 };

// Statistics of the weights, for the call of the base class without v, out, weights, dropout, packing or
// pages. Outputs are of the accumulator's type but for indices, int64, and are overwritten.
struct SummaryParams : AttentionParams {
  Tensor given;  // lse of the same call [B, Hq, Lq]; may be nullptr. Rows where it is not used get their own

  Tensor entropy;     // [B, Hq, Lq]
  Tensor distance;    // [B, Hq, Lq]
  Tensor max_weight;  // [B, Hq, Lq]
  Tensor max_index;   // [B, Hq, Lq] int64
  Tensor received;    // [B, Hq, Lk]

  int64_t top_k = 0;
  Tensor topk_weights;  // [B, Hq, Lq, top_k]; not read where top_k is 0
  Tensor topk_indices;  // [B, Hq, Lq, top_k] int64; likewise

  int64_t pool_rows = 0, pool_cols = 0;
  PoolMode pool_mode = PoolMode::kMean;
  Tensor pooled;  // [B, Hq, pool_rows, pool_cols]; may be nullptr
};

// Position i of a length falls into this one of `count` cells.
FASTATTN_INLINE int64_t cell_of(int64_t i, int64_t count, int64_t length) { return i * count / length; }

// The first position of a cell.
FASTATTN_INLINE int64_t cell_begin(int64_t cell, int64_t count, int64_t length) {
  return (cell * length + count - 1) / count;
}

// Goes from cell to cell, from the one that holds position i on, without a division each time.
struct CellWalk {
  int64_t cell, end;  // end: the first position behind the cell

  FASTATTN_INLINE CellWalk(int64_t i, int64_t count, int64_t length)
      : cell(cell_of(i, count, length)), count_(count), step_(length / count), part_(length % count) {
    const int64_t scaled = (cell + 1) * length + count - 1;
    end = scaled / count;
    rest_ = scaled % count;
  }

  FASTATTN_INLINE void next() {
    ++cell;
    end += step_;
    rest_ += part_;
    if (rest_ < count_) return;
    rest_ -= count_;
    ++end;
  }

 private:
  int64_t count_, step_, part_, rest_;
};

// One batch entry: where its rows lie and how long it is.
struct Sequence {
  int64_t q_begin = 0, k_begin = 0;  // row offsets into packed tensors
  int64_t len_q = 0, len_k = 0;

  FASTATTN_INLINE int64_t offset() const { return len_k - len_q; }
};

FASTATTN_INLINE Sequence sequence_of(const AttentionParams& p, int64_t b) {
  Sequence s;
  s.len_q = p.seqlen_q;
  s.len_k = p.seqlen_k;
  if (p.cu_seqlens_q != nullptr) {
    s.q_begin = p.cu_seqlens_q[b];
    s.k_begin = p.cu_seqlens_k[b];
    s.len_q = p.cu_seqlens_q[b + 1] - s.q_begin;
    s.len_k = p.cu_seqlens_k[b + 1] - s.k_begin;
  }
  if (p.seqlens_k != nullptr) s.len_k = p.seqlens_k[b];
  return s;
}

}  // namespace fastattn

// What a forward kernel is given: the call, and what the host derived from it.
#pragma once

#include "../params.h"
#include "schedule.h"
#include "tensor_map.h"

namespace fastattn::cuda {

constexpr int32_t kFar = 1 << 30;  // beyond any position, and twice of it still an int32
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// A band in 32 bits, see fastattn::Band; kFar and more mean unbounded.
struct Band32 {
  int32_t lo_top, hi_top, lo_bottom, hi_bottom;
};

// Where the items that share a tile of rows leave what they found in their parts of the keys.
struct Partial {
  int64_t rows = 0;       // of a part: those of out
  float* sums = nullptr;  // [parts, rows, head_dim_v], of exp(score - max) v
  float* max = nullptr;   // [parts, rows], in the unit of Softmax
  float* sum = nullptr;   // [parts, rows]
  float unit = 1;         // as Softmax::add has it
  float scale = 1;        // from that unit to natural scores
};

struct ForwardArguments {
  TensorMap q_map, k_map, v_map;
  AttentionParams call;  // its tensors lie on the device
  Schedule schedule;
  Partial partial;  // read where the schedule has parts
  Band32 band;
  int32_t seqlen_q, seqlen_k;  // maxima where lengths vary
  int32_t total_q, total_k;    // rows of packed tensors
  int32_t group;               // query heads of one row tile: 1, or all that share a head of k
  int32_t positions;           // query positions of one row tile: rows / group
  int32_t k_batch, v_batch;    // 0 where all batch entries share their keys, else 1; likewise for heads
  int32_t k_head, v_head, q_batch, q_head;
  bool ranges_by_row;   // key_starts or key_ends differ from row to row
  float scale;          // of q·k
  float scale_log2;     // scale * log2(e)
  float softcap;        // 0: none
  uint32_t drop_below;  // a word below it is dropped; 0 without dropout
  float keep_scale;     // of what is kept; 1 without dropout
};

// A batch entry: where its rows lie and how long it is, kept within what there is.
struct Entry {
  int32_t q_begin, k_begin, len_q, len_k;

  FASTATTN_INLINE int32_t offset() const { return len_k - len_q; }
};

FASTATTN_INLINE int32_t clamped(int64_t x, int64_t lo, int64_t hi) {
  return static_cast<int32_t>(x < lo ? lo : x > hi ? hi : x);
}

FASTATTN_INLINE Entry entry_of(const ForwardArguments& a, int32_t b) {
  Entry e{0, 0, a.seqlen_q, a.seqlen_k};
  if (a.call.cu_seqlens_q != nullptr) {
    e.q_begin = clamped(a.call.cu_seqlens_q[b], 0, a.total_q);
    e.k_begin = clamped(a.call.cu_seqlens_k[b], 0, a.total_k);
    e.len_q = clamped(clamped(a.call.cu_seqlens_q[b + 1], 0, a.total_q) - e.q_begin, 0, a.seqlen_q);
    e.len_k = clamped(clamped(a.call.cu_seqlens_k[b + 1], 0, a.total_k) - e.k_begin, 0, a.seqlen_k);
  }
  if (a.call.seqlens_k != nullptr) e.len_k = clamped(a.call.seqlens_k[b], 0, e.len_k);
  return e;
}

// The number of row i of an entry among all rows of out.
FASTATTN_INLINE int64_t row_number(const ForwardArguments& a, const Entry& e, int32_t b, int32_t h,
                                   int32_t i) {
  if (a.call.cu_seqlens_q != nullptr) return int64_t{h} * a.total_q + e.q_begin + i;
  return (b * a.call.num_heads + h) * a.seqlen_q + i;
}

// The keys [begin, end) that lengths, band and key ranges leave to a row.
struct KeyRange {
  int32_t begin, end;
};

FASTATTN_INLINE KeyRange key_range(const ForwardArguments& a, const Entry& e, int32_t b, int32_t i) {
  const Band32& band = a.band;
  const int32_t offset = e.offset();
  const int32_t lo = band.lo_top > band.lo_bottom + offset ? band.lo_top : band.lo_bottom + offset;
  const int32_t hi = band.hi_top < band.hi_bottom + offset ? band.hi_top : band.hi_bottom + offset;
  int32_t begin = i + lo > 0 ? i + lo : 0;
  int32_t end = i + hi + 1 < e.len_k ? i + hi + 1 : e.len_k;
  if (a.call.key_starts.data != nullptr) {
    const Tensor& t = a.call.key_starts;
    const int32_t start = static_cast<const int32_t*>(t.data)[b * t.batch + i * t.row];
    begin = start > begin ? start : begin;
  }
  if (a.call.key_ends.data != nullptr) {
    const Tensor& t = a.call.key_ends;
    const int32_t stop = static_cast<const int32_t*>(t.data)[b * t.batch + i * t.row];
    end = stop < end ? stop : end;
  }
  return {begin < e.len_k ? begin : e.len_k, end > 0 ? end : 0};
}

}  // namespace fastattn::cuda

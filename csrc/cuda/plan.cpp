#include "plan.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastattn::cuda {

namespace {

// K and V of a section of heads; an H200 has 50 MB or more of L2 cache, which q and out share.
constexpr int64_t kSectionBytes = int64_t{32} << 20;

// Keys that tiles of so many cover.
int64_t covered(int64_t seqlen_k, int keys) { return (seqlen_k + keys - 1) / keys * keys; }

Variant variant_of(const AttentionParams& p, int head_dim) {
  const bool in_range = p.softcap == 0 && p.mask.data == nullptr && p.block_mask.row_ptr == nullptr &&
                        p.bias.data == nullptr && p.diag.data == nullptr && p.dropout_seed == nullptr;
  // Larger products are larger scores, and a scale that is not denormal: then the softmax may work on
  // products.
  if (!in_range || p.scale * kLog2E < FLT_MIN) return Variant::kGeneral;
  const bool sees_all = p.band.lo_top <= -kFar && p.band.hi_top >= kFar && p.band.lo_bottom <= -kFar &&
                        p.band.hi_bottom >= kFar && p.key_starts.data == nullptr &&
                        p.key_ends.data == nullptr;
  if (!sees_all || !is_listed(head_dim, Variant::kFull)) return Variant::kRange;
  // Wider tiles pay unless the last one reaches far beyond the keys.
  const int64_t wide = covered(p.seqlen_k, config_of(head_dim, Variant::kFull).keys);
  const int64_t narrow = covered(p.seqlen_k, config_of(head_dim, Variant::kRange).keys);
  return 32 * wide <= 33 * narrow ? Variant::kFull : Variant::kRange;
}

// How many query heads share a row tile: all that share a head of k, where that takes a tenth fewer tiles.
int32_t group_of(const AttentionParams& p, int rows) {
  const int64_t group = p.num_heads / p.num_heads_kv;
  if (group == 1 || group > rows || p.block_mask.row_ptr != nullptr) return 1;
  const int64_t positions = rows / group;
  const int64_t packed = (p.seqlen_q + positions - 1) / positions,
                apart = group * ((p.seqlen_q + rows - 1) / rows);
  return 10 * packed <= 9 * apart ? static_cast<int32_t>(group) : 1;
}

int32_t bound(int64_t x) { return clamped(x, -kFar, kFar); }

Schedule schedule_of(const AttentionParams& p, int32_t group, int32_t positions) {
  Schedule s;
  s.row_tiles = static_cast<int32_t>((p.seqlen_q + positions - 1) / positions);
  s.heads = static_cast<int32_t>(p.num_heads / group);
  const int64_t all_heads = s.heads * p.batch, size = all_heads * s.row_tiles;
  if (size >= kFar) throw std::invalid_argument("a call has too many tiles: " + std::to_string(size));
  s.all_heads = static_cast<int32_t>(all_heads);
  s.size = static_cast<int32_t>(size);
  const int64_t bytes = std::max<int64_t>(1, 2 * p.seqlen_k * (p.head_dim + p.head_dim_v));
  const int64_t sharing = s.heads / p.num_heads_kv;  // items' heads for each head of k
  s.section = static_cast<int32_t>(std::clamp<int64_t>(std::max<int64_t>(1, kSectionBytes / bytes) * sharing,
                                                       1, std::max<int64_t>(1, all_heads)));
  return s;
}

// A dimension of one element, or one that all its elements share, has any stride: the map gets a harmless
// one, and the coordinate stays 0.
int32_t set_dimension(TensorMapSpec& map, int dimension, int64_t size, int64_t stride) {
  const bool is_real = size > 1 && stride != 0;
  map.size[dimension] = is_real ? size : 1;
  map.stride[dimension - 1] = is_real ? 2 * stride : 16;
  return is_real ? 1 : 0;
}

TensorMapSpec map_of(const Tensor& t, int64_t columns, const TileConfig& config, int rank) {
  TensorMapSpec map;
  map.address = t.data;
  map.rank = rank;
  map.swizzle = config.swizzle();
  map.size[0] = columns;
  map.box[0] = config.chunk();
  return map;
}

void plan_maps(const ForwardCall& call, const TileConfig& config, ForwardPlan& plan) {
  const AttentionParams& p = call.params;
  ForwardArguments& a = plan.arguments;
  const bool packed_rows = p.cu_seqlens_q != nullptr;
  plan.q = map_of(p.q, p.head_dim, config, 5);
  set_dimension(plan.q, 1, a.group, p.q.head);
  set_dimension(plan.q, 2, packed_rows ? call.total_q : p.seqlen_q, p.q.row);
  a.q_head = set_dimension(plan.q, 3, p.num_heads / a.group, p.q.head * a.group);
  a.q_batch = set_dimension(plan.q, 4, packed_rows ? 1 : p.batch, p.q.batch);
  plan.q.box[1] = a.group;
  plan.q.box[2] = a.positions;
  const auto keys = [&](const Tensor& t, int64_t columns, int32_t& head, int32_t& batch) {
    TensorMapSpec map = map_of(t, columns, config, 4);
    set_dimension(map, 1, packed_rows ? call.total_k : p.seqlen_k, t.row);
    head = set_dimension(map, 2, p.num_heads_kv, t.head);
    batch = set_dimension(map, 3, packed_rows ? 1 : p.batch, t.batch);
    map.box[1] = config.keys;
    return map;
  };
  plan.k = keys(p.k, p.head_dim, a.k_head, a.k_batch);
  plan.v = keys(p.v, p.head_dim_v, a.v_head, a.v_batch);
}

}  // namespace

int64_t partial_size(const ForwardPlan& plan) {
  return plan.arguments.partial.rows * (plan.arguments.call.head_dim_v + 2);
}

void divide_keys(ForwardPlan& plan, int parts, float* room) {
  ForwardArguments& a = plan.arguments;
  if (int64_t{a.schedule.size} * parts >= kFar)
    throw std::invalid_argument("a call has too many tiles: " + std::to_string(a.schedule.size) + " of " +
                                std::to_string(parts) + " parts");
  a.schedule.parts = parts;
  a.schedule.size *= parts;
  a.partial.sums = room;
  a.partial.max = room + parts * a.partial.rows * a.call.head_dim_v;
  a.partial.sum = a.partial.max + parts * a.partial.rows;
}

ForwardPlan plan_forward(const ForwardCall& call) {
  const AttentionParams& p = call.params;
  // A graph may run on tensors of another dtype than those that it was recorded with.
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16)
    throw std::invalid_argument("dtype must be bfloat16 or float16");
  ForwardPlan plan{};
  plan.head_dim = padded_head_dim(std::max(p.head_dim, p.head_dim_v));
  if (plan.head_dim == 0) throw std::invalid_argument("no kernel holds so many columns");
  plan.variant = variant_of(p, plan.head_dim);
  const TileConfig& config = config_of(plan.head_dim, plan.variant);

  ForwardArguments& a = plan.arguments;
  a.call = p;
  a.group = group_of(p, config.rows());
  a.positions = config.rows() / a.group;
  a.schedule = schedule_of(p, a.group, a.positions);
  a.band = {bound(p.band.lo_top), bound(p.band.hi_top), bound(p.band.lo_bottom), bound(p.band.hi_bottom)};
  a.seqlen_q = static_cast<int32_t>(p.seqlen_q);
  a.seqlen_k = static_cast<int32_t>(p.seqlen_k);
  // No cu_seqlens points behind so many rows, nor a coordinate of the copy engine.
  a.total_q = clamped(call.total_q, 0, INT32_MAX);
  a.total_k = clamped(call.total_k, 0, INT32_MAX);
  a.ranges_by_row = (p.key_starts.data != nullptr && p.key_starts.row != 0) ||
                    (p.key_ends.data != nullptr && p.key_ends.row != 0);
  a.scale = static_cast<float>(p.scale);
  a.scale_log2 = static_cast<float>(p.scale * kLog2E);
  a.softcap = static_cast<float>(p.softcap);
  a.keep_scale = 1;
  if (p.dropout_seed != nullptr) {
    a.drop_below = static_cast<uint32_t>(std::floor(p.dropout_p * 4294967296.0));
    a.keep_scale = static_cast<float>(1.0 / (1.0 - p.dropout_p));
  }
  a.partial.rows = p.num_heads * (p.cu_seqlens_q != nullptr ? call.total_q : p.batch * p.seqlen_q);
  a.partial.unit = plan.variant == Variant::kGeneral ? kLog2E : a.scale_log2;
  a.partial.scale = plan.variant == Variant::kGeneral ? 1 : a.scale;
  plan_maps(call, config, plan);
  return plan;
}

}  // namespace fastattn::cuda

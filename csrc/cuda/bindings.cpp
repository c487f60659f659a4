// The functions of fastattn._cuda: unpack arguments, call, nothing else.
#include "bindings.h"

#include "../views.h"
#include "kernels.h"
#include "plan.h"
#include "runtime.h"

using namespace fastattn;
using namespace fastattn::cuda;

namespace {

template <class Element>
void launch(const ForwardPlan& plan, int blocks, int device, void* stream) {
  switch (plan.head_dim) {
    case 64:
      return ForwardKernels<Element, 64>::launch(plan.variant, plan.arguments, blocks, device, stream);
    case 96:
      return ForwardKernels<Element, 96>::launch(plan.variant, plan.arguments, blocks, device, stream);
    case 128:
      return ForwardKernels<Element, 128>::launch(plan.variant, plan.arguments, blocks, device, stream);
    case 192:
      return ForwardKernels<Element, 192>::launch(plan.variant, plan.arguments, blocks, device, stream);
    default:
      return ForwardKernels<Element, 256>::launch(plan.variant, plan.arguments, blocks, device, stream);
  }
}

ForwardCall read_forward(int dtype, py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse,
                         double scale, const std::pair<int64_t, int64_t>& totals,
                         const std::optional<py::dict>& options) {
  ForwardCall call;
  call.total_q = totals.first;
  call.total_k = totals.second;
  read_call(call.params, dtype, view_of(q), view_of(k), view_of(v), view_of(out), view_of(lse), scale, 0);
  read_options(options, call.params);
  return call;
}

template <class Element>
void launch_all(const ForwardPlan& plan, int device, void* stream) {
  const Schedule& schedule = plan.arguments.schedule;
  launch<Element>(plan, std::min(schedule.size, device_facts(device).multiprocessors), device, stream);
  if (schedule.parts > 1) launch_combine<Element>(plan.arguments, stream);
}

// totals: rows of packed q and k. stream: of the device, which is the current one. room(tiles,
// multiprocessors, size) -> (parts, address): into how many parts the keys are divided, and where they find
// room for `size` float32 numbers each.
void attention_fwd(int dtype, py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse,
                   double scale, const std::pair<int64_t, int64_t>& totals, int device, uintptr_t stream,
                   const py::function& room, const std::optional<py::dict>& options) {
  const ForwardCall call = read_forward(dtype, q, k, v, out, lse, scale, totals, options);
  ForwardPlan plan = plan_forward(call);
  const int tiles = plan.arguments.schedule.size;
  if (tiles == 0) return;
  const auto [parts, address] =
      room(tiles, device_facts(device).multiprocessors, partial_size(plan)).cast<std::pair<int, uintptr_t>>();
  const py::gil_scoped_release release;
  if (parts > 1) divide_keys(plan, parts, reinterpret_cast<float*>(address));
  plan.arguments.q_map = encode(plan.q, call.params.dtype);
  plan.arguments.k_map = encode(plan.k, call.params.dtype);
  plan.arguments.v_map = encode(plan.v, call.params.dtype);
  void* const where = reinterpret_cast<void*>(stream);
  if (call.params.dtype == DType::kBFloat16) {
    launch_all<BFloat16>(plan, device, where);
  } else {
    launch_all<Float16>(plan, device, where);
  }
}

// The items (row tile, head, batch, part) that each of `blocks` blocks computes for a call, in its order.
std::vector<std::vector<std::array<int, 4>>> schedule(int row_tiles, int heads, int batch, int section,
                                                      int parts, int blocks) {
  Schedule s;
  s.row_tiles = row_tiles;
  s.heads = heads;
  s.section = section;
  s.all_heads = heads * batch;
  s.parts = parts;
  s.size = s.all_heads * row_tiles * parts;
  std::vector<std::vector<std::array<int, 4>>> dealt(blocks);
  for (int block = 0; block < blocks; ++block) {
    for (Deal deal(s.size, block, blocks); deal.more(); deal.next()) {
      const WorkItem item = s.item(deal.index());
      dealt[block].push_back({item.row_tile, item.head, item.batch, item.part});
    }
  }
  return dealt;
}

constexpr const char* kVariantNames[] = {"range", "general", "full"};

py::list configs() {
  py::list list;
  for (const TileConfig& c : kConfigs) {
    py::dict d;
    d["head_dim"] = c.head_dim;
    d["variant"] = kVariantNames[static_cast<int>(c.variant)];
    d["rows"] = c.rows();
    d["keys"] = c.keys;
    d["stages"] = c.stages;
    d["threads"] = c.threads();
    d["ping_pong"] = c.ping_pong;
    d["registers"] = py::make_tuple(c.producer_registers, c.consumer_registers);
    d["shared_bytes"] = c.shared_bytes();
    list.append(d);
  }
  return list;
}

}  // namespace

void fastattn::cuda::bind(py::module_& m) {
  m.def("attention_fwd", attention_fwd);
  m.def("capability", [](int device) { return device_facts(device).capability; });
  m.def("schedule", schedule);
  m.def("configs", configs);
  m.def("problem", runtime_problem);
  m.def("device_type", runtime_device_type);
}

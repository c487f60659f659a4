// The Python module fastattn._C: unpack arguments, call, nothing else.
#include "cpu/kernels.h"
#include "memory.h"
#include "philox.h"
#include "views.h"

using namespace fastattn;

namespace {

// The DType of a CPU tensor of four dimensions, none empty, the last dense; nothing where it is any other
// object, or has no memory.
std::optional<DType> dense_dtype(const DLTensor& t) {
  if (t.device_kind != kDLCpu || t.rank != 4 || t.data == nullptr || t.strides[3] != 1) return {};
  if (std::any_of(t.shape, t.shape + 4, [](int64_t n) { return n == 0; })) return {};
  if (t.type_code == kDLBfloat) return DType::kBFloat16;
  if (t.type_code != kDLFloat) return {};
  if (t.type_bits == 32) return DType::kFloat32;
  if (t.type_bits == 16) return DType::kFloat16;
  return t.type_bits == 64 ? std::optional(DType::kFloat64) : std::nullopt;
}

// Reads a tensor of no subtype; false of any other object.
bool read_plain(py::handle object, DLTensor& out) {
  if (!tensor_reader.is_exactly(object.ptr())) return false;
  if (tensor_reader.read(object.ptr(), out)) return true;
  PyErr_Clear();
  return false;
}

// Whether q, k and v are tensors of no subtype, of one dtype, on which a dense call can run as they are.
bool are_plain(py::handle q, py::handle k, py::handle v) {
  DLTensor tq, tk, tv;
  if (!read_plain(q, tq) || !read_plain(k, tk) || !read_plain(v, tv)) return false;
  const std::optional<DType> dtype = dense_dtype(tq);
  return dtype && dense_dtype(tk) == dtype && dense_dtype(tv) == dtype && tq.shape[0] == tk.shape[0] &&
         tq.shape[0] == tv.shape[0] && tk.shape[1] == tv.shape[1] && tk.shape[2] == tv.shape[2] &&
         tq.shape[3] == tk.shape[3] && tq.shape[1] % tk.shape[1] == 0;
}

int64_t bytes_of(DType dtype) {
  if (dtype == DType::kFloat64) return 8;
  return dtype == DType::kFloat32 ? 4 : 2;
}

// Of what is added up: double of double, else float.
int64_t sum_bytes_of(DType dtype) { return std::max(bytes_of(dtype), int64_t{4}); }

bool read_forward_option(const std::string& key, py::handle value, AttentionParams& p) {
  if (key != "weights") return false;
  const py::tuple weights = tuple_of(value, 2);
  p.weights = result_of(weights[0], sum_bytes_of(p.dtype)).tensor();
  p.average_weights = weights[1].cast<bool>();
  return true;
}

bool read_backward_option(const std::string& key, py::handle value, AttentionBackwardParams& p) {
  if (key == "dbias") {
    p.dbias = result_of(value, sum_bytes_of(p.dtype)).tensor();
  } else if (key == "ddiag") {
    const View v = view_of(value);
    p.ddiag = v.rows();
    p.num_diagonals = v.dim(2);
  } else if (key == "dsinks") {
    p.dsinks = view_of(value).data;
  } else if (key == "dentropy") {
    p.dentropy = view_of(value).rows();
  } else if (key == "ddistance") {
    p.ddistance = view_of(value).rows();
  } else if (key == "dreceived") {
    p.dreceived = view_of(value).rows();
  } else if (key == "dpooled") {
    const View v = view_of(value);
    p.dpooled = v.tensor();
    p.pool_rows = v.dim(2);
    p.pool_cols = v.dim(3);
  } else if (key == "dscore_weights") {
    p.dscore_weights = view_of(value).data;
  } else {
    return false;
  }
  return true;
}

void attention_fwd(int dtype, py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse,
                   double scale, int num_threads, const std::optional<py::dict>& options) {
  AttentionParams p;
  read_call(p, dtype, view_of(q), view_of(k), view_of(v), result_of(out, bytes_of(static_cast<DType>(dtype))),
            view_of(lse), scale, num_threads);
  read_options(options, p, read_forward_option);
  const py::gil_scoped_release release;
  cpu_kernels().attention_fwd(p);
}

void attention_bwd(int dtype, py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse,
                   py::handle dout, py::handle dlse, py::handle dq, py::handle dk, py::handle dv,
                   double scale, int num_threads, const std::optional<py::dict>& options) {
  AttentionBackwardParams p;
  read_call(p, dtype, view_of(q), view_of(k), view_of(v), view_of(out), view_of(lse), scale, num_threads);
  p.dout = view_of(dout).tensor();
  if (!dlse.is_none()) p.dlse = view_of(dlse).rows();
  p.dq = result_of(dq, bytes_of(p.dtype)).tensor();
  p.dk = result_of(dk, bytes_of(p.dtype)).tensor();
  p.dv = result_of(dv, bytes_of(p.dtype)).tensor();
  read_options(options, p, read_backward_option);
  const py::gil_scoped_release release;
  cpu_kernels().attention_bwd(p);
}

void hard_fwd(int dtype, py::handle q, py::handle k, py::handle index, py::handle seed, double scale,
              int num_threads, const std::optional<py::dict>& options) {
  HardParams p;
  read_call(p, dtype, view_of(q), view_of(k), view_of(k), view_of(q), View{}, scale, num_threads);
  p.index = view_of(index).rows();
  p.seed = view_of(seed).as<const int64_t>();
  read_options(options, p);
  const py::gil_scoped_release release;
  cpu_kernels().hard_fwd(p);
}

// Whether lse is a tensor of no subtype, such as a dense call of q returns.
bool is_lse_of(py::handle lse, py::handle q) {
  DLTensor rows, queries;
  if (!read_plain(lse, rows) || !read_plain(q, queries)) return false;
  const int bits = queries.type_code == kDLFloat && queries.type_bits == 64 ? 64 : 32;
  return rows.device_kind == kDLCpu && rows.type_code == kDLFloat && rows.type_bits == bits &&
         rows.rank == 3 && queries.rank == 4 && std::equal(rows.shape, rows.shape + 3, queries.shape);
}

// outputs: entropy, distance, max_weight, max_index, received and lse; topk: weights and indices, or None;
// pooled: the mode and the grid, or None.
void read_summary_outputs(py::handle outputs, py::handle topk, py::handle pooled, SummaryParams& p) {
  Tensor* const tensors[] = {&p.entropy, &p.distance, &p.max_weight, &p.max_index, &p.received, &p.lse};
  const py::tuple rows = tuple_of(outputs, std::size(tensors));
  for (size_t n = 0; n < std::size(tensors); ++n) *tensors[n] = view_of(rows[n]).rows();
  if (!topk.is_none()) {
    const py::tuple links = tuple_of(topk, 2);
    const View weights = view_of(links[0]);
    p.top_k = weights.dim(3);
    p.topk_weights = weights.tensor();
    p.topk_indices = view_of(links[1]).tensor();
  }
  if (!pooled.is_none()) {
    const py::tuple grid = tuple_of(pooled, 2);
    const View cells = view_of(grid[1]);
    p.pool_mode = static_cast<PoolMode>(grid[0].cast<int>());
    p.pool_rows = cells.dim(2);
    p.pool_cols = cells.dim(3);
    p.pooled = cells.tensor();
  }
}

void summary_fwd(int dtype, py::handle q, py::handle k, py::handle given, double scale, int num_threads,
                 py::handle outputs, py::handle topk, py::handle pooled,
                 const std::optional<py::dict>& options) {
  SummaryParams p;
  const View queries = view_of(q), keys = view_of(k);
  read_call(p, dtype, queries, keys, keys, queries, View{}, scale, num_threads);
  p.v = p.out = Tensor{};
  if (!given.is_none()) p.given = view_of(given).rows();
  read_summary_outputs(outputs, topk, pooled, p);
  read_options(options, p);
  const py::gil_scoped_release release;
  cpu_kernels().summary_fwd(p);
}

py::dict info() {
  py::dict d;
  const CpuKernels& kernels = cpu_kernels();
  d["isa"] = kernels.name;
  d["vector_bytes"] = kernels.vector_bytes;
  d["isas"] = available_isas();
  d["compiled"] = compiled_isas();
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of fastattn.";
  m.def("attention_fwd", attention_fwd);
  m.def("attention_bwd", attention_bwd);
  m.def("hard_fwd", hard_fwd);
  m.def("summary_fwd", summary_fwd);
  m.def("read_tensors_of",
        [](py::handle type, py::handle capsule) { return tensor_reader.bind(type.ptr(), capsule.ptr()); });
  m.def("are_plain", are_plain);
  m.def("is_lse_of", is_lse_of);
  m.def("info", info);
  m.def("set_isa", set_cpu_isa);
  m.def("philox", [](int64_t seed, uint32_t bh, uint32_t i, uint32_t j) {
    return dropout_word(static_cast<uint64_t>(seed), bh, i, j);
  });
  m.def("fma_peak", [](int dtype, int num_threads, double seconds) {
    const py::gil_scoped_release release;
    return cpu_kernels().fma_peak(static_cast<DType>(dtype), num_threads, seconds);
  });
  m.def("copy_bandwidth", [](int64_t bytes, int num_threads) {
    const py::gil_scoped_release release;
    return copy_bandwidth(bytes, num_threads);
  });
}

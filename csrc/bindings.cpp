// The Python module fastattn._C: unpack arguments, call, nothing else. Tensors come as they are or as views,
// the tuples (address, shape, strides in elements), and have been validated by the caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>

#include "cpu/kernels.h"
#include "exchange.h"
#include "memory.h"
#include "philox.h"

namespace py = pybind11;
using namespace fastattn;

namespace {

constexpr Py_ssize_t kMaxRank = 4;

TensorReader tensor_reader;

struct View {
  void* data = nullptr;
  Py_ssize_t rank = 0;
  std::array<int64_t, kMaxRank> shape{}, strides{};

  int64_t dim(Py_ssize_t n) const { return at(shape, n); }
  int64_t stride(Py_ssize_t n) const { return at(strides, n); }

  // A [batch, head, row, column] tensor, or one without the last.
  Tensor tensor() const {
    Tensor t;
    t.data = data;
    t.batch = stride(0);
    t.head = stride(1);
    t.row = stride(2);
    if (rank == 4) t.col = stride(3);
    return t;
  }

  // A [batch, head, row] tensor.
  Tensor rows() const { return tensor(); }

  // A [batch, row] tensor, or [batch] alone.
  Tensor batch_rows() const {
    Tensor t;
    t.data = data;
    t.batch = stride(0);
    t.row = rank > 1 ? stride(1) : 0;
    return t;
  }

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }

 private:
  int64_t at(const std::array<int64_t, kMaxRank>& numbers, Py_ssize_t n) const {
    if (n >= rank) throw py::type_error("a view is None, or has too few dimensions");
    return numbers[n];
  }
};

void read_numbers(PyObject* tuple, View& v, std::array<int64_t, kMaxRank>& numbers) {
  if (!PyTuple_Check(tuple)) throw py::type_error("a view's shape and strides must be tuples");
  v.rank = PyTuple_GET_SIZE(tuple);
  if (v.rank > kMaxRank) throw py::type_error("a view has too many dimensions");
  for (Py_ssize_t n = 0; n < v.rank; ++n) {
    numbers[n] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, n));
    if (numbers[n] == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
}

View view_of_tensor(PyObject* tensor) {
  DLTensor t;
  if (!tensor_reader.read(tensor, t)) throw py::error_already_set();
  View v;
  v.data = static_cast<char*>(t.data) + t.byte_offset;
  v.rank = t.rank;
  if (v.rank > kMaxRank) throw py::type_error("a tensor has too many dimensions");
  std::copy_n(t.shape, v.rank, v.shape.begin());
  std::copy_n(t.strides, v.rank, v.strides.begin());
  return v;
}

View view_of(py::handle object) {
  if (object.is_none()) return {};
  PyObject* tuple = object.ptr();
  if (tensor_reader.is_tensor(tuple)) return view_of_tensor(tuple);
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 3)
    throw py::type_error("a view must be a tensor, (address, shape, strides) or None");
  View v;
  v.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(tuple, 0));
  if (v.data == nullptr && PyErr_Occurred()) throw py::error_already_set();
  read_numbers(PyTuple_GET_ITEM(tuple, 1), v, v.shape);
  const Py_ssize_t rank = v.rank;
  read_numbers(PyTuple_GET_ITEM(tuple, 2), v, v.strides);
  if (v.rank != rank) throw py::type_error("a view's shape or its strides have too few dimensions");
  return v;
}

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

// The dtype code of q, k and v where they are tensors of no subtype, of one dtype, on which a dense call can
// run as they are; else -1.
int plain_dtype(py::handle q, py::handle k, py::handle v) {
  DLTensor t[3];
  const py::handle objects[] = {q, k, v};
  for (int n = 0; n < 3; ++n) {
    if (!tensor_reader.is_exactly(objects[n].ptr())) return -1;
    if (!tensor_reader.read(objects[n].ptr(), t[n])) {
      PyErr_Clear();
      return -1;
    }
  }
  const auto& [tq, tk, tv] = t;
  const std::optional<DType> dtype = dense_dtype(tq);
  const bool fits = dtype && dense_dtype(tk) == dtype && dense_dtype(tv) == dtype &&
                    tq.shape[0] == tk.shape[0] && tq.shape[0] == tv.shape[0] && tk.shape[1] == tv.shape[1] &&
                    tk.shape[2] == tv.shape[2] && tq.shape[3] == tk.shape[3] &&
                    tq.shape[1] % tk.shape[1] == 0;
  return fits ? static_cast<int>(*dtype) : -1;
}

py::tuple tuple_of(py::handle object, Py_ssize_t size) {
  if (!PyTuple_Check(object.ptr()) || PyTuple_GET_SIZE(object.ptr()) != size)
    throw py::type_error("an option must be a tuple of " + std::to_string(size));
  return py::reinterpret_borrow<py::tuple>(object);
}

void read_block_mask(py::handle value, BlockMask& m) {
  const py::tuple views = tuple_of(value, 7);
  std::array<View, 7> v;
  for (size_t n = 0; n < v.size(); ++n) v[n] = view_of(views[n]);
  m.row_ptr = v[0].as<int32_t>();
  m.row_batch = v[0].stride(0);
  m.row_head = v[0].stride(1);
  m.row_tiles = v[1].as<int32_t>();
  m.row_bits = v[2].as<int32_t>();
  m.col_ptr = v[3].as<int32_t>();
  m.col_batch = v[3].stride(0);
  m.col_head = v[3].stride(1);
  m.col_tiles = v[4].as<int32_t>();
  m.col_bits = v[5].as<int32_t>();
  m.bits = v[6].as<uint64_t>();
}

void read_band(py::handle value, Band& band) {
  const py::tuple bounds = tuple_of(value, 4);
  int64_t* const fields[] = {&band.lo_top, &band.hi_top, &band.lo_bottom, &band.hi_bottom};
  for (size_t n = 0; n < 4; ++n)
    if (!bounds[n].is_none()) *fields[n] = bounds[n].cast<int64_t>();
}

// One option of a call, forward or backward; false where there is none of that name.
bool read_option(const std::string& key, py::handle value, AttentionParams& p) {
  if (key == "score") {
    p.score = static_cast<Score>(value.cast<int>());
  } else if (key == "score_weights") {
    p.score_weights = view_of(value).data;
  } else if (key == "softcap") {
    p.softcap = value.cast<double>();
  } else if (key == "sinks") {
    p.sinks = view_of(value).data;
  } else if (key == "band") {
    read_band(value, p.band);
  } else if (key == "key_starts") {
    p.key_starts = view_of(value).batch_rows();
  } else if (key == "key_ends") {
    p.key_ends = view_of(value).batch_rows();
  } else if (key == "mask") {
    p.mask = view_of(value).tensor();
  } else if (key == "block_mask") {
    read_block_mask(value, p.block_mask);
  } else if (key == "bias") {
    const py::tuple bias = tuple_of(value, 2);
    p.bias_dtype = static_cast<DType>(bias[0].cast<int>());
    p.bias = view_of(bias[1]).tensor();
  } else if (key == "diag") {
    const py::tuple diag = tuple_of(value, 3);
    p.diag = view_of(diag[0]).rows();
    p.diag_lo = diag[1].cast<int64_t>();
    p.diag_bottom_right = diag[2].cast<bool>();
  } else if (key == "dropout") {
    const py::tuple dropout = tuple_of(value, 2);
    p.dropout_p = dropout[0].cast<double>();
    p.dropout_seed = view_of(dropout[1]).as<const int64_t>();
  } else if (key == "cu_seqlens") {
    const py::tuple lengths = tuple_of(value, 2);
    p.cu_seqlens_q = view_of(lengths[0]).as<const int32_t>();
    p.cu_seqlens_k = view_of(lengths[1]).as<const int32_t>();
  } else if (key == "seqlens_k") {
    p.seqlens_k = view_of(value).as<const int32_t>();
  } else if (key == "block_table") {
    p.block_table = view_of(value).batch_rows();
    p.page_size = p.seqlen_k;  // k is [pages, Hkv, page_size, D]
  } else {
    return false;
  }
  return true;
}

bool read_forward_option(const std::string& key, py::handle value, AttentionParams& p) {
  if (key != "weights") return false;
  const py::tuple weights = tuple_of(value, 2);
  p.weights = view_of(weights[0]).tensor();
  p.average_weights = weights[1].cast<bool>();
  return true;
}

bool read_backward_option(const std::string& key, py::handle value, AttentionBackwardParams& p) {
  if (key == "dbias") {
    p.dbias = view_of(value).tensor();
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

void read_call(AttentionParams& p, int dtype, const View& q, const View& k, const View& v, const View& out,
               const View& lse, double scale, int num_threads) {
  p.dtype = static_cast<DType>(dtype);
  p.num_threads = num_threads;
  p.scale = scale;
  p.batch = q.dim(0);
  p.num_heads = q.dim(1);
  p.seqlen_q = q.dim(2);
  p.head_dim = q.dim(3);
  p.num_heads_kv = k.dim(1);
  p.seqlen_k = k.dim(2);
  p.head_dim_v = v.dim(3);
  p.q = q.tensor();
  p.k = k.tensor();
  p.v = v.tensor();
  p.out = out.tensor();
  p.lse = lse.data == nullptr ? Tensor{} : lse.rows();
}

// The options of a call whose tensors read_call has read; `read_own` takes those of one kernel alone.
template <class Params>
void read_options(const std::optional<py::dict>& options, Params& p,
                  bool (*read_own)(const std::string&, py::handle, Params&) = nullptr) {
  if (!options) return;
  for (const auto& [key, value] : *options) {
    const std::string name = key.template cast<std::string>();
    if (!read_option(name, value, p) && (read_own == nullptr || !read_own(name, value, p)))
      throw py::key_error("unknown option '" + name + "'");
  }
}

void attention_fwd(int dtype, py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse,
                   double scale, int num_threads, const std::optional<py::dict>& options) {
  AttentionParams p;
  read_call(p, dtype, view_of(q), view_of(k), view_of(v), view_of(out), view_of(lse), scale, num_threads);
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
  p.dq = view_of(dq).tensor();
  p.dk = view_of(dk).tensor();
  p.dv = view_of(dv).tensor();
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

// outputs: views by the names of SummaryParams' tensors, "topk" (weights, indices) and "pooled" (mode, view);
// "lse_given" stands in for "lse" where it is an input.
void read_summary_outputs(const py::dict& outputs, SummaryParams& p) {
  const std::pair<const char*, Tensor*> rows[] = {{"entropy", &p.entropy},       {"distance", &p.distance},
                                                  {"max_weight", &p.max_weight}, {"max_index", &p.max_index},
                                                  {"received", &p.received},     {"lse", &p.lse},
                                                  {"lse_given", &p.lse}};
  for (const auto& [name, tensor] : rows)
    if (outputs.contains(name)) *tensor = view_of(outputs[name]).rows();
  p.lse_given = outputs.contains("lse_given");
  if (outputs.contains("topk")) {
    const py::tuple topk = tuple_of(outputs["topk"], 2);
    const View weights = view_of(topk[0]);
    p.top_k = weights.dim(3);
    p.topk_weights = weights.tensor();
    p.topk_indices = view_of(topk[1]).tensor();
  }
  if (outputs.contains("pooled")) {
    const py::tuple pooled = tuple_of(outputs["pooled"], 2);
    const View cells = view_of(pooled[1]);
    p.pool_mode = static_cast<PoolMode>(pooled[0].cast<int>());
    p.pool_rows = cells.dim(2);
    p.pool_cols = cells.dim(3);
    p.pooled = cells.tensor();
  }
}

void summary_fwd(int dtype, py::handle q, py::handle k, double scale, int num_threads,
                 const py::dict& outputs, const std::optional<py::dict>& options) {
  SummaryParams p;
  const View queries = view_of(q), keys = view_of(k);
  read_call(p, dtype, queries, keys, keys, queries, View{}, scale, num_threads);
  p.v = p.out = Tensor{};
  read_summary_outputs(outputs, p);
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
  m.def("plain_dtype", plain_dtype);
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

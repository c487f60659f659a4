// Reading a call from Python: tensors come as they are or as views, the tuples (address, shape, strides in
// elements), and have been validated by the caller; options as a dict of those and numbers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>

#include "exchange.h"
#include "memory.h"
#include "params.h"

namespace fastattn {

namespace py = pybind11;

constexpr Py_ssize_t kMaxRank = 4;

// Reads the tensors that a module has been told of by bind(); none until then.
inline TensorReader tensor_reader;

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

inline void read_numbers(PyObject* tuple, View& v, std::array<int64_t, kMaxRank>& numbers) {
  if (!PyTuple_Check(tuple)) throw py::type_error("a view's shape and strides must be tuples");
  v.rank = PyTuple_GET_SIZE(tuple);
  if (v.rank > kMaxRank) throw py::type_error("a view has too many dimensions");
  for (Py_ssize_t n = 0; n < v.rank; ++n) {
    numbers[n] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, n));
    if (numbers[n] == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
}

inline View view_of_tensor(PyObject* tensor) {
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

inline View view_of(py::handle object) {
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

// A tensor that the call is about to write, most often a fresh one. Of a part of another tensor, what lies
// between its rows counts too: it is of the same allocation.
inline View result_of(py::handle object, int64_t element_bytes) {
  const View v = view_of(object);
  int64_t span = 1;
  for (Py_ssize_t n = 0; n < v.rank; ++n) {
    if (v.shape[n] == 0) return v;
    span += (v.shape[n] - 1) * v.strides[n];
  }
  prefer_huge_pages(v.data, span * element_bytes);
  return v;
}

inline py::tuple tuple_of(py::handle object, Py_ssize_t size) {
  if (!PyTuple_Check(object.ptr()) || PyTuple_GET_SIZE(object.ptr()) != size)
    throw py::type_error("an option must be a tuple of " + std::to_string(size));
  return py::reinterpret_borrow<py::tuple>(object);
}

inline void read_block_mask(py::handle value, BlockMask& m) {
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

inline void read_band(py::handle value, Band& band) {
  const py::tuple bounds = tuple_of(value, 4);
  int64_t* const fields[] = {&band.lo_top, &band.hi_top, &band.lo_bottom, &band.hi_bottom};
  for (size_t n = 0; n < 4; ++n)
    if (!bounds[n].is_none()) *fields[n] = bounds[n].cast<int64_t>();
}

// One option of a call, forward or backward; false where there is none of that name.
inline bool read_option(const std::string& key, py::handle value, AttentionParams& p) {
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

inline void read_call(AttentionParams& p, int dtype, const View& q, const View& k, const View& v,
                      const View& out, const View& lse, double scale, int num_threads) {
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

}  // namespace fastattn

// Tensors of another library, read without its headers: DLPack's C exchange interface (DLPack 1.2), by which
// torch >= 2.10 tells where a tensor lies without making a Python object for each number.
// https://dmlc.github.io/dlpack/latest/python_spec.html
#pragma once

#include <Python.h>

#include <cstdint>

namespace fastattn {

// The layout of these is DLPack's.
enum DLDeviceKind : int32_t { kDLCpu = 1 };
enum DLTypeCode : uint8_t { kDLFloat = 2, kDLBfloat = 4 };

struct DLTensor {
  void* data;
  int32_t device_kind, device_id;
  int32_t rank;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t *shape, *strides;  // in elements
  uint64_t byte_offset;
};

struct DLExchange {
  uint32_t major, minor;
  DLExchange* older;  // of another major version
  void (*unused[3])();
  int (*read)(void* object, DLTensor* out);  // borrows; 0, or an error with a Python exception
};

// Reads tensors of one Python type and its subtypes.
class TensorReader {
 public:
  // capsule: the type's __dlpack_c_exchange_api__. False where its version is another than this file's.
  bool bind(PyObject* type, PyObject* capsule) {
    auto* exchange = static_cast<DLExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    if (exchange == nullptr) PyErr_Clear();
    while (exchange != nullptr && exchange->major != 1) exchange = exchange->older;
    if (exchange == nullptr || exchange->read == nullptr) return false;
    Py_INCREF(type);  // for as long as the process lives
    type_ = reinterpret_cast<PyTypeObject*>(type);
    read_ = exchange->read;
    return true;
  }

  bool is_exactly(PyObject* object) const { return type_ != nullptr && Py_TYPE(object) == type_; }
  bool is_tensor(PyObject* object) const { return type_ != nullptr && PyObject_TypeCheck(object, type_); }

  // False with a Python exception set.
  bool read(PyObject* tensor, DLTensor& out) const { return read_(tensor, &out) == 0; }

 private:
  PyTypeObject* type_ = nullptr;
  int (*read_)(void*, DLTensor*) = nullptr;
};

}  // namespace fastattn

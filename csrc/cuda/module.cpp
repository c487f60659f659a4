#include "bindings.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of fastattn.";
  fastattn::cuda::bind(m);
}

// What fastattn._cuda and the tests' module of an emulated device have in common.
#pragma once

#include <pybind11/pybind11.h>

namespace fastattn::cuda {

void bind(pybind11::module_& m);

}  // namespace fastattn::cuda

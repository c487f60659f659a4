// fastattn._cuda for a device that is emulated on the host.
#include <pybind11/pybind11.h>

#include "cuda/bindings.h"
#include "emulated_device.h"

namespace emulated = fastattn::cuda::emulated;

PYBIND11_MODULE(_emulated_cuda, m) {
  fastattn::cuda::bind(m);
  // fault: of emulated::Fault. barrier: its number within shared memory, for faults of barriers.
  m.def("set_device", [](uint64_t seed, int multiprocessors, int fault, uint32_t barrier) {
    emulated::DeviceOptions& options = emulated::device_options();
    options.multiprocessors = multiprocessors;
    options.block = {seed, static_cast<emulated::Fault>(fault), barrier};
  });
  m.def("launched_keys", [] { return emulated::device_options().keys; });
}

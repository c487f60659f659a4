// The rate at which num_threads copy `bytes` bytes, in bytes moved (read and written) per second. Throws
// std::invalid_argument unless both are positive.
#pragma once

#include <cstdint>

namespace fastattn {

double copy_bandwidth(int64_t bytes, int num_threads);

}  // namespace fastattn

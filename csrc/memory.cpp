#include "memory.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

namespace fastattn {

double copy_bandwidth(int64_t bytes, int num_threads) {
  if (bytes < 1) throw std::invalid_argument("bytes must be at least 1, got " + std::to_string(bytes));
  if (num_threads < 1)
    throw std::invalid_argument("num_threads must be at least 1, got " + std::to_string(num_threads));
  std::vector<char> from(bytes, 1), to(bytes, 2);
  double best = 0;
  for (int round = 0; round < 5; ++round) {
    const auto start = std::chrono::steady_clock::now();
    run_threads(num_threads, [&](int thread) {
      const int64_t first = bytes * thread / num_threads, last = bytes * (thread + 1) / num_threads;
      std::memcpy(to.data() + first, from.data() + first, last - first);
    });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, 2.0 * static_cast<double>(bytes) / seconds);
  }
  return best;
}

}  // namespace fastattn

#include "memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

namespace fastattn {

void prefer_huge_pages([[maybe_unused]] const void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kLeast = int64_t{32} << 20;  // where glibc's threshold for a mapping of its own ends
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (bytes < kLeast) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  // A kernel without such pages refuses, and nothing is lost.
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

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

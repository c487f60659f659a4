// Memory: its pages, and how quickly it is copied.
#pragma once

#include <cstdint>

namespace fastattn {

// Asks Linux for pages of 2 MB, not 4 KB, behind memory that is about to be written, where it is so large
// (32 MB) that the C library, as a rule, has taken it from the kernel just now and gives it back when it is
// freed: each page is cleared as it is first written, which costs four times as much by small pages.
void prefer_huge_pages(const void* data, int64_t bytes);

// The rate at which num_threads copy `bytes` bytes, in bytes moved (read and written) per second. Throws
// std::invalid_argument unless both are positive.
double copy_bandwidth(int64_t bytes, int num_threads);

}  // namespace fastattn

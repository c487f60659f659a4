// The 16-bit types of q, k, v and out.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace fastattn::cuda

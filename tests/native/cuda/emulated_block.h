// Runs one block of a kernel on the host. See emulation.cpp.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace fastattn::cuda::emulated {

// What a block is made to do wrong, to show that it would be found.
enum class Fault : int {
  kNone = 0,
  kSkippedWait = 1,         // waits at one barrier return at once
  kLostArrival = 2,         // arrivals at one barrier do not count
  kUnfinishedProducts = 3,  // waits for products return at once
  kWrongSwizzle = 4,        // copies write rows as they are
  kWrongStride = 5,         // products read groups of eight rows at twice the distance
};

struct Options {
  uint64_t seed = 0;
  Fault fault = Fault::kNone;
  uint32_t fault_barrier = 0;  // shared address, of the first two
};

struct Launch {
  int threads;
  uint32_t shared_bytes;
  int block, blocks;
  std::function<std::string(uint32_t)> barrier_name;  // for messages
};

// Throws std::runtime_error where the block stands still, breaks a rule of the machine or reads what is not
// there.
void run_block(const Launch& launch, const Options& options, const std::function<void()>& kernel);

}  // namespace fastattn::cuda::emulated

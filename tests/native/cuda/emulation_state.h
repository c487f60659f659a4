// What a block of the emulated machine consists of.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/machine.h"
#include "emulated_block.h"

namespace fastattn::cuda::emulated {

struct Fiber {
  enum State { kReady, kWaiting, kDone };
  State state = kReady;
  bool started = false;
  std::string waits_for;
  jmp_buf context;
  ucontext_t entry;
};

struct Warp {
  int arrived = 0;
  const char* kind = "";
  uint64_t generation = 0, values[2][32] = {};
  std::vector<int> waiters;
};

struct NamedBarrier {
  int arrived = 0, threads = 0;
  uint64_t generation = 0;
  std::vector<int> waiters;
};

struct MemoryBarrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;  // of copies, that are still to come
  uint32_t parity = 0;
  std::vector<int> waiters;
};

// Of a byte of shared memory that copies write.
enum class Contents : uint8_t { kNothing, kUnderWay, kThere };

struct Copy {
  TensorMapSpec map;
  Coordinates from;
  uint32_t address, barrier;
};

// Accumulators between the commit of a product and the wait for it: 64 rows, and where the threads have them.
struct Sums {
  int columns;
  std::vector<float> values;
  float* registers[128];
  uint64_t last_group;
};

// A product as its 128 threads issued it.
struct GroupProduct {
  Product common;
  const uint32_t* a_fragments[128];
  Sums* sums;
};

struct Warpgroup {
  int arrived = 0;
  const char* kind = "";
  uint64_t generation = 0;
  bool may_write = false;  // products_begin came since the last wait
  std::vector<int> waiters;
  std::vector<Product> issued[128];
  std::vector<std::vector<GroupProduct>> pending;  // committed groups, the oldest first
  uint64_t committed = 0, completed = 0;
  std::vector<std::unique_ptr<Sums>> sums;
};

struct BlockState {
  BlockState(const Launch& launch, const Options& options, const std::function<void()>& kernel)
      : launch(launch),
        options(options),
        kernel(&kernel),
        fibers(launch.threads),
        warps(launch.threads / 32),
        warpgroups(launch.threads / 128),
        named(16),
        memory(kSharedBase + launch.shared_bytes, 0xFF),
        contents(memory.size(), Contents::kNothing),
        random(options.seed * 1000003 + launch.block) {}

  void run();
  void resume(int thread);
  void switch_away();
  void sleep(const std::string& what);
  void wake(std::vector<int>& waiters);
  void maybe_yield();
  void complain(const std::string& message);           // the block stops at the next switch
  [[noreturn]] void fail(const std::string& message);  // it stops here, in a fiber
  std::string who_waits() const;

  const uint64_t* gather(const char* kind, uint64_t value);
  bool meet(const char* kind);  // of a warpgroup: true for the last thread, which must call part
  void part();
  MemoryBarrier& barrier_at(uint32_t address);
  void settle(MemoryBarrier& barrier);

  bool is_done() const;
  bool complete_copy();  // any that is under way; false where none is
  void complete_something();
  void complete_group(Warpgroup& group);

  const Launch& launch;
  const Options& options;
  const std::function<void()>* kernel;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::vector<NamedBarrier> named;
  std::map<uint32_t, MemoryBarrier> barriers;
  std::vector<Copy> copies;
  std::vector<uint8_t> memory;
  std::vector<Contents> contents;
  std::vector<char> stacks;
  std::vector<int> ready;
  std::minstd_rand random;
  int running = 0;
  jmp_buf scheduler;
  std::string error;
};

BlockState& block();

}  // namespace fastattn::cuda::emulated

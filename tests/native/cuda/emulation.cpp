// A block of a Hopper GPU, one instruction at a time, in an order drawn at random.
//
// - Threads are fibers; at each wait, and now and then elsewhere, another one goes on.
// - A bulk-tensor copy decodes the tensor map's parameters, fills with zeros what lies outside, swizzles, and
// counts its
//   bytes at its barrier. From issue to completion its destination holds NaN.
// - A product decodes the 64-bit descriptors and the threads' fragments. It reads its operands at any time
// between the
//   commit of its group and the wait for it, and its accumulators hold NaN until that wait.
// - Where nothing can go on, the message says who waits for what.
#include <algorithm>

#include "emulation_state.h"

namespace fastattn::cuda::emulated {

namespace {

thread_local BlockState* g_block = nullptr;

}  // namespace

BlockState& block() { return *g_block; }

int thread_index() { return block().running; }
int block_index() { return block().launch.block; }
int block_count() { return block().launch.blocks; }

// --- Fibers
// --------------------------------------------------------------------------------------------------

namespace {

void fiber_main() {
  (*block().kernel)();
  BlockState& state = block();
  state.fibers[state.running].state = Fiber::kDone;
  _longjmp(state.scheduler, 1);
}

constexpr size_t kStackBytes = 64 << 10;

}  // namespace

__attribute__((noinline)) void BlockState::switch_away() {
  Fiber& fiber = fibers[running];
  if (_setjmp(fiber.context) == 0) _longjmp(scheduler, 1);
}

void BlockState::sleep(const std::string& what) {
  fibers[running].state = Fiber::kWaiting;
  fibers[running].waits_for = what;
  switch_away();
}

void BlockState::wake(std::vector<int>& waiters) {
  for (const int thread : waiters) {
    fibers[thread].state = Fiber::kReady;
    ready.push_back(thread);
  }
  waiters.clear();
}

void BlockState::maybe_yield() {
  if (random() % 8 != 0) return;
  ready.push_back(running);
  switch_away();
}

void BlockState::complain(const std::string& message) {
  if (error.empty())
    error =
        "thread " + std::to_string(running) + " of block " + std::to_string(launch.block) + ": " + message;
}

void BlockState::fail(const std::string& message) {
  complain(message);
  _longjmp(scheduler, 1);
}

std::string BlockState::who_waits() const {
  std::string text = "nothing can go on:";
  for (size_t first = 0; first < fibers.size();) {
    size_t next = first + 1;
    const auto what = [&](size_t n) {
      return fibers[n].state == Fiber::kDone ? std::string("done") : fibers[n].waits_for;
    };
    while (next < fibers.size() && what(next) == what(first)) ++next;
    text += "\n  threads " + std::to_string(first) + " to " + std::to_string(next - 1) + ": " + what(first);
    first = next;
  }
  return text;
}

__attribute__((noinline)) void BlockState::resume(int thread) {
  running = thread;
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = stacks.data() + thread * kStackBytes;
  fiber.entry.uc_stack.ss_size = kStackBytes;
  fiber.entry.uc_link = nullptr;
  makecontext(&fiber.entry, fiber_main, 0);
  setcontext(&fiber.entry);
}

void BlockState::run() {
  stacks.resize(fibers.size() * kStackBytes);
  for (size_t thread = 0; thread < fibers.size(); ++thread) ready.push_back(static_cast<int>(thread));
  // How soon what is under way completes: within a few switches, or as late as nothing else can go on.
  constexpr int kOdds[] = {16, 256, 4096, 0};
  const int odds = kOdds[random() % 4];
  while (error.empty()) {
    if (ready.empty()) {
      if (complete_copy()) continue;
      if (!is_done()) error = who_waits();
      break;
    }
    if (odds != 0 && random() % odds == 0) complete_something();
    const size_t chosen = random() % ready.size();
    const int thread = ready[chosen];
    ready[chosen] = ready.back();
    ready.pop_back();
    resume(thread);
  }
}

bool BlockState::is_done() const {
  for (const Fiber& fiber : fibers)
    if (fiber.state != Fiber::kDone) return false;
  return true;
}

void run_block(const Launch& launch, const Options& options, const std::function<void()>& kernel) {
  BlockState state(launch, options, kernel);
  g_block = &state;
  state.run();
  g_block = nullptr;
  if (!state.error.empty()) throw std::runtime_error(state.error);
}

// --- Warps and barriers of threads
// ---------------------------------------------------------------------------

const uint64_t* BlockState::gather(const char* kind, uint64_t value) {
  Warp& warp = warps[running / 32];
  if (warp.arrived == 0) warp.kind = kind;
  if (std::strcmp(warp.kind, kind) != 0)
    fail(std::string("the warp's lanes meet in different instructions: ") + kind + " and " + warp.kind);
  const uint64_t generation = warp.generation;
  uint64_t* values = warp.values[generation % 2];
  values[running % 32] = value;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.generation;
    wake(warp.waiters);
  } else {
    warp.waiters.push_back(running);
    while (warp.generation == generation) sleep(std::string("its warp at ") + kind);
  }
  return values;
}

uint64_t exchange(uint64_t value, int from_lane, bool is_xor) {
  const int lane = is_xor ? thread_index() % 32 ^ from_lane : from_lane;
  return block().gather("a shuffle", value)[lane];
}

uint32_t ballot(bool value) {
  const uint64_t* values = block().gather("a ballot", value);
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<uint32_t>(values[lane]) << lane;
  return bits;
}

int uniform(int value) {
  const uint64_t own = static_cast<uint32_t>(value);
  const uint64_t* values = block().gather("a uniform number", own);
  if (std::count(values, values + 32, own) != 32)
    block().fail("a number is taken for the same in all lanes of a warp, and is not");
  return value;
}

void sync_warp() { block().gather("the warp's barrier", 0); }

void named_barrier(int id, int threads, bool waits) {
  BlockState& state = block();
  if (threads == 0) threads = static_cast<int>(state.fibers.size());
  NamedBarrier& barrier = state.named[id];
  if (barrier.arrived == 0) barrier.threads = threads;
  if (barrier.threads != threads) state.fail("a named barrier is used with two counts of threads");
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    state.wake(barrier.waiters);
  } else if (waits) {
    barrier.waiters.push_back(state.running);
    while (barrier.generation == generation) state.sleep("named barrier " + std::to_string(id));
  }
}

// --- Barriers in shared memory
// -------------------------------------------------------------------------------

MemoryBarrier& BlockState::barrier_at(uint32_t address) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("no barrier was initialised at " + std::to_string(address));
  return found->second;
}

void BlockState::settle(MemoryBarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  barrier.parity ^= 1;
  wake(barrier.waiters);
}

void barrier_init(uint32_t barrier, int arrivals) {
  BlockState& state = block();
  if (barrier % 8 != 0) state.fail("a barrier is not aligned to 8 bytes");
  MemoryBarrier made;
  made.arrivals = made.pending = arrivals;
  state.barriers[barrier] = made;
}

void barrier_arrive(uint32_t barrier, uint32_t expected_bytes) {
  BlockState& state = block();
  state.maybe_yield();
  if (state.options.fault == Fault::kLostArrival && state.options.fault_barrier == barrier) return;
  MemoryBarrier& b = state.barrier_at(barrier);
  if (b.pending == 0) state.fail(state.launch.barrier_name(barrier) + " has more arrivals than it expects");
  --b.pending;
  b.bytes += expected_bytes;
  state.settle(b);
}

void barrier_wait(uint32_t barrier, uint32_t parity) {
  BlockState& state = block();
  state.maybe_yield();
  if (state.options.fault == Fault::kSkippedWait && state.options.fault_barrier == barrier) return;
  MemoryBarrier& b = state.barrier_at(barrier);
  while (b.parity == parity) {  // the phase that is under way has this parity
    b.waiters.push_back(state.running);
    state.sleep(state.launch.barrier_name(barrier) + ", phase of parity " + std::to_string(parity));
  }
}

}  // namespace fastattn::cuda::emulated

#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace fastattn {
namespace {

// GNU OpenMP's entry point, which LLVM's and Intel's runtimes export too: run fn(data) on num_threads
// threads.
using ParallelEntry = void (*)(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags);
using ThreadNumber = int (*)();

std::atomic<bool> forked{false};

#if !defined(_WIN32)
// A child inherits the pool's bookkeeping but not its threads: entering it would hang. Registered when the
// library is loaded, since it may be torch alone that has used the pool before the fork.
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
#endif

struct OpenMP {
  ParallelEntry parallel = nullptr;
  ThreadNumber thread_number = nullptr;
  ThreadNumber team_size = nullptr;

  OpenMP() {
#if !defined(_WIN32)
    parallel = reinterpret_cast<ParallelEntry>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    thread_number = reinterpret_cast<ThreadNumber>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    team_size = reinterpret_cast<ThreadNumber>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
    if (thread_number == nullptr || team_size == nullptr) parallel = nullptr;
#endif
  }
};

const OpenMP& openmp() {
  static const OpenMP runtime;
  return runtime;
}

struct Team {
  const std::function<void(int)>* body;
  int num_threads;
  std::mutex mutex;
  std::exception_ptr error;

  void run(int thread) {
    try {
      (*body)(thread);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  }
};

}  // namespace

void run_threads(int num_threads, const std::function<void(int thread)>& body) {
  if (num_threads <= 1) return body(0);
  Team team{&body, num_threads, {}, nullptr};
  if (openmp().parallel != nullptr && !forked.load()) {
    const auto entry = [](void* data) {
      Team& t = *static_cast<Team*>(data);
      // The runtime may give fewer threads than asked for (nesting, limits): each then takes several shares.
      const int size = openmp().team_size();
      for (int thread = openmp().thread_number(); thread < t.num_threads; thread += size) t.run(thread);
    };
    openmp().parallel(entry, &team, static_cast<unsigned>(num_threads), 0);
  } else {
    std::vector<std::thread> threads;
    int started = 1;
    try {
      for (; started < num_threads; ++started) threads.emplace_back([&team, started] { team.run(started); });
    } catch (const std::system_error&) {  // no more threads to be had: this one takes their shares
    }
    team.run(0);
    for (int thread = started; thread < num_threads; ++thread) team.run(thread);
    for (std::thread& thread : threads) thread.join();
  }
  if (team.error) std::rethrow_exception(team.error);
}

void parallel_tasks(int num_threads, int64_t num_tasks,
                    const std::function<void(int thread, int64_t task)>& body) {
  const int team = static_cast<int>(std::min<int64_t>(std::max(num_threads, 1), num_tasks));
  // Relaxed: tasks are in no order, and a stronger one would hide it from the race check (make sanitize)
  // where one task reads or writes what another does.
  std::atomic<int64_t> next{0};
  const auto take = [&next] { return next.fetch_add(1, std::memory_order_relaxed); };
  run_threads(team, [&](int thread) {
    for (int64_t task = take(); task < num_tasks; task = take()) body(thread, task);
  });
}

}  // namespace fastattn

// The only place that knows about threads.
#pragma once

#include <cstdint>
#include <functional>

namespace fastattn {

// Runs body(thread) once for each thread in [0, num_threads), on the OpenMP runtime that torch loaded where
// there is one (so that the two libraries share one pool), else and after a fork on threads of its own.
// An exception in a body is rethrown by the caller. Results must not depend on which thread does what.
void run_threads(int num_threads, const std::function<void(int thread)>& body);

// Calls body(thread, task) for each task in [0, num_tasks), handed out in ascending order.
void parallel_tasks(int num_threads, int64_t num_tasks,
                    const std::function<void(int thread, int64_t task)>& body);

}  // namespace fastattn

// The forward kernel: one warp copies, warpgroups multiply. docs/kernels/cuda.md draws who waits for whom.
#pragma once

#include "consumer.h"
#include "producer.h"

namespace fastattn::cuda {

template <class Traits>
FASTATTN_DEVICE void attention_fwd(const ForwardArguments& a) {
  const SharedMap<Traits> shared{shared_memory()};
  if (thread_index() == 0) {
    constexpr int kWarps = 4 * Traits::kConsumers;
    barrier_init(shared.q_full(), 1);
    barrier_init(shared.q_empty(), kWarps);
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      barrier_init(shared.k_full(stage), 1);
      barrier_init(shared.v_full(stage), 1);
      barrier_init(shared.k_empty(stage), kWarps);
      barrier_init(shared.v_empty(stage), kWarps);
    }
    fence_barrier_init();
  }
  sync_block();
  const int warpgroup = uniform(thread_index() / 128);
  if (warpgroup == 0) {
    fewer_registers<Traits::kProducerRegisters>();
    if (uniform(thread_index() / 32) == 0) Producer<Traits>(a, shared).run();
  } else {
    more_registers<Traits::kConsumerRegisters>();
    Consumer<Traits>(a, shared, warpgroup - 1).run();
  }
}

}  // namespace fastattn::cuda

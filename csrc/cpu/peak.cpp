// The processor's fused multiply-add rate, measured: the ceiling that benchmarks quote.
#include <atomic>
#include <chrono>

#include "../parallel.h"
#include "gemm.h"
#include "isa.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Independent chains, enough for two ports of five cycles' latency, on registers alone.
template <class T>
double chains(double seconds, std::atomic<int>& sink) {
  constexpr int kChains = 12, kSteps = 4096;
  Vec<T> acc[kChains];
#pragma GCC unroll 12
  for (int n = 0; n < kChains; ++n) acc[n] = splat<T>(static_cast<T>(n));
  Vec<T> a = splat<T>(static_cast<T>(0.999)), b = splat<T>(static_cast<T>(0.001));
  int64_t rounds = 0;
  const auto start = std::chrono::steady_clock::now();
  double elapsed = 0;
  while (elapsed < seconds) {
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
      for (int n = 0; n < kChains; ++n) acc[n] = acc[n] * a + b;
      asm volatile("" : "+m"(sink));
    }
    ++rounds;
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
#pragma GCC unroll 12
  for (int n = 1; n < kChains; ++n) acc[0] += acc[n];
  if (reduce_add<T>(acc[0]) == T{0}) sink.fetch_add(1);
  return 2.0 * kLanes<T> * kChains * kSteps * static_cast<double>(rounds) / elapsed;
}

}  // namespace

double fma_peak(DType dtype, int num_threads, double seconds) {
  std::atomic<int> sink{0};
  std::atomic<double> total{0.0};
  run_threads(num_threads, [&](int) {
    const double rate =
        dtype == DType::kFloat64 ? chains<double>(seconds, sink) : chains<float>(seconds, sink);
    double sum = total.load();
    while (!total.compare_exchange_weak(sum, sum + rate)) {
    }
  });
  return total.load();
}

#define FASTATTN_STRINGIZE_(x) #x
#define FASTATTN_STRINGIZE(x) FASTATTN_STRINGIZE_(x)

const CpuKernels kKernels = {FASTATTN_STRINGIZE(FASTATTN_ISA),
                             kVectorBytes,
                             attention_fwd,
                             attention_bwd,
                             hard_fwd,
                             summary_fwd,
                             fma_peak};

}  // namespace fastattn::FASTATTN_ISA

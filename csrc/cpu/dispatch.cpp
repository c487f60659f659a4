// Chooses one instruction set's kernels, once.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace fastattn {

// FASTATTN_HAS_<name> says which instruction sets this build has (CMakeLists.txt).
#if defined(FASTATTN_HAS_baseline)
namespace baseline {
extern const CpuKernels kKernels;
}
#endif
#if defined(FASTATTN_HAS_avx2)
namespace avx2 {
extern const CpuKernels kKernels;
}
#endif
#if defined(FASTATTN_HAS_avx512)
namespace avx512 {
extern const CpuKernels kKernels;
}
#endif
#if defined(FASTATTN_HAS_generic)
namespace generic {
extern const CpuKernels kKernels;
}
#endif

namespace {

struct Implementation {
  const CpuKernels* kernels;
  bool (*runs_here)();
};

// From the least to the most demanding: the last that runs here is the default. F16C, which the last two also
// use, is not asked for: no processor has AVX2 without it, and not every compiler knows its name.
const Implementation kImplementations[] = {
#if defined(FASTATTN_HAS_baseline)
    {&baseline::kKernels, [] { return true; }},
#endif
#if defined(FASTATTN_HAS_generic)
    {&generic::kKernels, [] { return true; }},
#endif
#if defined(FASTATTN_HAS_avx2)
    {&avx2::kKernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
#if defined(FASTATTN_HAS_avx512)
    {&avx512::kKernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("fma");
     }},
#endif
};

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const CpuKernels* find(const std::string& name) {
  for (const Implementation& i : kImplementations) {
    if (name != i.kernels->name) continue;
    if (i.runs_here()) return i.kernels;
    throw std::invalid_argument("FASTATTN_CPU_ISA: this processor lacks " + name + "; it has " +
                                join(available_isas()));
  }
  throw std::invalid_argument("FASTATTN_CPU_ISA must be one of " + join(compiled_isas()) + ", got '" + name +
                              "'");
}

// No lock: a child of fork would inherit it in whatever state another thread had left it. Threads that choose
// at the same time choose the same.
std::atomic<const CpuKernels*> chosen{nullptr};

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Implementation& i : kImplementations) names.emplace_back(i.kernels->name);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Implementation& i : kImplementations)
    if (i.runs_here()) names.emplace_back(i.kernels->name);
  return names;
}

const CpuKernels& cpu_kernels() {
  if (const CpuKernels* kernels = chosen.load()) return *kernels;
  const char* forced = std::getenv("FASTATTN_CPU_ISA");
  const CpuKernels* found = find(forced != nullptr && *forced != '\0' ? forced : available_isas().back());
  const CpuKernels* none = nullptr;  // set_cpu_isa may have come first
  chosen.compare_exchange_strong(none, found);
  return *chosen.load();
}

void set_cpu_isa(const std::string& name) { chosen.store(find(name)); }

}  // namespace fastattn

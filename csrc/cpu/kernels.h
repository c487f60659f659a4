// What each instruction set's build of the kernels offers, and which one runs here.
#pragma once

#include <string>
#include <vector>

#include "../params.h"

namespace fastattn {

struct CpuKernels {
  const char* name;
  int vector_bytes;
  void (*attention_fwd)(const AttentionParams&);
  void (*attention_bwd)(const AttentionBackwardParams&);
  void (*hard_fwd)(const HardParams&);
  void (*summary_fwd)(const SummaryParams&);
  double (*fma_peak)(DType dtype, int num_threads, double seconds);  // FLOP/s
};

// The kernels in use: chosen once by what the processor has, or by FASTATTN_CPU_ISA.
// Throws std::invalid_argument where that names none, or one that the processor lacks.
const CpuKernels& cpu_kernels();

// Names of the instruction sets in this build, and of those that the processor also has; best last.
std::vector<std::string> compiled_isas();
std::vector<std::string> available_isas();

void set_cpu_isa(const std::string& name);

}  // namespace fastattn

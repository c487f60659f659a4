// The entry points of one instruction set's build.
#pragma once

#include "kernels.h"

#ifndef FASTATTN_ISA
#define FASTATTN_ISA generic
#endif

namespace fastattn::FASTATTN_ISA {

void attention_fwd(const AttentionParams& p);
void attention_bwd(const AttentionBackwardParams& p);
void hard_fwd(const HardParams& p);
void summary_fwd(const SummaryParams& p);
double fma_peak(DType dtype, int num_threads, double seconds);

extern const CpuKernels kKernels;

}  // namespace fastattn::FASTATTN_ISA

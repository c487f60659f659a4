#include "isa.h"
namespace fastattn::FASTATTN_ISA {
void attention_bwd(const AttentionBackwardParams&) {}
}  // namespace fastattn::FASTATTN_ISA

// Errors that only a kernel can find. Their text is put together here, once, and not in files that are
// compiled for each instruction set.
#pragma once

#include <cstdint>

namespace fastattn {

// std::invalid_argument: the given lse of a row makes its weights add up to something else than 1.
[[noreturn]] void throw_wrong_lse(int64_t batch, int64_t head, int64_t row, double total);

}  // namespace fastattn

// Errors that only a kernel can find. Their text is put together here, once, and not in files that are
// compiled for each instruction set.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>

namespace fastattn {

// The first of the rows whose given lse makes their weights add up to something else than 1: threads come
// upon them in any order, and the error must not tell which.
class WrongLse {
 public:
  void add(int64_t batch, int64_t head, int64_t row, double total);

  // std::invalid_argument: there was a row.
  void throw_if_any() const;

 private:
  std::mutex mutex_;
  bool any_ = false;
  std::array<int64_t, 3> at_{};  // batch, head, row
  double total_ = 0;
};

}  // namespace fastattn

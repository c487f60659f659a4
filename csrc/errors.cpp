#include "errors.h"

#include <sstream>
#include <stdexcept>

namespace fastattn {

void WrongLse::add(int64_t batch, int64_t head, int64_t row, double total) {
  const std::array<int64_t, 3> at{batch, head, row};
  const std::lock_guard<std::mutex> lock(mutex_);
  if (any_ && at_ < at) return;
  any_ = true;
  at_ = at;
  total_ = total;
}

void WrongLse::throw_if_any() const {
  if (!any_) return;
  const auto& [batch, head, row] = at_;
  std::ostringstream text;
  text
      << "lse must be what attention returns for the same arguments, got one that makes the weights of batch "
      << batch << ", head " << head << ", query " << row << " add up to " << total_;
  throw std::invalid_argument(text.str());
}

}  // namespace fastattn

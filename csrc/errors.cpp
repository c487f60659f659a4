#include "errors.h"

#include <sstream>
#include <stdexcept>

namespace fastattn {

void throw_wrong_lse(int64_t batch, int64_t head, int64_t row, double total) {
  std::ostringstream text;
  text
      << "lse must be what attention returns for the same arguments, got one that makes the weights of batch "
      << batch << ", head " << head << ", query " << row << " add up to " << total;
  throw std::invalid_argument(text.str());
}

}  // namespace fastattn

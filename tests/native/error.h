// How far results are from the definition's.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "problem.h"

namespace smoke {

struct Result {
  const char* name;
  double error;
};

// The largest difference relative to the largest finite value; NaN where one is NaN or an infinity is missed.
template <typename T>
double error(const Array<T>& got, const Array<double>& want) {
  double difference = 0, scale = 1e-30;
  for (size_t n = 0; n < want.data.size(); ++n) {
    const double x = got.data[n], y = want.data[n];
    if (x == y) continue;
    if (!std::isfinite(x) || !std::isfinite(y)) return std::numeric_limits<double>::quiet_NaN();
    difference = std::max(difference, std::fabs(x - y));
    scale = std::max(scale, std::fabs(y));
  }
  return difference / std::max(scale, 1.0);
}

}  // namespace smoke

// Runs the CPU kernels without Python and compares them with loops: under emulators of other processors,
// under the address, undefined-behaviour and thread sanitizers (scripts/test_native.sh, scripts/sanitize.sh).
// The instruction sets that it is given are tried, without arguments every one of the build that runs here.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "definition.h"
#include "error.h"
#include "problem.h"
#include "summary.h"
#include "summary_gradients.h"

namespace {

using namespace smoke;
using fastattn::AttentionBackwardParams;

constexpr int64_t kAny = fastattn::kUnbounded;

std::vector<Case> cases() {
  std::vector<Case> list = {
      {"one", 1, 1, 1, 1, 1, 1, 1},
      {"dense", 2, 2, 2, 67, 131, 64, 64},
      {"causal gqa", 1, 4, 2, 97, 97, 40, 24, -kAny, 0, 0, false, 2},
      {"window softcap sinks", 1, 2, 1, 101, 150, 33, 65, -30, 7, 5.0, true, 2},
      {"few rows", 1, 4, 2, 3, 170, 40, 29, -kAny, 0, 0, true},
      {"long", 1, 1, 1, 300, 700, 128, 128, -kAny, 0, 0, false, 3},
      {"empty rows", 1, 1, 1, 90, 50, 16, 16, -kAny, 0, 0, true},
      {"additive", 2, 2, 1, 67, 131, 19, 24, -kAny, 0, 0, false, 2, Score::kAdditive},
      {"additive few rows", 1, 1, 1, 3, 90, 33, 8, -kAny, 0, 0, true, 1, Score::kAdditive},
      {"gaussian", 1, 2, 2, 41, 300, 5, 9, -40, 20, 0, false, 2, Score::kGaussian},
      {"boxcar", 1, 1, 1, 50, 130, 2, 3, -60, 60, 0, true, 1, Score::kBoxcar},
      {"epanechnikov", 1, 1, 1, 50, 130, 1, 3, -60, 60, 0, false, 1, Score::kEpanechnikov},
      {"triangular", 1, 2, 1, 30, 70, 1, 3, -60, 60, 0, false, 1, Score::kTriangular},
  };
  const auto add = [&list](const char* name, const Case& like) -> Case& {
    list.push_back(like);
    list.back().name = name;
    list.back().num_threads = 3;
    return list.back();
  };
  const Case grouped{"", 2, 6, 2, 70, 190, 24, 17};
  add("dropout", grouped).dropout_p = 0.3;
  for (const Mask mask : {Mask::kBool, Mask::kRanges, Mask::kBlocks}) {
    const char* names[] = {"", "bool mask", "key ranges", "block mask"};
    Case& c = add(names[static_cast<int>(mask)], grouped);
    c.mask = mask;
    c.has_sinks = true;
    c.lo = -150;
  }
  for (const Bias bias : {Bias::kMatrix, Bias::kKeys, Bias::kRows, Bias::kOne, Bias::kDiagonals}) {
    const char* names[] = {"", "bias", "bias of keys", "bias of rows", "one bias", "bias of diagonals"};
    Case& c = add(names[static_cast<int>(bias)], grouped);
    c.bias = bias;
    c.hi = 10;
  }
  Case& all = add("everything", grouped);
  all.mask = Mask::kBlocks;
  all.bias = Bias::kDiagonals;
  all.dropout_p = 0.5;
  all.softcap = 3;
  Case& packed = add("packed", {"", 4, 4, 2, 130, 140, 20, 12, -kAny, 0});
  packed.lengths_q = {5, 130, 0, 33};
  packed.lengths_k = {9, 140, 20, 0};
  Case& additive = add("packed additive dropout", packed);
  additive.score = Score::kAdditive;
  additive.dropout_p = 0.2;
  // Backward in chunks of keys; and so large a dQ of a group that it is made of some heads at a time.
  add("many chunks", {"", 1, 4, 1, 70, 1100, 8, 8, -300, 0});
  add("large group", {"", 1, 6, 1, 1100, 600, 256, 8, -8, 8});
  // So few rows that their keys are split, and yet several tiles, for as many threads.
  add("few rows, keys split", {"", 1, 2, 1, 50, 1100, 20, 12, -kAny, 0, 0, true});
  Case& cache = add("cache", {"", 3, 4, 2, 2, 2300, 24, 16, -kAny, 0, 0, true});
  cache.lengths_k = {2300, 0, 1029};
  Case& paged = add("paged cache", cache);
  paged.page_size = 23;
  return list;
}

// The weights, by head and averaged, as far as a forward pass gives them.
template <typename T>
double weights_error(Problem<T>& x, const Problem<double>& want) {
  using A = typename Problem<T>::A;
  const Case& c = x.c;
  double worst = 0;
  for (const bool average : {false, true}) {
    const int64_t heads = average ? 1 : c.num_heads;
    Array<A> got(c.batch, heads, c.seqlen_q, c.seqlen_k);
    Array<double> exact(c.batch, heads, c.seqlen_q, c.seqlen_k);
    fastattn::AttentionParams p = x.params();
    p.weights = got.view();
    p.average_weights = average;
    fastattn::cpu_kernels().attention_fwd(p);
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t h = 0; h < c.num_heads; ++h)
        for (int64_t i = 0; i < c.seqlen_q; ++i)
          for (int64_t j = 0; j < c.seqlen_k; ++j)
            exact.at(b, average ? 0 : h, i, j) += want.weights.at(b, h, i, j) / (average ? c.num_heads : 1);
    const double e = error(got, exact);
    if (!(e <= worst)) worst = e;
  }
  return worst;
}

// By how much a chosen key's score, with the noise of a draw, falls short of the best; NaN where one is
// chosen in a row that sees none, or none in a row that sees some.
template <typename T>
double hard_error(Problem<T>& x, const Problem<double>& want, bool draw) {
  const Case& c = x.c;
  Array<int64_t> index(c.batch, c.num_heads, c.seqlen_q, 1);
  fastattn::HardParams p;
  static_cast<fastattn::AttentionParams&>(p) = x.params();
  p.index = index.view();
  p.seed = draw ? &x.seed : nullptr;
  fastattn::cpu_kernels().hard_fwd(p);
  double worst = 0;
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.num_heads; ++h)
      for (int64_t i = 0; i < c.seqlen_q; ++i) {
        const int64_t chosen = index.at(b, h, i, 0);
        double best = -kInfinity, got = -kInfinity;
        for (int64_t j = 0; j < c.seqlen_k; ++j) {
          if (!want.sees(b, h, i, j)) continue;
          const uint32_t word = fastattn::dropout_word(static_cast<uint64_t>(x.seed),
                                                       static_cast<uint32_t>(b * c.num_heads + h),
                                                       static_cast<uint32_t>(i), static_cast<uint32_t>(j));
          const double noise = -std::log(-std::log1p(-(word + 0.5) / 4294967296.0));
          const double s = want.scores.at(b, h, i, j) + (draw ? noise : 0);
          best = std::max(best, s);
          if (j == chosen) got = s;
        }
        if (best == -kInfinity ? chosen != -1 : got == -kInfinity)
          return std::numeric_limits<double>::quiet_NaN();
        if (best != -kInfinity) worst = std::max(worst, best - got);
      }
  return worst;
}

template <typename T>
bool run(const Problem<double>& want, const char* isa) {
  const Case& c = want.c;
  Problem<T> x(c);
  const AttentionBackwardParams p = x.params();
  fastattn::cpu_kernels().attention_fwd(p);
  std::vector<Result> results = {{"out", error(x.out, want.out)}, {"lse", error(x.lse, want.lse)}};
  if (!c.cached()) {
    fastattn::cpu_kernels().attention_bwd(p);
    results.push_back({"dq", error(x.dq, want.dq)});
    results.push_back({"dk", error(x.dk, want.dk)});
    results.push_back({"dv", error(x.dv, want.dv)});
    results.push_back({"dbias", error(x.dbias, want.dbias)});
    if (c.has_sinks) results.push_back({"dsinks", error(x.dsinks, want.dsinks)});
    if (c.score == Score::kAdditive) results.push_back({"dw", error(x.dw, want.dw)});
  }
  const bool is_small = c.num_heads * c.seqlen_q * c.seqlen_k < 100000;
  if (is_small && !c.cached() && !c.packed()) results.push_back({"weights", weights_error(x, want)});
  if (is_small && c.score == Score::kDot && !c.cached() && !c.packed()) {
    results.push_back({"hard", hard_error(x, want, false)});
    results.push_back({"hard draw", hard_error(x, want, true)});
    add_summary_results(x, want, results);
    add_summary_gradients<T>(c, x.lse, results);
  }
  // About 100 ulp of the largest value; what comes as bfloat16 is rounded to 8 bits, delta made of it.
  const double bound = sizeof(T) == 8 ? 1e-13 : sizeof(T) == 4 ? 2e-5 : 2e-2;
  bool passed = true;
  for (const Result& result : results) {
    if (result.error <= bound) continue;
    std::printf("FAILED %s, %zu bytes, %s: error of %s is %g, bound %g\n", isa, sizeof(T), c.name,
                result.name, result.error, bound);
    passed = false;
  }
  return passed;
}

// The same problem from two threads of the caller's at once.
bool run_twice(const Problem<double>& want, const char* isa) {
  bool other_passed = false;
  std::thread other([&] { other_passed = run<float>(want, isa); });
  const bool passed = run<float>(want, isa);
  other.join();
  return passed && other_passed;
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<std::string> isas(arguments + 1, arguments + count);
  if (isas.empty()) isas = fastattn::available_isas();
  int passed = 0, failed = 0;
  for (const Case& c : cases()) {
    Problem<double> want(c);
    define(want);
    for (const std::string& isa : isas) {
      fastattn::set_cpu_isa(isa);
      const char* name = isa.c_str();
      for (const bool ok : {run<float>(want, name), run<double>(want, name), run<BFloat16>(want, name),
                            run_twice(want, name)})
        ++(ok ? passed : failed);
    }
  }
  for (const std::string& isa : isas) std::printf("%s done\n", isa.c_str());
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}

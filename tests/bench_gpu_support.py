"""What the tests of `make bench-gpu` share: invented clocks, small cases, results."""

from __future__ import annotations

import pytest
import torch
from triton_support import INSTALLED

from fastattn.bench.contenders import Contender
from fastattn.bench.gpu import check, report
from fastattn.bench.gpu.runner import Options, Result
from fastattn.bench.measure import Timing
from fastattn.bench.work import Work
from fastattn.testing.bench_case import BenchCase, bench_case
from fastattn.testing.gpu_bench_cases import GPU_BENCH_CASES

# Where there is a GPU nothing is interpreted, and kernels do not take CPU tensors.
interpreted = pytest.mark.skipif(
    not INSTALLED or torch.cuda.is_available(),
    reason="needs Triton's interpreter, which a GPU makes superfluous",
)
CPU = torch.device("cpu")
QUICK = Options(quick=True, min_sample=1e-9, host_calls=1)
TINY = (1, 2, 16, 16)
PACKED = {"op": "varlen", "lengths_q": (3, 9, 4), "lengths_k": (3, 9, 4)}


class FakeClock:
    """Calls once, and says that it took as long as the contender's place in the list of names."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __call__(self, contender: Contender, calls: int) -> float:
        with contender.forced():
            contender.call()
        return 1e-3 * (
            1 + (self.names.index(contender.name) if contender.name in self.names else len(self.names))
        )


def tiny(group: str, timed: str = "forward", **options) -> BenchCase:
    return bench_case(group, TINY, timed, **options)


def result(bench: BenchCase, **seconds: float) -> Result:
    """A result with these medians, by path; "_" stands for "-"."""
    timings = {name.replace("_", "-"): Timing((each,) * 3, 1) for name, each in seconds.items()}
    case = bench.case
    pairs = case.batch * case.heads * case.queries * case.keys
    return Result(bench, timings, Work(pairs, 4.0 * pairs * case.head_dim, 1))


def named(pattern: str) -> BenchCase:
    [found] = [case for case in GPU_BENCH_CASES if case.name == pattern]
    return found


MACHINE = {
    "gpu": "NVIDIA H200", "capability": "9.0", "multiprocessors": 132, "memory_gib": 139.8, "cache_mib": 60.0,
    "driver": "580", "power_limit": "700 W", "fastattn": "0", "torch": "2", "triton": "3", "cuda": "13",
    "cudnn": 9, "python": "3.12", "device": "cuda:0", "platform": "Linux",
}  # fmt: skip
CEILINGS = {"product_tflops": 788.0, "copy_tbs": 4.3}


def whole_report() -> report.Report:
    """A report of every case, with invented times that depend on the case and the path."""
    paths = ("fastattn", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "flex")
    results = []
    for number, bench in enumerate(GPU_BENCH_CASES):
        case = bench.case
        work = Work(1, 4.0 * case.batch * case.heads * case.queries**2 * case.head_dim, 1)
        timings = {
            name: Timing(
                tuple(work.flops / 1e12 / (300 + 60 * place + number + each) for each in range(3)), 1
            )
            for place, name in enumerate(reversed(paths))
        }
        results.append(Result(bench, timings, work, refused={"loop": "RuntimeError: no"}, seconds=1.0))
    outcomes = [
        check.Outcome("one", check.PASSED),
        check.Outcome("two", check.FAILED, "AssertionError: out: far"),
    ]
    outcomes.append(check.Outcome("three", check.SKIPPED, "it has no float64"))
    return report.Report(MACHINE, CEILINGS, outcomes, results, ["left"], {})

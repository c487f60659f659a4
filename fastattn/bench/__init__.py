"""Timing attention against PyTorch's own, in one process and interleaved: `python -m fastattn bench`.

`work` counts what a call computes, `contenders` makes the calls, `measure` times them, `machine` measures the
ceilings, `runner` puts rows together, `report` prints and compares them, `plot` draws them. The cases are in
`fastattn.testing.bench_cases`.
"""

from fastattn.bench.report import GOALS, Report
from fastattn.bench.runner import Options, run
from fastattn.testing.bench_cases import BENCH_CASES, BenchCase

__all__ = ["BENCH_CASES", "GOALS", "BenchCase", "Options", "Report", "run"]

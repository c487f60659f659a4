"""Timing attention against PyTorch's own, in one process and interleaved: `python -m fastattn bench`.

`work` counts what a call computes, `contenders` makes the calls (`eager` and `padded` those for which PyTorch
has no function), `measure` times them, `machine` measures the ceilings, `runner` puts rows together, `goals`
says what is promised, `report` judges it, `table` prints, `plot` draws. The cases are in
`fastattn.testing.bench_cases`.
"""

from fastattn.bench.goals import GOALS
from fastattn.bench.report import Report
from fastattn.bench.runner import Options, run
from fastattn.testing.bench_case import BenchCase
from fastattn.testing.bench_cases import BENCH_CASES

__all__ = ["BENCH_CASES", "GOALS", "BenchCase", "Options", "Report", "run"]

"""Each quick case, ours and PyTorch's own choice, as pytest-benchmark entries.

They serve to compare revisions on one machine (`--benchmark-autosave`, `--benchmark-compare`); for the
comparison with PyTorch itself run `python -m fastattn bench`, which interleaves the two.
"""

from __future__ import annotations

import pytest

from fastattn.bench import BENCH_CASES, BenchCase
from fastattn.bench.contenders import contenders, usable
from fastattn.bench.machine import thread_count
from fastattn.bench.work import work
from fastattn.testing.inputs import make_inputs

THREADS = 1  # the steadier measure; `python -m fastattn bench` does both
QUICK = [case for case in BENCH_CASES if case.quick]


@pytest.mark.parametrize("side", ["fastattn", "torch"])
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_bench(benchmark, case: BenchCase, side: str):
    inputs = make_inputs(case.case)
    contender = contenders(case, inputs)[0 if side == "fastattn" else 1]
    assert usable(contender) is not None
    amount = work(inputs, case.timed)
    benchmark.group = case.name
    benchmark.extra_info |= {"shape": case.shape, "threads": THREADS, "flops": amount.flops}
    with thread_count(THREADS):
        benchmark(contender.call)

"""What the tests of the benchmark share."""

from __future__ import annotations

from fastattn import bench
from fastattn.testing.bench_cases import BENCH_CASES

TINY = bench.Options(threads=(1,), filter="^tiny-call-8x16x64$", seconds=0.01, min_sample=0.001)


def named(name):
    [case] = [case for case in BENCH_CASES if case.name == name]
    return case

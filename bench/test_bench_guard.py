"""Fails where a case has become clearly slower, measured against PyTorch in the same process.

A floor is what a group reached with room for other machines, not what is hoped for: the goals are in
`fastattn.bench.GOALS`. A failure is measured again before it counts, as machines have moods.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastattn.bench import BENCH_CASES, BenchCase, Options
from fastattn.bench.machine import Ceilings, thread_count
from fastattn.bench.runner import run_case
from fastattn.testing.inputs import make_inputs

FLOOR = 0.9  # PyTorch's time over ours, for groups without a floor of their own
FLOORS = {
    "forward": 1.0,
    "backward": 0.95,
    "causal": 1.2,
    "causal backward": 1.2,
    "bool mask": 1.1,
    "padding": 1.2,
    "window 128": 6.0,
    "dropout 0.1": 2.5,
    "dropout 0.1 forward+backward": 1.5,
    "decode bfloat16": 3.0,
    # Calls that compute next to nothing: what is guarded is the overhead in Python.
    "tiny call": 0.5,
    "tiny call with gradient": 0.3,
    "tiny call forward+backward": 0.35,
}
# One case for each group.
GUARDED = list({case.group: case for case in BENCH_CASES if case.quick}.values())
ATTEMPTS = 3


@pytest.mark.parametrize("case", GUARDED, ids=lambda case: case.group)
def test_not_slower_than_its_floor(case: BenchCase):
    floor = FLOORS.get(case.group, FLOOR)
    inputs = make_inputs(case.case)
    options = Options(seconds=0.4)
    seen = []
    for attempt in range(ATTEMPTS):
        with thread_count(1):
            result = run_case(case, inputs, Ceilings(1), replace(options, seconds=0.4 * 2**attempt))
        seen.append(str(result.ratio))
        if result.ratio.high >= floor:
            return
    pytest.fail(f"{case.name}: PyTorch's time over ours must reach {floor}, got {', '.join(seen)}")

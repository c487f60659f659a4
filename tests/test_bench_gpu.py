"""Runs of `make bench-gpu` with invented times."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace

import pytest
import torch
from bench_gpu_support import CPU, PACKED, QUICK, FakeClock, interpreted, tiny

from fastattn.bench.contenders import OURS, Contender
from fastattn.bench.gpu import contenders, runner
from fastattn.bench.gpu.runner import Options, Result, run, run_case
from fastattn.bench.measure import Ratio
from fastattn.bench.work import Work
from fastattn.testing.cases import tensor_bias
from fastattn.testing.gpu_bench_cases import CAUSAL_MASK, HOST
from fastattn.testing.inputs import make_inputs


@interpreted
@pytest.mark.parametrize(
    ("timed", "options", "paths"),
    [
        ("forward", {"mask": CAUSAL_MASK}, {"sdpa-flash", "flex"}),
        ("backward", {"bias": tensor_bias("h", "q", "k")}, set()),
        ("forward", PACKED, {"loop", "flex"}),
        ("forward", {"dropout_p": 0.1}, set()),
        ("forward", {"softcap": 2.0}, {"flex"}),
    ],
    ids=["causal", "bias-backward", "varlen", "dropout", "softcap"],
)
def test_a_case_runs_on_every_path_that_takes_it(timed, options, paths):
    """Under the interpreter, with a clock that invents times; what PyTorch refuses on CPU is told."""
    bench = tiny("x", timed, **options)
    found = run_case(bench, CPU, FakeClock(OURS), QUICK, with_flex=True, compiled=False)
    assert found.failure is None, found
    assert found.timings[OURS].median == 1e-3
    assert paths <= set(found.timings), found.refused
    assert all(found.ratio_to(name).value == 2.0 for name in paths)
    assert not bench.case.dropout_p or not found.differences
    if found.timings.keys() != {OURS}:
        assert found.best in found.timings
    assert all("\n" not in reason for reason in found.refused.values())
    assert found.tflops(OURS) == found.work.flops / 1e-3 / 1e12


@interpreted
def test_bias_gradients_are_part_of_a_backward_pass():
    inputs = make_inputs(tiny("x", bias=tensor_bias("h", "q", "k")).case)
    for timed, count in (("backward", 4), ("step", 4)):
        ours = contenders.contenders(
            tiny("x", timed, bias=tensor_bias("h", "q", "k")), inputs, with_flex=False
        )[0]
        assert len(ours.call()) == count


def test_copies_are_called_in_turn_and_fill_the_cache():
    calls = contenders.in_turn([lambda: "a", lambda: "b"])
    assert [calls() for _ in range(3)] == ["a", "b", "a"]
    inputs = make_inputs(tiny("x").case)
    copies = contenders.cloned(inputs, 3)
    assert len({copy.leaves["q"].data_ptr() for copy in copies}) == 3
    assert all(torch.equal(copy.dout, inputs.dout) for copy in copies)
    assert runner.copies_for(100, 0) == 1
    assert runner.copies_for(100, 50) == 1
    assert runner.copies_for(30, 50) == 4
    assert runner.copies_for(1, 10**6) == runner.MOST_COPIES


def test_a_failing_path_is_told_and_the_others_run():
    def fail():
        warnings.warn("too wide (Triggered internally at x.cpp:1.)", stacklevel=1)
        raise RuntimeError("no kernel\nfor this")

    ways = [
        Contender(OURS, lambda: torch.ones(2)),
        Contender("broken", fail),
        Contender("off", lambda: torch.full((2,), 5.0)),
    ]
    taken, differences, refused = runner.first_calls(ways, 1, tiny("x"), CPU)
    assert [way.name for way in taken] == [OURS, "off"]
    assert refused == {"broken": "RuntimeError: no kernel (too wide)"}
    assert differences["off"] == pytest.approx(0.8)
    assert "differs by" in runner.worst(differences, 0.1)
    assert runner.worst({"off": 3.0, "good": 0.01}, 0.1) is None
    assert runner.worst({}, 0.1) is None
    assert "differs by nan" in runner.worst({"good": float("nan")}, 0.1)


def test_a_hopeless_path_is_timed_once():
    ways = [Contender(name, lambda: None) for name in (OURS, "a", "b")]
    seconds = {OURS: 1e-3, "a": 1e-3, "b": 1.0}
    timings, refused = runner.time_all(ways, lambda way, calls: seconds[way.name], QUICK, None)
    assert not refused
    assert [len(timings[name].seconds) for name in (OURS, "a", "b")] == [3, 3, 1]
    slow = Result(tiny("x"), timings, Work(1, 1.0, 1))
    assert slow.ratio_to("b") == Ratio(1e3, 1e3, 1e3)
    assert runner.time_all([], lambda way, calls: 0.0, QUICK, None) == ({}, {})


def test_a_path_that_fails_while_it_is_timed_is_told():
    def clock(way: Contender, calls: int) -> float:
        if way.name == failing:
            raise RuntimeError("out of memory\nTried to allocate")
        return 1.0

    ways = [Contender(name, lambda: None) for name in (OURS, "a")]
    failing = "a"
    timings, refused = runner.time_all(ways, clock, QUICK, None)
    assert list(timings) == [OURS] and refused == {"a": "RuntimeError: out of memory"}
    failing = OURS
    with pytest.raises(RuntimeError, match="out of memory"):
        runner.time_all(ways, clock, QUICK, None)


def test_a_case_that_fails_does_not_end_the_run(monkeypatch):
    """Unless the device answers no more; what is left is then named, as where the time is up."""

    def run_case(bench, *options):
        if bench.group == "two":
            raise MemoryError("2 TB\nmore")
        return Result(bench, {}, Work(1, 1.0, 1))

    cases = tuple(tiny(group) for group in ("one", "two", "three"))
    monkeypatch.setattr(runner, "GPU_BENCH_CASES", cases)
    monkeypatch.setattr(runner, "run_case", run_case)
    heard: list[str | None] = []
    clock = FakeClock(OURS)
    found, left = run(Options(), CPU, lambda each: heard.append(each.failure), clocks=(clock, clock))
    assert [each.failure for each in found] == [None, "MemoryError: 2 TB", None] == heard and not left
    assert found[1].rows() == []
    monkeypatch.setattr(runner, "answers", lambda device: False)
    found, left = run(Options(), CPU, clocks=(clock, clock))
    assert len(found) == 1 and left == [case.name for case in cases[1:]]


@interpreted
def test_a_run_stops_when_the_time_is_up(monkeypatch):
    cases = (tiny("one"), replace(tiny(HOST, "step"), quick=True), tiny("three"))
    monkeypatch.setattr(runner, "GPU_BENCH_CASES", cases)
    options = replace(QUICK, quick=False)
    clock = FakeClock(OURS)
    found, left = run(options, CPU, clocks=(clock, clock), compiled=False)
    assert [each.bench.group for each in found] == ["one", HOST, "three"] and not left
    assert found[1].tflops(OURS) is None
    assert set(found[1].timings) == {OURS, "sdpa"}
    assert run(options, CPU, started=-1e9, clocks=(clock, clock)) == ([], [case.name for case in cases])


def test_the_filter_is_checked():
    with pytest.raises(ValueError, match="filter must be a regular expression"):
        Options(filter="(").cases()
    with pytest.raises(ValueError, match="one of the groups full forward, "):
        Options(filter="nothing").cases()
    assert {case.group for case in Options(filter="^gqa", quick=True).cases()} == {
        "gqa forward",
        "gqa backward",
    }


def test_samples_are_taken_after_a_first_one_that_sets_their_size():
    times = itertools.count(1)
    timings, _ = runner.time_all(
        [Contender(OURS, lambda: None)], lambda way, calls: float(next(times)), QUICK, 1
    )
    assert timings[OURS].seconds == (2.0, 3.0, 4.0)

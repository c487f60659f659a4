"""Runs cases on a device, every path that takes a case in turns; what fails is noted, and the run goes on."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastattn.bench.contenders import OURS, Contender
from fastattn.bench.gpu.contenders import contenders
from fastattn.bench.gpu.device import DeviceClock, HostClock, answers, cache_bytes, synchronize
from fastattn.bench.measure import Ratio, Timing, calls_for, interleave, ratio
from fastattn.bench.runner import TOLERANCE, chosen_cases, disagreement
from fastattn.bench.work import Work, work
from fastattn.testing.bench_case import BenchCase
from fastattn.testing.checking import refusal
from fastattn.testing.gpu_bench_cases import GPU_BENCH_CASES, HOST, is_compiled
from fastattn.testing.inputs import make_inputs

Clock = Callable[[Contender, int], float]
MOST_COPIES = 16
NO_WORK = Work(0, 0.0, 0)
HOPELESS = 8.0  # a path this many times slower than PyTorch's fastest is timed once and no more


@dataclass(frozen=True)
class Options:
    """How a run is made.

    Args:
        quick: only the quick cases, with fewer rounds.
        filter: a regular expression that a case's group or name must contain.
        minutes: after which no further case is begun.
        flex: whether FlexAttention takes part at every length, not at some alone.
        rest: seconds of idleness before each sample.
        min_sample: seconds that a sample takes at least, by repeating short calls.
        host_calls: calls in a sample of the host's time: few enough for the device's queue to hold.
        backend: of ours, "triton", or "cuda" in those cases that it takes.
    """

    quick: bool = False
    filter: str = ""
    minutes: float = 9.0
    flex: bool = False
    rest: float = 0.1
    min_sample: float = 0.015
    host_calls: int = 100
    backend: str = "triton"

    @property
    def rounds(self) -> int:
        return 3 if self.quick else 4

    def cases(self) -> list[BenchCase]:
        """The chosen cases, in order.

        Raises:
            ValueError: the filter is no regular expression, or nothing is chosen.
        """
        return chosen_cases(GPU_BENCH_CASES, self.filter, self.quick)


@dataclass(frozen=True)
class Result:
    """One case.

    Args:
        timings: of every path that took it; ours is missing where it failed.
        work: what it computes.
        refused: why each other path did not take it.
        differences: the largest difference of each path's results from ours, of PyTorch's largest; none with
            dropout.
        failure: what was wrong with our results, or None.
        seconds: that the case took, compiling and resting included.
    """

    bench: BenchCase
    timings: dict[str, Timing]
    work: Work
    refused: dict[str, str] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    failure: str | None = None
    seconds: float = 0.0

    @property
    def best(self) -> str | None:
        """PyTorch's fastest path, or None where none took the case."""
        others = {name: timing.median for name, timing in self.timings.items() if name != OURS}
        return min(others, key=others.__getitem__) if others else None

    def tflops(self, name: str) -> float | None:
        """TFLOP/s over visible pairs; None of the host's time, or where the path has none."""
        if self.bench.group == HOST or name not in self.timings:
            return None
        return self.work.flops / self.timings[name].median / 1e12

    def ratio_to(self, name: str | None) -> Ratio | None:
        """A path's time over ours."""
        if name is None or name not in self.timings or OURS not in self.timings:
            return None
        other, ours = self.timings[name], self.timings[OURS]
        if len(other.seconds) != len(ours.seconds):  # hopeless, and timed once
            value = other.median / ours.median
            return Ratio(value, value, value)
        return ratio(other, ours)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each path, of plain values."""
        return [self._row(name, timing) for name, timing in self.timings.items()]

    def _row(self, name: str, timing: Timing) -> dict[str, Any]:
        low, high = timing.quartiles
        found = self.ratio_to(name) if name != OURS else None
        case = self.bench.case
        return {
            "case": self.bench.name,
            "group": self.bench.group,
            "shape": self.bench.shape,
            "timed": self.bench.timed,
            "seqlen": case.queries,
            "head_dim": case.head_dim,
            "path": name,
            "ms": timing.median * 1e3,
            "ms_quartiles": [low * 1e3, high * 1e3],
            "rounds": len(timing.seconds),
            "calls": timing.calls,
            "visible_pairs": self.work.pairs,
            "tflops": self.tflops(name),
            "ratio": None if found is None else found.value,
            "ratio_interval": None if found is None else [found.low, found.high],
            "is_best": name == self.best,
            "difference": self.differences.get(name),
        }


def run(
    options: Options,
    device: torch.device,
    on_result: Callable[[Result], None] | None = None,
    started: float | None = None,
    clocks: tuple[Clock, Clock] | None = None,
    compiled: bool = True,
) -> tuple[list[Result], list[str]]:
    """Run the chosen cases until the time is up.

    Args:
        options: which cases, and how.
        device: where.
        on_result: called with each result as it comes.
        started: `time.perf_counter()` from which the minutes count; None: now.
        clocks: that take samples of the device's and of the host's time; None: CUDA events and a stopwatch.
        compiled: whether FlexAttention is compiled.
    Returns:
        The results, and the names of the cases for which no time was left.
    """
    started = time.perf_counter() if started is None else started
    clocks = clocks or (DeviceClock(device, options.rest), HostClock(device))
    cases = options.cases()
    results: list[Result] = []
    for number, bench in enumerate(cases):
        if time.perf_counter() - started > 60 * options.minutes:
            return results, [case.name for case in cases[number:]]
        clock = clocks[1] if bench.group == HOST else clocks[0]
        with_flex = options.flex or is_compiled(bench)
        begun = time.perf_counter()
        try:
            result = run_case(bench, device, clock, options, with_flex, compiled)
        except Exception as error:  # of any kind, memory that is short for one; the other cases are run
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            result = Result(bench, {}, NO_WORK, failure=reason, seconds=time.perf_counter() - begun)
        if result is None:
            continue
        results.append(result)
        if on_result is not None:
            on_result(result)
        if not answers(device):  # after a fault no call in this process can succeed
            return results, [case.name for case in cases[number + 1 :]]
    return results, []


def run_case(
    bench: BenchCase, device: torch.device, clock: Clock, options: Options, with_flex: bool, compiled: bool
) -> Result | None:
    """First calls, which are compared; then all that took the case, in turns; None where ours refuses it."""
    start = time.perf_counter()
    inputs = make_inputs(bench.case, device=device)
    if options.backend != "triton" and refusal(options.backend, inputs) is not None:
        return None
    amount = work(inputs, bench.timed)
    is_host = bench.group == HOST
    copies = 1 if is_host else copies_for(amount.bytes, cache_bytes(device))
    ways = contenders(bench, inputs, copies, with_flex and not is_host, compiled, options.backend)
    taken, differences, refused = first_calls(ways, copies, bench, device)
    failure = refused.pop(OURS, None)
    if failure is None:
        failure = worst(differences, TOLERANCE[bench.case.dtype])
    timings, more = time_all(taken, clock, options, options.host_calls if is_host else None)
    refused |= more
    return Result(bench, timings, amount, refused, differences, failure, time.perf_counter() - start)


def copies_for(size: int, cache: int) -> int:
    """How many copies of `size` bytes, called in turn, a cache cannot hold."""
    return 1 if size >= 2 * cache else min(MOST_COPIES, math.ceil(2 * cache / max(1, size)))


def first_calls(
    ways: Sequence[Contender], copies: int, bench: BenchCase, device: torch.device
) -> tuple[list[Contender], dict[str, float], dict[str, str]]:
    """Which paths take the case, how far their results are from ours, and why the others do not.

    Every copy of the inputs is called once: some things, a graph to go back through for one, are made then.
    """
    taken, differences, refused = [], {}, {}
    ours: Any = None
    for way in ways:
        said: list[warnings.WarningMessage] = []
        try:
            with warnings.catch_warnings(record=True) as said, way.forced():
                warnings.simplefilter("always")  # PyTorch's reasons not to take a kernel come as warnings
                result = way.compared(way.call())
                for _ in range(copies - 1):
                    way.call()
            synchronize(device)
            if way.name == OURS:
                ours = result
            elif ours is not None and not bench.case.dropout_p:
                differences[way.name] = disagreement(ours, result)
        except Exception as error:  # whatever the reason, it is told, and the rest runs
            refused[way.name] = reason_of(error, said)
        else:
            taken.append(way)
    return taken, differences, refused


def reason_of(error: Exception, said: Sequence[warnings.WarningMessage]) -> str:
    """A line about why a path did not run: the error, and what was said in warnings before it."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    lines = [str(each.message).splitlines()[0].partition(" (Triggered")[0] for each in said]
    return f"{reason} ({'; '.join(dict.fromkeys(lines))})" if lines else reason


def worst(differences: dict[str, float], tolerance: float) -> str | None:
    """What is wrong with our results where they are far from those of every other path, or None.

    One path that differs from ours and from the others has made the mistake itself.
    """
    if not differences or any(each <= tolerance for each in differences.values()):
        return None
    name = min(differences, key=differences.__getitem__)
    return f"differs by {differences[name]:.3g} from {name}, the nearest path"


def time_all(
    ways: Sequence[Contender], clock: Clock, options: Options, calls: int | None
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Every path's samples, of `calls` calls or as many as make a sample; of a hopeless one a single one.

    Returns:
        Those, and why others than ours failed when they were called again.
    """
    once: dict[str, float] = {}
    refused: dict[str, str] = {}
    for way in ways:
        try:
            once[way.name] = clock(way, 1 if calls is None else calls)
        except Exception as error:
            if way.name == OURS:
                raise
            refused[way.name] = reason_of(error, ())
    if not once:
        return {}, refused
    others = [seconds for name, seconds in once.items() if name != OURS]
    limit = HOPELESS * min(others, default=math.inf)
    racing = [way for way in ways if way.name in once and (way.name == OURS or once[way.name] <= limit)]
    counts = [calls or calls_for(once[way.name], options.min_sample) for way in racing]
    timed = interleave(racing, counts, options.rounds, clock=clock)
    single = {name: Timing((seconds,), 1) for name, seconds in once.items()}
    return single | {way.name: timing for way, timing in zip(racing, timed, strict=True)}, refused

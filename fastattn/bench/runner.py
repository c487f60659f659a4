"""Runs cases: checks that all contenders agree, picks PyTorch's fastest path, times it against ours."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastattn.bench.contenders import OURS, Contender, contenders, own_contender, usable
from fastattn.bench.machine import Ceilings, thread_count
from fastattn.bench.measure import Ratio, Timing, calls_for, interleave, ratio, rounds_for
from fastattn.bench.work import Work, work
from fastattn.testing.bench_case import BenchCase
from fastattn.testing.bench_cases import BENCH_CASES
from fastattn.testing.inputs import Inputs, make_inputs

# Contenders compute in other orders: that is rounding, of this size relative to the largest result. More is a
# mistake, and the time of a wrong answer is of no interest.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
HOPELESS = 4.0  # a PyTorch path this many times slower than the fastest is timed once and no more
SLOW = 0.2  # seconds of a call beyond which one call is enough to choose PyTorch's path by


def chosen_cases(cases: Sequence[BenchCase], text: str, quick: bool) -> list[BenchCase]:
    """Those whose group or name the regular expression `text` finds; of a quick run the quick ones.

    Raises:
        ValueError: `text` is no regular expression, or nothing is chosen.
    """
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise ValueError(f"filter must be a regular expression, got {text!r}: {error}") from None
    chosen = [
        case
        for case in cases
        if (case.quick or not quick) and (pattern.search(case.group) or pattern.search(case.name))
    ]
    if not chosen:
        groups = ", ".join(dict.fromkeys(case.group for case in cases))
        raise ValueError(f"filter must name a case of one of the groups {groups}; got {text!r}")
    return chosen


@dataclass(frozen=True)
class Options:
    """How a run is made.

    Args:
        threads: numbers of threads; each case runs with each, both sides with the same.
        quick: only the quick cases, with less time for each.
        filter: a regular expression that a case's group or name must contain.
        seconds: time for a case and a number of threads, which sets the number of rounds; None: by `quick`.
        flex: whether PyTorch's compiled FlexAttention takes part, see `fastattn.bench.flex`.
        min_sample: seconds that a sample takes at least, by repeating short calls.
    """

    threads: tuple[int, ...] = (1, 2)
    quick: bool = False
    filter: str = ""
    seconds: float | None = None
    flex: bool = False
    min_sample: float = 0.004
    min_rounds: int = 5
    max_rounds: int = 60
    screening_rounds: int = 3

    @property
    def budget(self) -> float:
        return self.seconds if self.seconds is not None else (0.25 if self.quick else 1.0)

    def cases(self) -> list[BenchCase]:
        """The chosen cases, in order.

        Raises:
            ValueError: the filter is no regular expression, or nothing is chosen.
        """
        return chosen_cases(BENCH_CASES, self.filter, self.quick)


@dataclass(frozen=True)
class Beside:
    """Our other call of a case, timed in the same rounds.

    Args:
        label: what it is, see `Own`.
        timing: its times.
        ratio: its time over the case's: above 1 the case is the faster one.
    """

    label: str
    timing: Timing
    ratio: Ratio


@dataclass(frozen=True)
class Result:
    """One case with one number of threads.

    Args:
        timings: by contender; those other than `fastattn` and `best` were only screened.
        best: PyTorch's fastest path.
        ratio: its time over ours.
        fma_peaks: FLOP/s just before and after the case, and copy_bandwidth: bytes/s; empty and None where
            unknown.
        difference: the largest difference of results between ours and `best`; None with dropout.
        own: our other call, where the case has one.
    """

    bench: BenchCase
    threads: int
    work: Work
    timings: dict[str, Timing]
    best: str
    ratio: Ratio
    fma_peaks: tuple[float, ...]
    copy_bandwidth: float | None
    difference: float | None
    own: Beside | None = None

    @property
    def ours(self) -> Timing:
        return self.timings[OURS]

    @property
    def is_slower(self) -> bool:
        """Clearly slower than PyTorch: the ratio's whole interval is below one (by more than clocks tell)."""
        return self.ratio.high < 0.99

    @property
    def of_fma_peak(self) -> float | None:
        """Our rate as a share of the higher of the two peaks measured next to it."""
        return self.work.flops / self.ours.median / max(self.fma_peaks) if self.fma_peaks else None

    def rows(self) -> list[dict[str, Any]]:
        """One row for each contender, of plain values."""
        return [self._row(name, timing) for name, timing in self.timings.items()]

    def _row(self, name: str, timing: Timing) -> dict[str, Any]:
        low, high = timing.quartiles
        rate = self.work.flops / timing.median
        ours = name == OURS
        own = self.own if ours else None
        return {
            "case": self.bench.name,
            "group": self.bench.group,
            "shape": self.bench.shape,
            "timed": self.bench.timed,
            "threads": self.threads,
            "backend": name,
            "ms": timing.median * 1e3,
            "ms_quartiles": [low * 1e3, high * 1e3],
            "rounds": len(timing.seconds),
            "calls": timing.calls,
            "visible_pairs": self.work.pairs,
            "gflops": rate / 1e9,
            "of_fma_peak": rate / max(self.fma_peaks) if self.fma_peaks else None,
            "gbs": self.work.bytes / timing.median / 1e9 if self.work.is_memory_bound else None,
            "fma_peaks_gflops": [peak / 1e9 for peak in self.fma_peaks],
            "copy_gbs": None if self.copy_bandwidth is None else self.copy_bandwidth / 1e9,
            "best_torch": self.best,
            "ratio": self.ratio.value if ours else None,
            "ratio_interval": [self.ratio.low, self.ratio.high] if ours else None,
            "max_difference": self.difference if ours else None,
            "own": None if own is None else own.label,
            "own_ms": None if own is None else own.timing.median * 1e3,
            "own_ratio": None if own is None else own.ratio.value,
            "own_ratio_interval": None if own is None else [own.ratio.low, own.ratio.high],
        }


def run(
    options: Options, on_result: Callable[[Result], None] | None = None
) -> tuple[list[Result], list[Ceilings]]:
    """Run the chosen cases with each number of threads.

    Args:
        options: which cases, and how.
        on_result: called with each result as it comes.
    Returns:
        The results, and the ceilings for each number of threads.
    Raises:
        ValueError: see `Options.cases`, or a number of threads below one.
        RuntimeError: two contenders disagree about a case's result.
    """
    if not options.threads or min(options.threads) < 1:
        raise ValueError(f"threads must be positive numbers, got {options.threads}")
    results = []
    ceilings = {threads: Ceilings(threads) for threads in options.threads}
    for bench in options.cases():
        inputs = make_inputs(bench.case)
        for threads in options.threads:
            with thread_count(threads):
                results.append(run_case(bench, inputs, ceilings[threads], options))
            if on_result is not None:
                on_result(results[-1])
    return results, list(ceilings.values())


def run_case(bench: BenchCase, inputs: Inputs, ceilings: Ceilings, options: Options) -> Result:
    """Screen every contender, then time ours, PyTorch's fastest and, where there is one, our other call."""
    ways, results, firsts = first_calls(contenders(bench, inputs, options.flex))
    screened = screen(ways, options, () if bench.timed == "backward" else firsts)
    chosen = fastest_path(bench, inputs, screened, options, firsts)
    [place] = [number for number, way in enumerate(ways) if way.name == chosen]
    difference = None if bench.case.dropout_p else disagreement(results[0], results[place])
    if difference is not None and not difference <= TOLERANCE[bench.case.dtype]:
        raise RuntimeError(f"{bench.name}: {OURS} and {chosen} differ by {difference:.3g}")
    results.clear()
    racing = [ways[0], ways[place]]
    seconds = [screened[way.name].median for way in racing]
    own = own_contender(bench, ceilings.threads)
    if own is not None:
        usable(own)  # warms it up
        racing.append(own)
        seconds.append(once(own))
    calls = [calls_for(each, options.min_sample) for each in seconds]
    rounds = rounds_for(seconds, calls, options.budget, options.min_rounds, options.max_rounds)
    fma = [ceilings.measure_fma()]
    timed = interleave(racing, calls, rounds)
    fma.append(ceilings.measure_fma())
    amount = work(inputs, bench.timed)
    return Result(
        bench=bench,
        threads=ceilings.threads,
        work=amount,
        timings=screened | {OURS: timed[0], chosen: timed[1]},
        best=chosen,
        ratio=ratio(timed[1], timed[0]),
        fma_peaks=tuple(peak for peak in fma if peak is not None),
        copy_bandwidth=ceilings.measure_copy() if amount.is_memory_bound or not ceilings.bandwidth else None,
        difference=difference,
        own=None if own is None else Beside(own.name, timed[2], ratio(timed[2], timed[0])),
    )


def first_calls(ways: Sequence[Contender]) -> tuple[list[Contender], list[Any], list[float]]:
    """The contenders that take the case, the results of their first calls and the seconds these took."""
    taken, results, seconds = [], [], []
    for way in ways:
        start = time.perf_counter()
        result = usable(way)
        if result is not None:
            seconds.append(time.perf_counter() - start)
            taken.append(way)
            results.append(result)
    return taken, results, seconds


def fastest_path(
    bench: BenchCase,
    inputs: Inputs,
    screened: dict[str, Timing],
    options: Options,
    firsts: Sequence[float] = (),
) -> str:
    """The name of PyTorch's fastest path; the ratio's samples are taken afresh, so that the choice is fair.

    A backward pass alone is compared with that of the path which is fastest over both passes: "sdpa-math"
    has the forward pass store all probabilities, which is slow, to save the backward pass some work. The
    first calls of such a case, which take `firsts` seconds, are of both passes.
    """
    if bench.timed == "backward":
        steps = contenders(replace(bench, timed="step"), inputs)
        screened = screen([way for way in steps if way.name in screened], options, firsts)
    return min((name for name in screened if name != OURS), key=lambda name: screened[name].median)


def once(way: Contender) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    with way.forced():
        way.call()
    return time.perf_counter() - start


def screen(ways: Sequence[Contender], options: Options, firsts: Sequence[float] = ()) -> dict[str, Timing]:
    """A few rounds of every contender, ours first; one sample where it is hopeless or slow.

    `firsts` are the seconds that the first calls took, if known: a slow one stands for itself, as warming up
    is little of it.
    """
    known = [*firsts, *[0.0] * (len(ways) - len(firsts))]
    seconds = [first if first >= SLOW else once(way) for way, first in zip(ways, known, strict=True)]
    limit = min(SLOW, HOPELESS * min(seconds[1:]))
    close = [(way, calls_for(each, options.min_sample)) for way, each in zip(ways, seconds, strict=True)
             if each <= limit]  # fmt: skip
    timings = interleave([way for way, _ in close], [calls for _, calls in close], options.screening_rounds)
    timed = {way.name: timing for (way, _), timing in zip(close, timings, strict=True)}
    return {way.name: Timing((each,), 1) for way, each in zip(ways, seconds, strict=True)} | timed


def disagreement(one: Any, other: Any) -> float:
    """The largest difference between two contenders' results, relative to the largest magnitude."""
    pairs = [(one, other)] if isinstance(one, Tensor) else list(zip(one, other, strict=True))
    pairs = [(a.detach().double(), b.detach().double()) for a, b in pairs]
    return max(float((a - b).abs().max()) for a, b in pairs) / max(float(b.abs().max()) for _, b in pairs)

"""Interleaved timing, and what can be said from it: medians, quartiles, and ratios with an interval."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from fastattn.bench.contenders import Contender

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Timing:
    """One contender's samples, each the mean of `calls` calls in a row.

    Args:
        seconds: one a round, in the order of the rounds.
        calls: calls in a sample.
    """

    seconds: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def quartiles(self) -> tuple[float, float]:
        return self.quantile(0.25), self.quantile(0.75)

    def quantile(self, q: float) -> float:
        return float(torch.tensor(self.seconds, dtype=torch.float64).quantile(q))


@dataclass(frozen=True)
class Ratio:
    """One median over another, and a 95% interval of it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}]"


def sample(contender: Contender, calls: int) -> float:
    """Seconds a call, over `calls` calls."""
    call, clock = contender.call, time.perf_counter
    with contender.forced():
        start = clock()
        for _ in repeat(None, calls):
            call()
        return (clock() - start) / calls


def calls_for(seconds: float, at_least: float) -> int:
    """Calls of `seconds` each that make a sample of `at_least` seconds."""
    return max(1, round(at_least / max(seconds, 1e-9)))


def rounds_for(seconds: Sequence[float], calls: Sequence[int], budget: float, fewest: int, most: int) -> int:
    """Rounds of these calls, of `seconds` each, that fill the budget."""
    a_round = sum(count * each for count, each in zip(calls, seconds, strict=True))
    return max(fewest, min(most, math.ceil(budget / a_round)))


def interleave(
    contenders: Sequence[Contender],
    calls: Sequence[int],
    rounds: int,
    then: Callable[[], None] | None = None,
    clock: Callable[[Contender, int], float] = sample,
) -> list[Timing]:
    """Time every contender once a round, in turn: a, b, c, c, b, a, a, ...

    What changes slowly (clock rate, other work on the machine) then meets all of them alike; the order turns
    round so that none is always first. `then` is called after each round, outside the timing. `clock` takes a
    sample.
    """
    seconds: list[list[float]] = [[] for _ in contenders]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            order = range(len(contenders)) if number % 2 == 0 else reversed(range(len(contenders)))
            for index in order:
                seconds[index].append(clock(contenders[index], calls[index]))
            if then is not None:
                then()
    finally:
        if collecting:
            gc.enable()
    return [Timing(tuple(times), count) for times, count in zip(seconds, calls, strict=True)]


def ratio(over: Timing, under: Timing) -> Ratio:
    """median(over) / median(under) with a bootstrap interval over rounds, in which both were timed together.

    Raises:
        ValueError: they do not come from the same rounds.
    """
    if len(over.seconds) != len(under.seconds):
        raise ValueError(f"timings must share rounds, got {len(over.seconds)} and {len(under.seconds)}")
    times = torch.tensor([over.seconds, under.seconds], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    rounds = times.shape[1]
    drawn = torch.randint(rounds, (RESAMPLES, rounds), generator=generator)
    medians = _median(times[:, drawn])
    bounds = (medians[0] / medians[1]).quantile(
        torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    )
    value = _median(times)
    return Ratio(float(value[0] / value[1]), float(bounds[0]), float(bounds[1]))


def _median(times: Tensor) -> Tensor:
    return times.quantile(0.5, dim=-1)

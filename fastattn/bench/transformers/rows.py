"""Rows of the measurement, and what they say of the goals."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.bench.contenders import OURS
from fastattn.bench.measure import Timing, ratio
from fastattn.bench.report import geometric_mean

HEADER = f"{'model and work':<52}{'attention':<10}{'s':>9}{'MB':>8}  fastattn is faster [95%]"
ATTENTIONS = (OURS, "sdpa", "eager")
FREE = "free"  # an attention that takes no time
VOCABULARY = 1000
# title, at least how many times as fast as sdpa, the kind of work
GOALS = (
    ("prefill", 1.3, "prefill"),
    ("decoding", 1.0, "decode"),
    ("training, no dropout", 1.0, "train"),
    ("training, dropout 0.1", 1.5, "train, dropout 0.1"),
)


@dataclass(frozen=True)
class Row:
    """One kind of work on one attention.

    Args:
        kind: "prefill", "decode", "train", or "train, dropout 0.1".
        work: what was done.
        attention: transformers' name of the implementation, or FREE.
        timing: seconds of each round.
        ratio: its time over fastattn's, or None for fastattn itself.
        interval: of the ratio, 95%, where both were timed in the same rounds.
        megabytes: by which the work raised the process's peak, where that was measured.
    """

    kind: str
    work: str
    attention: str
    timing: Timing
    ratio: float | None
    interval: tuple[float, float] | None = None
    megabytes: float | None = None

    def line(self) -> str:
        memory = "" if self.megabytes is None else f"{self.megabytes:.0f}"
        versus = "" if self.ratio is None else f"{self.ratio:.2f}x {self.spread()}"
        return f"{self.work:<52}{self.attention:<10}{self.timing.median:>9.4g}{memory:>8}  {versus}".rstrip()

    def spread(self) -> str:
        return "once" if self.interval is None else f"[{self.interval[0]:.2f}, {self.interval[1]:.2f}]"

    def row(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "work": self.work,
            "attention": self.attention,
            "seconds": self.timing.median,
            "rounds": len(self.timing.seconds),
            "megabytes": self.megabytes,
            "ratio": self.ratio,
            "ratio_interval": None if self.interval is None else list(self.interval),
        }


def rows_of(
    kind: str, work: str, seconds: dict[str, list[float]], peaks: dict[str, float | None] | None = None
) -> Iterator[Row]:
    """A row for each attention of one work, from the seconds of its rounds; fastattn is among them."""
    ours = Timing(tuple(seconds[OURS]), 1)
    for name, samples in seconds.items():
        timing, found, interval = Timing(tuple(samples), 1), None, None
        if name != OURS:
            found = timing.median / ours.median
            if len(samples) == len(ours.seconds) > 1:
                versus = ratio(timing, ours)
                interval = versus.low, versus.high
        yield Row(kind, work, name, timing, found, interval, (peaks or {}).get(name))


def in_turn(
    works: dict[str, Callable[[], Sequence[float]]], rounds: int, once: Sequence[str] = ()
) -> dict[str, list[Sequence[float]]]:
    """What each work's calls return, in rounds whose order turns round.

    Args:
        works: name -> a call that does the work and returns its seconds.
        once: names that take part in the first round only.
    """
    found: dict[str, list[Sequence[float]]] = {name: [] for name in works}
    for number in range(rounds):
        for name in works if number % 2 == 0 else reversed(works):
            if number == 0 or name not in once:
                gc.collect()  # or the last one's tensors are freed in this one's time
                found[name].append(works[name]())
    return found


def check(work: str, results: Sequence[Tensor]) -> None:
    """Raise where results differ by more than the rounding of float32 through a few layers explains.

    Raises:
        RuntimeError: they do.
    """
    for other in results[1:]:
        difference = float((results[0] - other).abs().max() / other.abs().max())
        if not difference <= 1e-3:
            raise RuntimeError(f"{work}: the implementations' results differ by {difference:.3g}")


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """The goals, and what came of them, against sdpa."""
    for title, goal, kind in GOALS:
        found = [row.ratio for row in rows if row.kind == kind and row.attention == "sdpa" and row.ratio]
        if found:
            got = f"{geometric_mean(found):.2f}x, least {min(found):.2f}x"
            yield f"{title:<24} against sdpa: {got}   (goal: at least {goal}x)"
            yield from _ceiling(title, [row for row in rows if row.kind == kind])
    yield from _memory(rows)


def _ceiling(title: str, rows: Sequence[Row]) -> Iterator[str]:
    """How fast steps would be if attention took no time, and which share of that time fastattn saves."""
    seconds = {(row.work, row.attention): row.timing.median for row in rows}
    works = [row.work for row in rows if row.attention == FREE]
    if works:
        theirs, ours, free = ([seconds[work, name] for work in works] for name in ("sdpa", OURS, FREE))
        limits = [a / b for a, b in zip(theirs, free, strict=True)]
        saved = (sum(theirs) - sum(ours)) / (sum(theirs) - sum(free))
        yield (
            f"{title:<24} free attention against sdpa: {geometric_mean(limits):.2f}x, "
            f"least {min(limits):.2f}x; fastattn saves {saved:.0%} of that time"
        )


def _memory(rows: Sequence[Row]) -> Iterator[str]:
    peaks = {(row.work, row.attention): row.megabytes for row in rows if row.megabytes is not None}
    for (work, attention), theirs in peaks.items():
        ours = peaks.get((work, OURS))
        if attention == "sdpa" and ours is not None:
            yield f"{'peak memory':<24} {work}: {ours:.0f} MB, sdpa {theirs:.0f} MB   (goal: less)"


def seeded(config: Any, kind: Any, attention: str) -> Any:
    """A model with the same random weights whatever its attention."""
    config._attn_implementation = attention
    torch.manual_seed(0)
    return kind(config)

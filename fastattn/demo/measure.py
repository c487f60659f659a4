"""Times of training steps with PyTorch's attention, with ours, and with attention that costs nothing."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fastattn.demo.free import free_attention
from fastattn.demo.recipe import Recipe
from fastattn.demo.text import Batch, Text, packed, padded
from fastattn.demo.train import Trainer

SIDES = ("PyTorch", "fastattn", "free")
TOKENS = 1024  # of each language in a step, padding counted
PAIR_LENGTH = 20  # the length of rows that hold one pair; longer ones are packed


@dataclass(frozen=True)
class Case:
    """One row of the table: rows of `seqlen` tokens in both languages, attention weights dropped or not."""

    seqlen: int
    dropout: float

    @property
    def rows(self) -> int:
        return TOKENS // self.seqlen

    @property
    def name(self) -> str:
        return f"L = {self.seqlen}, " + (f"dropout {self.dropout:g}" if self.dropout else "no dropout")

    def batch(self, text: Text) -> Batch:
        """Training pairs of all lengths that fit: one a row, or packed with document masks."""
        pairs = [pair for pair in text.train if max(map(len, pair)) < PAIR_LENGTH]
        random.Random(0).shuffle(pairs)
        if self.seqlen == PAIR_LENGTH:
            return padded(pairs[: self.rows], self.seqlen)
        return packed(pairs, self.rows, self.seqlen)


CASES = tuple(
    Case(seqlen, dropout) for seqlen, dropout in itertools.product((PAIR_LENGTH, 256, 1024), (0.0, 0.1))
)


@dataclass(frozen=True)
class Timing:
    """Seconds of every step by side; step n of one side stands beside step n of the others."""

    times: Mapping[str, list[float]]

    def median(self, side: str) -> float:
        return statistics.median(self.times[side])

    def quartiles(self, side: str) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.times[side], n=4, method="inclusive")
        return low, high

    @property
    def ratio(self) -> float:
        """PyTorch's median over ours: above 1, ours is faster."""
        return self.median("PyTorch") / self.median("fastattn")

    @property
    def ceiling(self) -> float:
        """PyTorch's median over that of free attention: the highest ratio that any kernel could reach."""
        return self.median("PyTorch") / self.median("free")

    @property
    def share(self) -> float | None:
        """(PyTorch - ours) / (PyTorch - free): of the time that attention takes, what ours saves.

        Of medians of differences within a round, since a virtual machine changes speed between rounds. None
        where the quartiles of what is attainable lie further apart than its median: that is noise.
        """
        saved, attainable = (
            [a - b for a, b in zip(self.times["PyTorch"], self.times[side], strict=True)]
            for side in ("fastattn", "free")
        )
        low, middle, high = statistics.quantiles(attainable, n=4, method="inclusive")
        return None if high - low > middle else statistics.median(saved) / middle


def in_turns(
    work: Mapping[str, Callable[[], object]], seconds: float, fewest: int = 5, most: int = 200
) -> Timing:
    """Time every function in turns for about that long in all, after one round unmeasured.

    Each round begins with another one, so that none is always after the same.
    """
    names = list(work)
    times: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for number in range(-1, most):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            before = time.perf_counter()
            work[name]()
            after = time.perf_counter()
            if number >= 0:
                times[name].append(after - before)
        if number + 1 >= fewest and time.perf_counter() - start > seconds:
            break
    return Timing(times)


def step_times(recipe: Recipe, text: Text, case: Case, seconds: float) -> Timing:
    """Whole training steps (forward, backward, clipping, update) on one batch, from the same weights."""
    batch = case.batch(text)

    def steps(side: str) -> Callable[[], object]:
        attention = "torch" if side == "PyTorch" else "fastattn"
        model = recipe.model(len(text.subwords), attention, case.dropout)
        if side == "free":
            free_attention(model)
        trainer = Trainer(model, recipe)
        return lambda: trainer.step(batch)

    with torch.random.fork_rng():
        return in_turns({side: steps(side) for side in SIDES}, seconds)

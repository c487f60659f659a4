"""A finished run: its means by group, the goals, and all of it as plain values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastattn.bench.machine import Ceilings
from fastattn.bench.runner import Result

SCHEMA = 1
QUIET = 0.85  # share of the run's best FMA peak below which a case counts as disturbed


@dataclass(frozen=True)
class Goal:
    """A promise about some groups: the geometric mean of PyTorch's time over ours, for each thread count.

    Args:
        text: what is promised.
        groups: the groups averaged over.
        at_least: the ratio promised.
    """

    text: str
    groups: tuple[str, ...]
    at_least: float


GOALS = (
    Goal("dense float32 forward, L 64-4096, D 32-128", ("forward",), 1.1),
    Goal("causal forward", ("causal",), 1.35),
    Goal("backward", ("backward",), 1.1),
    Goal("bool mask forward", ("bool mask",), 1.3),
    Goal("dropout 0.1 forward", ("dropout 0.1",), 4.0),
    Goal("dropout 0.1 forward+backward", ("dropout 0.1 forward+backward",), 4.0),
    Goal("window 128 at L=4096, forward", ("window 128",), 8.0),
    Goal("bfloat16 decode, 8 heads, 8192 keys", ("decode bfloat16",), 4.0),
    Goal("call on (1, 1, 1, 16): at most 1.5x SDPA's time", ("tiny call",), 1 / 1.5),
)


def geometric_mean(values: Iterable[float]) -> float:
    """exp(mean(log(values))).

    >>> round(geometric_mean([2.0, 8.0]), 6)
    4.0
    """
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


@dataclass(frozen=True)
class Report:
    """A finished run.

    Args:
        machine: facts about the machine, see `fastattn.bench.machine.describe`.
        results: in the order in which they ran.
        ceilings: for each number of threads.
        options: what was asked for, as plain values.
    """

    machine: dict[str, Any]
    results: Sequence[Result]
    ceilings: Sequence[Ceilings]
    options: dict[str, Any]

    def threads(self) -> list[int]:
        return sorted({result.threads for result in self.results})

    def of(self, groups: Iterable[str], threads: int) -> list[Result]:
        """The results of some groups with a number of threads."""
        chosen = set(groups)
        return [r for r in self.results if r.bench.group in chosen and r.threads == threads]

    def groups(self) -> dict[str, dict[int, float]]:
        """Geometric means of the ratios: group -> threads -> mean, groups in the order of the cases."""
        return {
            group: {
                threads: geometric_mean(r.ratio.value for r in self.of([group], threads))
                for threads in self.threads()
            }
            for group in dict.fromkeys(result.bench.group for result in self.results)
        }

    def slower(self) -> list[Result]:
        """Results that are clearly slower than PyTorch."""
        return [result for result in self.results if result.is_slower]

    def disturbed(self) -> list[Result]:
        """Results next to which the machine gave much less than its best: something else was running."""
        best = {each.threads: max(each.flops, default=0.0) for each in self.ceilings}
        return [r for r in self.results if min(r.fma_peaks, default=math.inf) < QUIET * best[r.threads]]

    def goals(self) -> list[dict[str, Any]]:
        """One entry for each goal and number of threads that the run has cases for."""
        entries = []
        for goal in GOALS:
            for threads in self.threads():
                ratios = [r.ratio.value for r in self.of(goal.groups, threads)]
                if ratios:
                    got = geometric_mean(ratios)
                    entries.append(
                        {
                            "goal": goal.text,
                            "threads": threads,
                            "at_least": goal.at_least,
                            "got": got,
                            "lowest": min(ratios),
                            "highest": max(ratios),
                            "cases": len(ratios),
                            "met": got >= goal.at_least,
                        }
                    )
        return entries

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {
            "schema": SCHEMA,
            "machine": self.machine,
            "options": self.options,
            "ceilings": [ceilings.summary() for ceilings in self.ceilings],
            "goals": self.goals(),
            "disturbed": len(self.disturbed()),
            "groups": [
                {"group": group, "threads": threads, "ratio": mean}
                for group, means in self.groups().items()
                for threads, mean in means.items()
            ],
            "rows": [row for result in self.results for row in result.rows()],
        }

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")

"""A finished run: its means by group, the goals, and all of it as plain values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastattn.bench.goals import GOALS
from fastattn.bench.machine import Ceilings
from fastattn.bench.runner import Result

SCHEMA = 2
QUIET = 0.85  # share of the run's best FMA peak below which a case counts as disturbed


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

    def own_groups(self) -> dict[tuple[str, str], dict[int, float]]:
        """Geometric means of our other call's time over ours: (group, label) -> threads -> mean."""
        found: dict[tuple[str, str], dict[int, list[float]]] = {}
        for result in self.results:
            if result.own is not None:
                threads = found.setdefault((result.bench.group, result.own.label), {})
                threads.setdefault(result.threads, []).append(result.own.ratio.value)
        return {
            key: {count: geometric_mean(ratios) for count, ratios in threads.items()}
            for key, threads in found.items()
        }

    def goals(self) -> list[dict[str, Any]]:
        """One entry for each goal and number of threads that the run has cases for."""
        entries = []
        for goal in GOALS:
            if goal.isa not in (None, self.machine.get("isa")):
                continue
            for threads in self.threads():
                chosen = [r for r in self.results if r.threads == threads and goal.covers(r.bench)]
                numbers = [number for r in chosen if (number := goal.number(r)) is not None]
                if numbers:
                    got = geometric_mean(numbers)
                    entries.append(
                        {
                            "goal": goal.text,
                            "measure": goal.measure,
                            "threads": threads,
                            "want": goal.want,
                            "at_most": goal.at_most,
                            "got": got,
                            "lowest": min(numbers),
                            "highest": max(numbers),
                            "cases": len(numbers),
                            "met": goal.is_met(got),
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
            "own_groups": [
                {"group": group, "against": label, "threads": threads, "ratio": mean}
                for (group, label), means in self.own_groups().items()
                for threads, mean in means.items()
            ],
            "rows": [row for result in self.results for row in result.rows()],
        }

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")

"""What the demo found, and how it reads on paper."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fastattn.demo.measure import SIDES, Case, Timing
from fastattn.demo.train import Run

TOLERANCE = 1e-3  # of losses without dropout: the same steps in another order of rounding


@dataclass
class Results:
    """Everything that was measured; `runs` by side, the rest by case."""

    machine: dict[str, Any]
    threads: int
    runs: dict[str, Run] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)
    steps: dict[Case, Timing] = field(default_factory=dict)
    attention: dict[Case, Timing] = field(default_factory=dict)
    memory: dict[Case, dict[str, int]] = field(default_factory=dict)
    sample: str = ""

    def differences(self) -> list[float]:
        """|PyTorch's loss - ours| of each step."""
        pairs = zip(*(self.runs[name].losses for name in SIDES), strict=True)
        return [abs(a - b) for a, b in pairs]

    def agrees(self) -> bool:
        """Whether every loss is finite and within TOLERANCE of the other side's, the held-out one too."""
        differences = [*self.differences(), abs(self.held_out["PyTorch"] - self.held_out["fastattn"])]
        return all(math.isfinite(d) and d <= TOLERANCE for d in differences)

    def machine_line(self) -> str:
        machine = self.machine
        return (
            f"{machine['cpu']}, {machine['isa']}, {self.threads} threads on {machine['cores']} cores; "
            f"torch {machine['torch']}, fastattn {machine['fastattn']}"
        )


def loss_table(results: Results, rows: int = 8) -> Iterator[str]:
    """Losses side by side at some steps, then the largest difference at any step."""
    stock, ours = (results.runs[name].losses for name in SIDES)
    differences = results.differences()
    yield f"{'step':>10}{'PyTorch':>12}{'fastattn':>12}{'difference':>13}"
    last = len(stock) - 1
    for step in sorted({round(last * n / (rows - 1)) for n in range(rows)}):
        yield f"{step + 1:>10}{stock[step]:>12.5f}{ours[step]:>12.5f}{differences[step]:>13.1e}"
    held_out = [results.held_out[name] for name in SIDES]
    yield f"{'held out':>10}{held_out[0]:>12.5f}{held_out[1]:>12.5f}{abs(held_out[0] - held_out[1]):>13.1e}"
    # A difference that is no number is worse than any that is.
    worst = max(range(len(differences)), key=lambda n: (math.isnan(differences[n]), differences[n]))
    verdict = "within" if results.agrees() else "NOT WITHIN"
    yield f"largest difference {differences[worst]:.1e}, at step {worst + 1}: {verdict} {TOLERANCE:g}"


def time_table(timings: dict[Case, Timing]) -> Iterator[str]:
    """Medians with quartiles, in milliseconds."""
    yield f"{'':<22}{'PyTorch':>26}{'fastattn':>26}{'PyTorch / fastattn':>20}"
    for case, timing in timings.items():
        cells = []
        for name in SIDES:
            low, high = timing.quartiles(name)
            cells.append(f"{1e3 * timing.median(name):.2f} ({1e3 * low:.2f}-{1e3 * high:.2f})")
        yield f"{case.name:<22}{cells[0]:>26}{cells[1]:>26}{timing.ratio:>19.2f}x"


def memory_table(memory: dict[Case, dict[str, int]]) -> Iterator[str]:
    """Peaks in MB."""
    yield f"{'':<22}{'PyTorch':>26}{'fastattn':>26}{'PyTorch / fastattn':>20}"
    for case, peaks in memory.items():
        cells = [f"{peaks[name] / 1e6:.0f} MB" for name in SIDES]
        yield f"{case.name:<22}{cells[0]:>26}{cells[1]:>26}{peaks['PyTorch'] / peaks['fastattn']:>19.2f}x"


def indented(text: str) -> str:
    return textwrap.indent(text, "    ")

"""What the demo found, and how it reads on paper."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastattn.data import Pair
from fastattn.demo.judge import Attention
from fastattn.demo.measure import SIDES, Case, Timing

COMPARED = 50  # steps that PyTorch's attention repeats
TOLERANCE = 1e-3  # of their losses: the same steps in another order of rounding


@dataclass
class Results:
    """Everything that was found.

    Attributes:
        machine: of fastattn.bench.machine.describe.
        threads: of torch.
        ours: the loss of every step with fastattn's attention.
        stock: those of the first steps with PyTorch's.
        steps: times by case.
        pairs, translations: what was held out, and what the model makes of it.
        bleu: of those; None where there is none.
        attention: where the model looked, of one of them.
    """

    machine: dict[str, Any]
    threads: int
    ours: list[float] = field(default_factory=list)
    stock: list[float] = field(default_factory=list)
    steps: dict[Case, Timing] = field(default_factory=dict)
    pairs: Sequence[Pair] = ()
    translations: Sequence[str] = ()
    bleu: float | None = None
    attention: Attention | None = None

    def differences(self) -> list[float]:
        """|PyTorch's loss - ours| of each step that both took."""
        return [abs(a - b) for a, b in zip(self.stock, self.ours, strict=False)]

    def agrees(self) -> bool:
        """Whether those losses are finite and within TOLERANCE of one another."""
        return all(math.isfinite(d) and d <= TOLERANCE for d in self.differences())

    def machine_line(self) -> str:
        machine = self.machine
        return (
            f"{machine['cpu']}, {machine['isa']}, {self.threads} threads on {machine['cores']} cores; "
            f"torch {machine['torch']}, fastattn {machine['fastattn']}"
        )


def loss_table(results: Results, rows: int = 6) -> Iterator[str]:
    """Losses side by side at some steps, then the largest difference at any step."""
    differences = results.differences()
    yield f"{'step':>10}{'PyTorch':>12}{'fastattn':>12}{'difference':>13}"
    last = len(differences) - 1
    for step in sorted({round(last * n / (rows - 1)) for n in range(rows)}):
        yield (
            f"{step + 1:>10}{results.stock[step]:>12.5f}{results.ours[step]:>12.5f}{differences[step]:>13.1e}"
        )
    # A difference that is no number is worse than any that is.
    worst = max(range(len(differences)), key=lambda n: (math.isnan(differences[n]), differences[n]))
    verdict = "within" if results.agrees() else "NOT WITHIN"
    yield f"largest difference {differences[worst]:.1e}, at step {worst + 1}: {verdict} {TOLERANCE:g}"


def time_table(timings: dict[Case, Timing]) -> Iterator[str]:
    """Medians with quartiles in milliseconds, ratios, and the share of attention's time that was saved."""
    yield (
        f"{'':<22}{'PyTorch':>21}{'fastattn':>21}{'free attention':>21}"
        f"{'speed-up':>10}{'ceiling':>9}{'share':>7}"
    )
    for case, timing in timings.items():
        cells = []
        for side in SIDES:
            low, high = timing.quartiles(side)
            cells.append(f"{1e3 * timing.median(side):.0f} ({1e3 * low:.0f}-{1e3 * high:.0f})")
        yield (
            f"{case.name:<22}{cells[0]:>21}{cells[1]:>21}{cells[2]:>21}"
            f"{timing.ratio:>9.2f}x{timing.ceiling:>8.2f}x{share_text(timing):>7}"
        )


def share_text(timing: Timing) -> str:
    """The share in percent, or that there is no telling."""
    return "noise" if timing.share is None else f"{timing.share:.0%}"


def translation_lines(pairs: Sequence[Pair], translations: Sequence[str], count: int = 12) -> Iterator[str]:
    """Held-out sentences at even distances: English, the model's Chinese, the reference where it differs."""
    stride = max(1, len(pairs) // count)
    for pair, translation in list(zip(pairs, translations, strict=True))[::stride][:count]:
        same = pair.chinese.replace(" ", "") == translation.replace(" ", "")
        yield f"    {pair.english}\n        {translation}" + ("" if same else f"\n        ({pair.chinese})")

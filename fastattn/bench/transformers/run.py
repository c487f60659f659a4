"""The whole measurement."""

from __future__ import annotations

from collections.abc import Callable

from fastattn.bench.transformers.rows import Row
from fastattn.bench.transformers.training import STEPS, Step, train
from fastattn.bench.transformers.writing import Prompt, write


def run(quick: bool, on_row: Callable[[Row], None]) -> list[Row]:
    """Measure everything, at the number of threads that torch uses: about ten minutes on two cores.

    Args:
        quick: an eighth of the text, fewer steps and fewer rounds.
        on_row: called with each row as soon as it is there.
    Raises:
        RuntimeError: implementations disagree about a result.
    """
    from fastattn.integrations.transformers import register

    register()
    rows: list[Row] = []
    tokens, new = (1024, 32) if quick else (8192, 256)
    steps: tuple[Step, ...] = tuple(step for step in STEPS if not quick or step.seqlen < 1024)
    for padded in (False, True):
        _take(write(Prompt(tokens, padded), new, 3), rows, on_row)
    for step in steps:
        _take(train(step, 3 if quick else 7), rows, on_row)
    return rows


def _take(found: list[Row], rows: list[Row], on_row: Callable[[Row], None]) -> None:
    for row in found:
        rows.append(row)
        on_row(row)

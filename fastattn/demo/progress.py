"""Progress of long loops: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Sequence


def progress(
    steps: Sequence[int], total: int, label: str, losses: list[float] | None = None
) -> Generator[int, None, None]:
    """The steps, with a tqdm bar where a terminal is there, else with a line at every tenth of `total`.

    Args:
        steps: those still to do; the last is total - 1.
        losses: whose last element is shown after each step; None shows nothing.
    """
    done = total - len(steps)
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, initial=done, desc=label, unit="step") as bar:
            for step in steps:
                yield step
                if losses is not None:
                    bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                bar.update()
        return
    start, tenths = time.perf_counter(), done * 10 // total
    for step in steps:
        yield step
        done += 1
        if done * 10 // total > tenths:
            tenths = done * 10 // total
            bar, elapsed = "#" * tenths + "." * (10 - tenths), time.perf_counter() - start
            loss = "" if losses is None else f", loss {losses[-1]:.3f}"
            print(f"{label} [{bar}] step {done}/{total}{loss}, {elapsed:.0f} s", flush=True)

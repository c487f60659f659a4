"""speed.png and loss.png."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastattn.demo.measure import SIDES, Case, Timing
from fastattn.demo.results import TOLERANCE, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From Okabe and Ito's palette: told apart with any colour vision, and in grey.
COLOURS = {"PyTorch": "#E69F00", "fastattn": "#0072B2"}
INK = "#333333"


def new_figure(width: float, height: float, title: str, results: Results) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n{results.machine_line()}", fontsize=11, x=0.01, ha="left", color=INK)
    return figure


def tidy(axes: Axes, grid: str) -> None:
    axes.grid(axis=grid, color="#dddddd", lw=0.6, zorder=0)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)


def draw_speed(results: Results, path: Path) -> None:
    """Bars of step times, times of attention alone, and memory, shorter is better; saved at `path`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    shape = next(iter(results.runs.values())).model.config
    title = (
        f"Training steps of a language model ({shape.num_layers} layers, {shape.num_heads} heads of "
        f"{shape.head_dim}, float32, 2048 tokens a step): PyTorch's attention, fastattn's, and their ratio"
    )
    figure = new_figure(13, 4.4, title, results)
    panels = figure.subplots(1, 3, sharey=True)
    _times(panels[0], results.steps, "whole training step, ms")
    _times(panels[1], results.attention, "attention alone, forward and backward, ms")
    _memory(panels[2], results.memory)
    cases = list(results.steps)
    panels[0].set_yticks(range(len(cases)), [case.name.replace(", ", "\n") for case in cases])
    panels[0].set_ylim(len(cases) - 0.5, -0.5)
    panels[0].legend(*_legend(panels[0]), frameon=False, loc="upper right", fontsize=9)
    figure.savefig(path, dpi=150)


def _legend(axes: Axes) -> tuple[list[object], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    return list(handles), list(labels)


def _times(axes: Axes, timings: dict[Case, Timing], label: str) -> None:
    for number, name in enumerate(SIDES):
        medians = [1e3 * timing.median(name) for timing in timings.values()]
        quartiles = [[1e3 * q for q in timing.quartiles(name)] for timing in timings.values()]
        errors = [
            [middle - low for middle, (low, _) in zip(medians, quartiles, strict=True)],
            [high - middle for middle, (_, high) in zip(medians, quartiles, strict=True)],
        ]
        rows = [row + 0.38 * (number - 0.5) for row in range(len(medians))]
        axes.barh(rows, medians, 0.36, color=COLOURS[name], label=name, zorder=2)
        axes.errorbar(medians, rows, xerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2, zorder=3)
    tops = [1e3 * max(timing.quartiles(name)[1] for name in SIDES) for timing in timings.values()]
    _ratios(axes, tops, [timing.ratio for timing in timings.values()])
    axes.set_xlabel(f"{label}\n(median and quartiles)")


def _memory(axes: Axes, memory: dict[Case, dict[str, int]]) -> None:
    for number, name in enumerate(SIDES):
        rows = [row + 0.38 * (number - 0.5) for row in range(len(memory))]
        axes.barh(rows, [peaks[name] / 1e6 for peaks in memory.values()], 0.36, color=COLOURS[name], zorder=2)
    tops = [max(peaks.values()) / 1e6 for peaks in memory.values()]
    _ratios(axes, tops, [peaks["PyTorch"] / peaks["fastattn"] for peaks in memory.values()])
    axes.set_xlabel("peak resident memory of training steps, MB\n(beyond that before the first)")


def _ratios(axes: Axes, tops: list[float], ratios: list[float]) -> None:
    """PyTorch's bar over ours, right of each pair."""
    tidy(axes, "x")
    if not tops:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=INK)
        return
    axes.set_xlim(0, 1.22 * max(tops))
    for row, (top, ratio) in enumerate(zip(tops, ratios, strict=True)):
        axes.text(top + 0.02 * max(tops), row, f"{ratio:.2f}x", va="center", fontsize=10, color=INK)


def draw_loss(results: Results, path: Path) -> None:
    """Both runs' losses, and below them the difference at each step; saved at `path`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    stock, ours = (results.runs[name].losses for name in SIDES)
    title = (
        f"The same {len(stock)} training steps from the same seed, with PyTorch's attention and fastattn's"
    )
    figure = new_figure(9, 6, title, results)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps = range(1, len(stock) + 1)
    above.plot(steps, stock, color=COLOURS["PyTorch"], lw=3.5, label="PyTorch")
    above.plot(steps, ours, color=COLOURS["fastattn"], lw=1, label="fastattn")
    above.set_ylabel("training loss, nats a character")
    above.legend(frameon=False)
    smallest = 1e-8  # a difference of exactly 0 has no place on a logarithmic axis
    differences = [max(difference, smallest) for difference in results.differences()]
    below.plot(steps, differences, ".", color=INK, ms=3)
    below.axhline(TOLERANCE, color="#D55E00", lw=1.5, ls="--")
    below.text(len(stock), TOLERANCE * 0.8, f"allowed: {TOLERANCE:g}", ha="right", va="top", color="#D55E00")
    below.set_yscale("log")
    below.set_ylim(smallest, 10 * max(TOLERANCE, *differences))
    below.set_ylabel("|difference|")
    below.set_xlabel("step")
    below.xaxis.get_major_locator().set_params(integer=True)
    for axes in (above, below):
        tidy(axes, "both")
        axes.set_xlim(0, len(stock) + 1)
    figure.savefig(path, dpi=150)

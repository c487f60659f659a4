"""loss.png, speed.png and attention.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastattn.demo.judge import Attention
from fastattn.demo.measure import SIDES, TOKENS
from fastattn.demo.results import TOLERANCE, Results
from fastattn.inspect.plots import heatmap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From Okabe and Ito's palette: told apart with any colour vision, and in grey.
COLOURS = {"PyTorch": "#E69F00", "fastattn": "#0072B2", "free": "#BBBBBB"}
LABELS = {"PyTorch": "PyTorch", "fastattn": "fastattn", "free": "attention that costs nothing"}
INK, RED = "#333333", "#D55E00"


def _new_figure(width: float, height: float, title: str, results: Results) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n{results.machine_line()}", fontsize=10, x=0.01, ha="left", color=INK)
    return figure


def _tidy(axes: Axes) -> None:
    axes.grid(color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)


def draw_loss(results: Results, path: Path) -> None:
    """The whole run, and the steps that PyTorch's attention repeated with their differences; saved at `path`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    ours, stock, compared = results.ours, results.stock, len(results.stock)
    title = f"Training with fastattn, and its first {compared} steps again with PyTorch's attention"
    figure = _new_figure(11, 4.8, title, results)
    parts = figure.subfigures(1, 2, squeeze=False, width_ratios=(3, 2))[0]
    axes = parts[0].subplots()
    axes.plot(range(1, len(ours) + 1), ours, color=COLOURS["fastattn"], lw=0.8, alpha=0.35)
    smooth = _running_mean(ours, max(1, len(ours) // 50))
    axes.plot(
        range(1, len(ours) + 1), smooth, color=COLOURS["fastattn"], lw=1.8, label="fastattn, running mean"
    )
    axes.plot(range(1, compared + 1), stock, color=COLOURS["PyTorch"], lw=2.5, label="PyTorch")
    axes.set_xlabel("step")
    axes.set_ylabel("loss with smoothed labels, nats a token")
    axes.legend(frameon=False)
    above, below = parts[1].subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = range(1, compared + 1)
    above.plot(steps, stock, color=COLOURS["PyTorch"], lw=4, label="PyTorch")
    above.plot(steps, ours[:compared], color=COLOURS["fastattn"], lw=1.2, label="fastattn")
    above.set_ylabel("loss, nats a token")
    above.legend(frameon=False)
    smallest = 1e-8  # a difference of exactly 0 has no place on a logarithmic axis
    differences = [max(difference, smallest) for difference in results.differences()]
    below.plot(steps, differences, ".", color=INK, ms=4)
    below.axhline(TOLERANCE, color=RED, lw=1.5, ls="--")
    below.text(compared, TOLERANCE * 1.3, f"allowed: {TOLERANCE:g}", ha="right", va="bottom", color=RED)
    below.set_yscale("log")
    below.set_ylim(smallest, 30 * max(TOLERANCE, *differences))
    below.set_ylabel("|difference|, nats")
    below.set_xlabel("step")
    below.xaxis.get_major_locator().set_params(integer=True)
    for each in (axes, above, below):
        _tidy(each)
    figure.savefig(path, dpi=150)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and those up to `width` before it."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[n + 1] - sums[max(0, n - width)]) / (n + 1 - max(0, n - width)) for n in range(len(values))]


def draw_speed(results: Results, path: Path) -> None:
    """Bars of step times, shorter is better, with the share of the attainable saved; saved at `path`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    title = f"A training step on {TOKENS} tokens of each language, by the attention it runs on"
    figure = _new_figure(11, 5, title, results)
    axes = figure.subplots()
    cases = list(results.steps.items())
    longest = max(1e3 * timing.quartiles(side)[1] for _, timing in cases for side in SIDES)
    for number, side in enumerate(SIDES):
        rows = [row + 0.26 * (number - 1) for row in range(len(cases))]
        medians = [1e3 * timing.median(side) for _, timing in cases]
        quartiles = [[1e3 * q for q in timing.quartiles(side)] for _, timing in cases]
        errors = [
            [middle - low for middle, (low, _) in zip(medians, quartiles, strict=True)],
            [high - middle for middle, (_, high) in zip(medians, quartiles, strict=True)],
        ]
        axes.barh(rows, medians, 0.24, color=COLOURS[side], label=LABELS[side])
        axes.errorbar(medians, rows, xerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    for row, (_, timing) in enumerate(cases):
        end = 1e3 * max(timing.quartiles(side)[1] for side in SIDES) + 0.015 * longest
        share = "too noisy for a share" if timing.share is None else f"{timing.share:.0%} of the attainable"
        text = f"{timing.ratio:.2f}x of at most {timing.ceiling:.2f}x; {share}"
        axes.text(end, row, text, va="center", fontsize=9, color=INK)
    axes.set_xlim(0, 1.5 * longest)
    axes.set_yticks(range(len(cases)), [case.name.replace(", ", "\n") for case, _ in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlabel("milliseconds (median and quartiles)")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    _tidy(axes)
    axes.grid(visible=False, axis="y")
    figure.savefig(path, dpi=150)


def draw_attention(results: Results, attention: Attention, path: Path) -> None:
    """A heat map of every layer's cross-attention, the mean over its heads; saved at `path`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    layers = len(attention.weights)
    width = 1.2 + layers * (0.8 + 0.36 * len(attention.source))
    title = "Where the decoder looks in the English sentence while it writes each Chinese character"
    figure = _new_figure(max(9.0, width), 2.4 + 0.34 * len(attention.target), title, results)
    grid = figure.subplots(1, layers, squeeze=False)[0]
    for number, (axes, weights) in enumerate(zip(grid, attention.weights, strict=True), 1):
        heatmap(
            weights,
            attention.target,
            attention.source,
            axes,
            title=f"layer {number}, mean over heads",
            cmap="Blues",
        )
        axes.set_xlabel("English, read")
    grid[0].set_ylabel("Chinese, written")
    figure.colorbar(grid[-1].images[0], ax=list(grid), label="attention weight", shrink=0.8)
    figure.savefig(path, dpi=150)

"""The picture of a run: one pair of bars a group, PyTorch's time over ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart with any colour vision and in grey.
COLOURS = ("#56B4E9", "#0072B2", "#009E73", "#D55E00")
GOAL_COLOUR = "#D55E00"
INK = "#333333"
TICKS = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw horizontal bars of the groups' geometric means, with a dot for each case, and save them.

    Args:
        report: `Report.to_dict()`, or what was read back from its JSON.
        path: of the picture; its suffix chooses the format.
    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(entry["group"] for entry in report["groups"]))
    threads = sorted({entry["threads"] for entry in report["groups"]})
    figure = Figure(figsize=(9.5, 1.7 + 0.15 * len(groups) * (len(threads) + 0.5)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    height = 0.8 / len(threads)
    for number, count in enumerate(threads):
        shift = (number - (len(threads) - 1) / 2) * height
        _bars(axes, report, groups, count, shift, height, COLOURS[number % len(COLOURS)])
    _goals(axes, groups)
    _decorate(axes, report, groups)
    figure.savefig(path, dpi=150)


def _bars(
    axes: Axes,
    report: dict[str, Any],
    groups: list[str],
    threads: int,
    shift: float,
    height: float,
    colour: str,
) -> None:
    """One number of threads: a bar from 1 to each group's mean, and each case as a dot with its interval."""
    label = "1 thread" if threads == 1 else f"{threads} threads"
    means = {e["group"]: e["ratio"] for e in report["groups"] if e["threads"] == threads}
    at = [groups.index(group) + shift for group in means]
    axes.barh(
        at, [mean - 1 for mean in means.values()], height * 0.9, left=1, color=colour, label=label, zorder=2
    )
    for mean, y in zip(means.values(), at, strict=True):
        # The numbers stand in a column of their own, where no bar can cross them.
        axes.text(
            1.01,
            y,
            f"{mean:.2f}x",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=7.5,
            color=INK,
        )
    for row in report["rows"]:
        if row["ratio"] is not None and row["threads"] == threads:
            y = groups.index(row["group"]) + shift
            axes.plot(row["ratio_interval"], [y, y], color=INK, lw=0.7, zorder=3)
            axes.plot(row["ratio"], y, "o", ms=3, mfc="white", mec=INK, mew=0.7, zorder=4)


def _goals(axes: Axes, groups: list[str]) -> None:
    """A tick where a group has a goal."""
    from fastattn.bench.goals import AGAINST_TORCH

    goals = [
        (goal.least_ratio, groups.index(name))
        for goal in AGAINST_TORCH
        for name in goal.groups
        if name in groups
    ]
    if goals:
        at, rows = zip(*goals, strict=True)
        axes.vlines(
            at, [row - 0.44 for row in rows], [row + 0.44 for row in rows],
            color=GOAL_COLOUR, lw=2, label="goal", zorder=5,
        )  # fmt: skip


def _decorate(axes: Axes, report: dict[str, Any], groups: list[str]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ratios = [row["ratio"] for row in report["rows"] if row["ratio"] is not None]
    low, high = min([0.8, *ratios]) / 1.1, max([2.0, *ratios]) * 1.1
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.axvline(1.0, color=INK, lw=1.2, zorder=3)
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.grid(axis="x", color="#dddddd", lw=0.6, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(
        "time of PyTorch's fastest path / time of fastattn (right of the line: fastattn is faster)"
    )
    axes.set_title(_title(report), loc="left", fontsize=10)
    axes.legend(frameon=False, loc="lower right", fontsize=9)


def _title(report: dict[str, Any]) -> str:
    machine = report["machine"]
    versions = f"fastattn {machine['fastattn']} against torch {machine['torch']}"
    peaks = {
        facts["threads"]: facts["fma_gflops"]["median"]
        for facts in report["ceilings"]
        if facts["fma_gflops"] is not None
    }
    peak = ""
    if peaks:
        rates, counts = " and ".join(f"{rate:.0f}" for rate in peaks.values()), " and ".join(map(str, peaks))
        peak = f", FMA peak {rates} GFLOP/s with {counts} thread{'' if list(peaks) == [1] else 's'}"
    disturbed = report["disturbed"]
    warning = f"\n{disturbed} measurements were disturbed by other work on the machine" if disturbed else ""
    return (
        f"{versions}:\ngeometric means (bars), cases with 95% intervals (dots)\n"
        f"{machine['cpu']}, {machine['isa']}{peak}{warning}"
    )

"""The picture of a GPU run: rates by length for each head dim and pass, and ratios for everything else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattn.bench.contenders import OURS
from fastattn.bench.plot import INK, TICKS
from fastattn.testing.gpu_bench_cases import CAUSAL, DENSE, HOST, PASSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GRID = tuple(f"{mask} {timed}" for timed in PASSES for mask in (DENSE, CAUSAL))
# Okabe and Ito's palette, told apart with any colour vision; each path also has a marker of its own.
STYLES = {
    OURS: ("#D55E00", "o"),
    "sdpa-cudnn": ("#0072B2", "s"),
    "sdpa-flash": ("#56B4E9", "^"),
    "sdpa-efficient": ("#999999", "v"),
    "flex": ("#009E73", "D"),
}
OTHER = ("#CC79A7", "x")


def draw(report: dict[str, Any], path: Path) -> bool:
    """Draw a run and save it.

    Args:
        report: `Report.to_dict()`, or what was read back from its JSON.
        path: of the picture; its suffix chooses the format.
    Returns:
        Whether there was anything to draw.
    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if row["group"] != HOST]
    if not rows:
        return False
    lines = [row for row in rows if row["group"] in GRID]
    bars = [row for row in rows if row["group"] not in GRID]
    dims = sorted({row["head_dim"] for row in lines})
    names = list(dict.fromkeys(row["case"] for row in bars))
    heights = [2.4 * len(dims)] * bool(dims) + [0.8 + 0.34 * len(names)] * bool(names)
    figure = Figure(figsize=(12.5, 0.6 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if dims:
        part = parts.pop(0)
        grid = part.subplots(len(dims), len(GRID), sharex=True, sharey=True, squeeze=False)
        lengths = sorted({row["seqlen"] for row in lines})
        for at, dim in enumerate(dims):
            for column, group in enumerate(GRID):
                chosen = [row for row in lines if row["group"] == group and row["head_dim"] == dim]
                _rates(grid[at][column], chosen, lengths)
                grid[0][column].set_title(group, fontsize=9)
            grid[at][0].set_ylabel(f"D={dim}, TFLOP/s", fontsize=8)
        grid[0][0].set_ylim(0, 1.06 * max(row["tflops"] for row in lines))
        part.legend(*_legend(grid), frameon=False, fontsize=8, loc="outside upper right", ncols=6)
    if names:
        _ratios(parts.pop(0).subplots(), bars, names)
    figure.suptitle(_title(report), fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    return True


def _rates(axes: Axes, rows: list[dict[str, Any]], lengths: list[int]) -> None:
    """TFLOP/s over the length, a line for each path."""
    for name in dict.fromkeys(row["path"] for row in rows):
        points = sorted((row["seqlen"], row["tflops"]) for row in rows if row["path"] == name)
        colour, marker = STYLES.get(name, OTHER)
        width = 1.8 if name == OURS else 1.0
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=3.5, lw=width, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
    axes.minorticks_off()
    axes.tick_params(labelsize=7, labelbottom=True)
    axes.grid(color="#dddddd", lw=0.6)


def _legend(grid: Any) -> tuple[list[Any], list[str]]:
    """Each path once, over all panels."""
    found: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    return list(found.values()), list(found)


def _ratios(axes: Axes, rows: list[dict[str, Any]], names: list[str]) -> None:
    """Each path's time over ours, a dot with its interval; right of the line we are faster."""
    axes.axvline(1.0, color=INK, lw=1.2)
    for row in rows:
        if row["ratio"] is None:
            continue
        colour, marker = STYLES.get(row["path"].replace("padded", "sdpa"), OTHER)
        y = names.index(row["case"])
        axes.plot(row["ratio_interval"], [y, y], color=colour, lw=1)
        axes.plot(row["ratio"], y, marker, color=colour, ms=5)
        axes.annotate(
            row["path"],
            (row["ratio"], y),
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=5.5,
            color=INK,
            ha="center",
        )
    ratios = [1.0, *(row["ratio"] for row in rows if row["ratio"] is not None)]
    low, high = min(ratios) / 1.1, max(ratios) * 1.1
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.7)
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    axes.set_xlabel("time of PyTorch's path / ours (right of the line: fastattn is faster)", fontsize=8)


def _title(report: dict[str, Any]) -> str:
    machine, ceilings = report["machine"], report["ceilings"]
    product = f", bfloat16 product {ceilings['product_tflops']:.0f} TFLOP/s" if ceilings else ""
    return (
        f"{machine['gpu']}: fastattn {machine['fastattn']} (triton {machine['triton']}) against torch "
        f"{machine['torch']}{product}"
    )

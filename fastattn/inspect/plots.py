"""Heat maps of attention weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastattn.inspect.fonts import families_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def show_heatmaps(
    matrices: Any,
    xlabel: str,
    ylabel: str,
    titles: Sequence[str] | None = None,
    figsize: tuple[float, float] = (2.5, 2.5),
    cmap: str = "Reds",
) -> Figure:
    """A grid of heat maps with one colour scale; arguments as of `d2l.show_heatmaps`.

    Args:
        matrices: [rows, columns, queries, keys], a tensor (any device, with or without gradient) or an array.
        xlabel: what keys are, below the lowest row.
        ylabel: what queries are, left of the first column.
        titles: one for each column, above every row of it.
        figsize: width and height of the whole in inches.
        cmap: name of a matplotlib colour map.

    Returns:
        The figure, made by pyplot: it is shown where pyplot shows figures, and has `savefig`.

    Raises:
        ValueError: matrices of another shape; not one title for each column.
        ModuleNotFoundError: matplotlib is not installed.
    """
    values = _as_float_tensor(matrices)
    if values.ndim != 4 or values.numel() == 0:
        raise ValueError(
            f"matrices must be [rows, columns, queries, keys], none of them 0, got {list(values.shape)}"
        )
    rows, columns = values.shape[:2]
    if titles is not None and len(titles) != columns:
        raise ValueError(f"titles must be one for each of {columns} columns, got {len(titles)}")

    from matplotlib import pyplot

    fonts = families_for([xlabel, ylabel, *(titles or ())])
    figure, grid = pyplot.subplots(
        rows, columns, figsize=figsize, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    low, high = values.min().item(), values.max().item()
    for row, column in ((row, column) for row in range(rows) for column in range(columns)):
        axes = grid[row, column]
        image = axes.imshow(values[row, column].numpy(), cmap=cmap, vmin=low, vmax=high)
        if row == rows - 1:
            axes.set_xlabel(xlabel, fontfamily=fonts)
        if column == 0:
            axes.set_ylabel(ylabel, fontfamily=fonts)
        if titles:
            axes.set_title(titles[column], fontfamily=fonts)
    figure.colorbar(image, ax=grid, shrink=0.6)
    return figure


def heatmap(
    weights: Any,
    queries: Sequence[str],
    keys: Sequence[str],
    ax: Axes | None = None,
    *,
    title: str | None = None,
    cmap: str = "Reds",
) -> Axes:
    """One heat map with a label for every query and key, in any script.

    Args:
        weights: [queries, keys], a tensor or an array; the colours go from 0 to the greatest weight or 1,
            whichever is more.
        queries: a label for each row, from the top.
        keys: a label for each column.
        ax: where to draw; a new figure of pyplot's, of a size that fits the labels, where None.
        title: what to write above.
        cmap: name of a matplotlib colour map.

    Returns:
        The axes; `axes.figure` is the figure, `axes.images[0]` what a colour bar needs.

    Raises:
        ValueError: not one label for each query and each key.
        ModuleNotFoundError: matplotlib is not installed.
    """
    values = _as_float_tensor(weights)
    if list(values.shape) != [len(queries), len(keys)] or values.numel() == 0:
        raise ValueError(
            f"weights must be [queries, keys], here [{len(queries)}, {len(keys)}] by the labels and neither "
            f"of them 0, got {list(values.shape)}"
        )
    fonts = families_for([*queries, *keys, title or ""])
    if ax is None:
        from matplotlib import pyplot

        size = (1.5 + 0.35 * len(keys), 1.5 + 0.35 * len(queries))
        _, ax = pyplot.subplots(figsize=size, layout="constrained")
    ax.imshow(values.numpy(), cmap=cmap, vmin=0, vmax=max(1.0, values.max().item()), aspect="auto")
    upright = max(map(len, keys)) > 2
    ax.set_xticks(range(len(keys)), keys, rotation=90 if upright else 0, fontfamily=fonts)
    ax.set_yticks(range(len(queries)), queries, fontfamily=fonts)
    ax.tick_params(length=0)
    # Thin white lines between the cells, so that a label can be followed to its row.
    ax.set_xticks([n - 0.5 for n in range(1, len(keys))], minor=True)
    ax.set_yticks([n - 0.5 for n in range(1, len(queries))], minor=True)
    ax.grid(which="minor", color="white", linewidth=1)
    ax.tick_params(which="minor", length=0)
    if title:
        ax.set_title(title, fontfamily=fonts)
    return ax


def _as_float_tensor(values: Any) -> torch.Tensor:
    return torch.as_tensor(values).detach().to("cpu", torch.float32)

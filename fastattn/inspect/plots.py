"""Heat maps of attention weights."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from fastattn.inspect.fonts import families_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MOST_LABELS = 60  # on a side with a label for each
MOST_INCHES = 12.0
_HIDDEN = ("Cc", "Zl", "Zp", "Cs")  # Unicode categories: control, line and paragraph ends, half a pair


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
    values = as_floats(matrices)
    if values.ndim != 4 or values.numel() == 0:
        raise ValueError(
            f"matrices must be [rows, columns, queries, keys], none of them 0, got {list(values.shape)}"
        )
    rows, columns = values.shape[:2]
    if titles is not None and len(titles) != columns:
        raise ValueError(f"titles must be one for each of {columns} columns, got {len(titles)}")

    pyplot = need_pyplot()
    fonts = families_for(plain(text) for text in (xlabel, ylabel, *(titles or ())))
    figure, grid = pyplot.subplots(
        rows, columns, figsize=figsize, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    low, high = values.min().item(), values.max().item()
    for row, column in ((row, column) for row in range(rows) for column in range(columns)):
        axes = grid[row, column]
        image = axes.imshow(values[row, column].numpy(), cmap=cmap, vmin=low, vmax=high)
        if row == rows - 1:
            axes.set_xlabel(plain(xlabel), fontfamily=fonts, parse_math=False)
        if column == 0:
            axes.set_ylabel(plain(ylabel), fontfamily=fonts, parse_math=False)
        if titles:
            axes.set_title(plain(titles[column]), fontfamily=fonts, parse_math=False)
    figure.colorbar(image, ax=grid, shrink=0.6)
    return figure


def heatmap(
    weights: Any,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    ax: Axes | None = None,
    *,
    title: str | None = None,
    cmap: str = "Reds",
    vmax: float | None = None,
) -> Axes:
    """One heat map with labels for queries and keys, in any script.

    Up to 60 on a side have a label each; of more, as many as there is room for. Longer sides are drawn
    pixel by pixel, up to some 1000; above that pool the weights first, as `attention_map` does.

    Args:
        weights: [queries, keys], a tensor or an array.
        queries: a label for each row, from the top; None for their numbers.
        keys: a label for each column, likewise.
        ax: where to draw; a new figure of pyplot's, of a size that fits the labels, where None.
        title: what to write above.
        cmap: name of a matplotlib colour map.
        vmax: the weight of the strongest colour; where None the greatest weight or 1, whichever is more.

    Returns:
        The axes; `axes.figure` is the figure, `axes.images[0]` what a colour bar needs.

    Raises:
        ValueError: not one label for each query and each key.
        ModuleNotFoundError: matplotlib is not installed.
    """
    values = as_floats(weights)
    shape = list(values.shape)
    rows, columns = (
        (shape[axis] if len(shape) == 2 else 0) if labels is None else len(labels)
        for axis, labels in enumerate((queries, keys))
    )
    if shape != [rows, columns] or values.numel() == 0:
        raise ValueError(
            f"weights must be [queries, keys], here [{rows}, {columns}] by the labels and neither of them 0, "
            f"got {shape}"
        )
    ax = new_axes(ax, (1.5 + min(0.35 * columns, MOST_INCHES), 1.5 + min(0.35 * rows, MOST_INCHES)))
    top = max(1.0, values.nan_to_num(0).max().item()) if vmax is None else vmax
    ax.imshow(values.numpy(), cmap=cmap, vmin=0, vmax=top, aspect="auto")
    label_axis(ax, "y", queries, rows)
    label_axis(ax, "x", keys, columns)
    if max(rows, columns) <= MOST_LABELS:
        # Thin white lines between the cells, so that a label can be followed to its row.
        ax.set_xticks([n - 0.5 for n in range(1, columns)], minor=True)
        ax.set_yticks([n - 0.5 for n in range(1, rows)], minor=True)
        ax.grid(which="minor", color="white", linewidth=1)
        ax.tick_params(which="minor", length=0)
    if title:
        write_title(ax, title)
    return ax


def plain(text: str) -> str:
    """A label that is drawn as it reads: control characters and line ends as their escapes, such as \\n."""
    return "".join(repr(char)[1:-1] if unicodedata.category(char) in _HIDDEN else char for char in text)


def write_title(ax: Axes, title: str, loc: Literal["left", "center"] = "center") -> None:
    """A title in any script, in which $ is a dollar; a long one is smaller, to stay in the picture."""
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties

    lines = [plain(line) for line in title.split("\n")]
    figure: Any = ax.get_figure(root=True)
    is_alone = len(figure.axes) == 1
    points = 72 * (float(figure.get_size_inches()[0]) if is_alone else inches_of(ax)[0])
    usual = FontProperties(size=rcParams["axes.titlesize"]).get_size_in_points()
    fitting = points / (0.62 * max(map(text_width, lines)))  # a letter is about 0.6 of its size wide
    ax.set_title(
        "\n".join(lines),
        fontfamily=families_for(lines),
        fontsize=min(usual, max(6.0, fitting)),
        loc=loc,
        parse_math=False,
    )


def text_width(text: str) -> int:
    """Columns that a text takes: two for each ideograph, none for what joins the character before it."""
    wide = sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
    return max(1, wide - sum(unicodedata.combining(char) > 0 for char in text))


def label_axis(ax: Axes, side: Literal["x", "y"], labels: Sequence[str] | None, count: int) -> None:
    """Texts at the positions 0 to count - 1 of an axis, as many of them as can be read.

    Args:
        side: "x" or "y".
        labels: a text for each position; None leaves it to matplotlib to number some of them.
    """
    axis = ax.xaxis if side == "x" else ax.yaxis
    if labels is None:
        from matplotlib.ticker import MaxNLocator

        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return
    room = count if count <= MOST_LABELS else max(1, int(inches_of(ax)[side == "y"] / 0.13))
    step = max(1, -(-count // room))
    places = range(0, count, step)
    labels = [plain(label) for label in labels]
    fonts = families_for(labels)
    upright = side == "x" and max(map(len, labels)) > 2
    size = None if step == 1 and count <= MOST_LABELS else 7
    axis.set_ticks(
        places,
        [labels[n] for n in places],
        rotation=90 if upright else 0,
        fontfamily=fonts,
        fontsize=size,
        parse_math=False,
    )
    ax.tick_params(axis=side, length=0 if step == 1 else 2)


def inches_of(ax: Axes) -> tuple[float, float]:
    """Width and height of axes, as far as they are known before they are drawn."""
    figure: Any = ax.get_figure(root=True)
    width, height = figure.get_size_inches() * ax.get_position().size
    return float(width), float(height)


def as_floats(values: Any) -> torch.Tensor:
    """A tensor or an array as a plain float32 tensor in memory."""
    return torch.as_tensor(values).detach().to("cpu", torch.float32)


def new_axes(ax: Axes | None, figsize: tuple[float, float]) -> Axes:
    """The axes given, or those of a new figure of pyplot's."""
    return need_pyplot().subplots(figsize=figsize, layout="constrained")[1] if ax is None else ax


def need_pyplot() -> Any:
    """matplotlib.pyplot.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message says how.
    """
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        message = "pictures need matplotlib: pip install 'fastattn[viz]'"
        raise ModuleNotFoundError(message, name="matplotlib") from None
    return pyplot


def top_of(values: torch.Tensor) -> float:
    """The greatest value, for a scale from 0."""
    return max(values.nan_to_num(0).max().item(), 1e-9)

"""The picture of where attention goes: a text whose tokens are shaded, or a curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.inspect.fonts import families_for
from fastattn.inspect.plots import as_floats, inches_of, new_axes, plain, text_width, top_of, write_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STRENGTH = "Oranges"  # colour map
LONGEST_TEXT = 1000  # tokens that are written out
INK = "#333333"


def received_map(
    received: Any, tokens: Sequence[str] | None = None, ax: Axes | None = None, *, title: str | None = None
) -> Axes:
    """How much attention each token gets: the text with a shade behind each token, or a curve.

    The strongest shade is the greatest value. Without tokens, or with more than 1000, the values are drawn as
    a curve over positions, in which each bin of a long text shows its greatest.

    Args:
        received: [keys], one number for each token: of `Record.received` a head, or the mean over heads.
        tokens: their texts.
        ax, title: as for `attention_map`.
    Returns:
        The axes.
    Raises:
        ValueError: not one token for each value.
        ModuleNotFoundError: matplotlib is not installed.
    """
    values = as_floats(received)
    if values.ndim != 1 or values.numel() == 0 or (tokens is not None and len(tokens) != len(values)):
        want = "[keys]" if tokens is None else f"[{len(tokens)}], one for each token,"
        raise ValueError(f"received must be {want} and not empty, got shape {list(values.shape)}")
    is_written = tokens is not None and len(tokens) <= LONGEST_TEXT
    texts = [plain(token) for token in tokens] if tokens is not None and is_written else []
    width = _line_width(ax)
    lines = _lines(texts, width)
    if ax is None:
        ax = new_axes(None, (9, 0.5 + 0.24 * len(lines)) if is_written else (9, 3))
    if is_written:
        _write_text(ax, values, texts, lines, width)
    else:
        _draw_curve(ax, values)
    if title:
        write_title(ax, title, loc="left" if is_written else "center")
    return ax


def _line_width(ax: Axes | None) -> int:
    """Columns of text that fit across the axes, at a size that can be read."""
    inches = 9.0 if ax is None else inches_of(ax)[0]
    return max(20, int(inches * 11))


def _lines(tokens: Sequence[str], width: int) -> list[list[int]]:
    """The numbers of the tokens on each line."""
    lines: list[list[int]] = [[]]
    used = 0
    for n, token in enumerate(tokens):
        need = text_width(token) + 1
        if used + need > width and lines[-1]:
            lines.append([])
            used = 0
        lines[-1].append(n)
        used += need
    return lines


def _write_text(ax: Axes, values: Tensor, tokens: Sequence[str], lines: list[list[int]], width: int) -> None:
    import matplotlib
    from matplotlib.patches import Rectangle

    colors = matplotlib.colormaps[STRENGTH]
    top = top_of(values)
    fonts = families_for(tokens)
    for row, line in enumerate(lines):
        left = 0.0
        for n in line:
            size, share = text_width(tokens[n]) + 0.7, max(0.0, values[n].nan_to_num(0).item()) / top
            ax.add_patch(Rectangle((left, row + 0.08), size, 0.84, facecolor=colors(share), linewidth=0))
            ax.text(
                left + size / 2,
                row + 0.5,
                tokens[n],
                ha="center",
                va="center",
                fontsize=8,
                fontfamily=fonts,
                parse_math=False,
                color="white" if share > 0.7 else INK,
            )
            left += size + 0.3
    ax.set_xlim(0, max(width, *(sum(text_width(tokens[n]) + 1 for n in line) for line in lines)))
    ax.set_ylim(len(lines), 0)
    ax.set_axis_off()


def _draw_curve(ax: Axes, values: Tensor) -> None:
    bins = min(len(values), 1024)
    heights = torch.nn.functional.adaptive_max_pool1d(values.nan_to_num(0)[None], bins)[0]
    places = (torch.arange(bins) * len(values) / bins).tolist()
    ax.fill_between(places, heights.tolist(), step="post", color="#D55E00", linewidth=0)
    ax.set_xlim(0, len(values))
    ax.set_ylim(0, None)
    ax.set_xlabel("position of the key")
    ax.set_ylabel("weight received")
    for edge in ("top", "right"):
        ax.spines[edge].set_visible(False)

"""Pictures of a Record: what attends to what, and which heads there are.

Each takes an `ax` to draw on, or makes a figure of pyplot's, and returns the axes. Colours get steadily
darker or lighter, so that they are told apart with any colour vision and in grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.inspect.plots import MOST_LABELS, as_floats, heatmap, new_axes, plain, top_of, write_title
from fastattn.inspect.recorded import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WEIGHTS, ENTROPY = "Blues", "cividis"  # colour maps


def attention_map(
    record: Record,
    path: str,
    head: int | None = None,
    ax: Axes | None = None,
    *,
    run: int = 0,
    batch: int = 0,
    title: str | None = None,
) -> Axes:
    """The weights of one module as a heat map: token by token, or pooled where the record has no weights.

    Args:
        record: what `inspect.record` gave.
        path: of the module.
        head: which head; None for the mean over all.
        ax: where to draw; a new figure where None.
        run, batch: which run and batch entry, as in `Record.weights`; a pooled map is of a run's one call.
        title: what to write above; the module and head where None.
    Returns:
        The axes. Long maps have colours by the square root, so that single links show; in a pooled one
        ticks are token positions.
    Raises:
        ValueError: nothing to draw: summaries without a pooled map, or a long run of many steps.
        KeyError, IndexError: no such path, head, run or entry.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if title is None:
        title = f"{path or 'model'}, {'mean over heads' if head is None else f'head {head}'}"
    calls, is_new = record.calls_of(path, run, batch), ax is None
    if all(call.weights is not None for call in calls):
        values = _of_head(record.weights(path, run=run, batch=batch), head)
        queries, keys = record.texts(path, run=run, batch=batch)
        is_labelled = record.labels.names(path)
        ax = heatmap(
            values,
            queries if is_labelled else None,
            keys if is_labelled else None,
            ax,
            title=title,
            cmap=WEIGHTS,
            vmax=top_of(values),
        )
        if max(values.shape) > MOST_LABELS:
            ax.images[-1].set_norm(_square_roots(values))
        label = "weight"
    else:
        pooled = _of_head(_pooled(record, path, run, batch), head)
        _, _, seqlen_q, seqlen_k = calls[0].shape
        ax = new_axes(ax, (6.5, 6))
        first = calls[0].first_query
        _image(ax, pooled, (0, seqlen_k, first + seqlen_q, first))
        write_title(ax, title)
        label = f"{calls[0].summary.pool_mode} weight in a cell"
    if is_new:
        ax.figure.colorbar(ax.images[-1], ax=ax, label=label)
    ax.set_xlabel("key: what is looked at")
    ax.set_ylabel("query: what looks")
    return ax


def head_grid(
    record: Record,
    ax: Axes | None = None,
    *,
    layers: Sequence[str] | None = None,
    run: int = 0,
    batch: int = 0,
    title: str | None = None,
) -> Axes:
    """Every head of every module side by side, small: a row for each module, a column for each head.

    Each map has its own scale, from white at 0 to its greatest weight: square roots, so that faint links
    show. Of a long call a dot is the greatest weight around it.

    Args:
        record: what `inspect.record` gave.
        layers: paths, from the top; None for all.
        ax, run, batch, title: as for `attention_map`.
    Returns:
        The axes.
    Raises:
        ValueError, KeyError, IndexError, ModuleNotFoundError: as `attention_map`.
    """
    paths = record.paths if layers is None else list(layers)
    if not paths:
        raise ValueError("record must hold calls, got none")
    maps = [_map(record, path, run, batch) for path in paths]
    columns = max(len(heads) for heads in maps)
    if ax is None:
        names = 0.6 + 0.095 * max(map(len, paths))
        ax = new_axes(None, (min(names + 1.1 * columns, 16), min(0.8 + 1.1 * len(maps), 16)))
    gap = 0.06
    for row, heads in enumerate(maps):
        for column, values in enumerate(heads):
            extent = (column + gap, column + 1 - gap, row + 1 - gap, row + gap)
            _image(ax, _thinned(values), extent)
            ax.add_patch(_frame((extent[0], extent[3]), 1 - 2 * gap))
    ax.set_xlim(0, columns)
    ax.set_ylim(len(maps), 0)
    ax.set_aspect("equal")
    ax.set_xticks([n + 0.5 for n in range(columns)], [str(n) for n in range(columns)])
    ax.set_yticks(
        [n + 0.5 for n in range(len(maps))], [plain(path or "model") for path in paths], parse_math=False
    )
    ax.tick_params(length=0)
    ax.set_xlabel("head")
    for spine in ax.spines.values():
        spine.set_visible(False)
    if title:
        write_title(ax, title)
    return ax


def entropy_map(record: Record, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """The mean entropy of every head in nats: a row for each module, a column for each head.

    Dark heads look at one key, bright ones at many. Up to 16 heads have their number written.

    Args:
        record: what `inspect.record` gave.
        ax, title: as for `attention_map`.
    Returns:
        The axes.
    Raises:
        ValueError: an empty record.
        ModuleNotFoundError: matplotlib is not installed.
    """
    entropies = [record.entropy(path).detach().float() for path in record.paths]
    if not entropies:
        raise ValueError("record must hold calls, got none")
    columns = max(map(len, entropies))
    padded = [torch.nn.functional.pad(row, (0, columns - len(row)), value=torch.nan) for row in entropies]
    values = torch.stack(padded)
    is_new = ax is None
    if ax is None:
        ax = new_axes(None, (min(3.2 + 0.55 * columns, 16), min(1.2 + 0.36 * len(values), 16)))
    image = ax.imshow(values.numpy(), cmap=ENTROPY, vmin=0, aspect="auto")
    if columns <= 16:
        top = top_of(values)
        for row, column in values.isfinite().nonzero().tolist():
            value = values[row, column].item()
            color = "black" if value > 0.55 * top else "white"
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    ax.set_xticks(range(columns))
    ax.set_yticks(range(len(values)), [plain(path or "model") for path in record.paths], parse_math=False)
    ax.tick_params(length=0)
    ax.set_xlabel("head")
    if title:
        write_title(ax, title)
    if is_new:
        ax.figure.colorbar(image, ax=ax, label="entropy, nats")
    return ax


def alignment_map(
    weights: Any,
    target: Sequence[str],
    source: Sequence[str],
    ax: Axes | None = None,
    *,
    title: str | None = None,
) -> Axes:
    """Which source tokens a translation looked at while it wrote each target token; a dot marks the most.

    Args:
        weights: [target, source], of a head of cross-attention or the mean over several.
        target, source: their tokens.
        ax, title: as for `attention_map`.
    Returns:
        The axes.
    Raises:
        ValueError: not one token for each row and column.
        ModuleNotFoundError: matplotlib is not installed.
    """
    values, is_new = as_floats(weights), ax is None
    ax = heatmap(values, target, source, ax, title=title, cmap=WEIGHTS, vmax=top_of(values))
    if max(values.shape) > MOST_LABELS:
        ax.images[-1].set_norm(_square_roots(values))
    if is_new:
        ax.figure.colorbar(ax.images[-1], ax=ax, label="weight")
    best = values.nan_to_num(0).argmax(1).tolist()
    ax.scatter(
        best,
        range(len(best)),
        s=12 if max(values.shape) <= MOST_LABELS else 5,
        color="#D55E00",
        zorder=3,
        linewidths=0,
    )
    ax.set_xlabel("source, read")
    ax.set_ylabel("target, written")
    return ax


def _map(record: Record, path: str, run: int, batch: int) -> Tensor:
    """[heads, rows, columns]: the weights, or the pooled map."""
    if all(call.weights is not None for call in record.calls_of(path, run, batch)):
        return record.weights(path, run=run, batch=batch).detach()
    return _pooled(record, path, run, batch)


def _pooled(record: Record, path: str, run: int, batch: int) -> Tensor:
    calls = record.calls_of(path, run, batch)
    pooled = calls[0].summary.pooled
    if len(calls) > 1 or pooled is None:
        have = "no pooled map" if pooled is None else f"{len(calls)} steps"
        raise ValueError(
            f"a run of {path!r} without recorded weights must be one call with a pooled map, got {have}"
        )
    return pooled[batch].detach()


def _of_head(values: Tensor, head: int | None) -> Tensor:
    values = values.detach().float().cpu()
    if head is None:
        return values.mean(0)
    if not -len(values) <= head < len(values):
        raise IndexError(f"head must be from 0 to {len(values) - 1}, got {head}")
    return values[head]


def _image(ax: Axes, values: Tensor, extent: tuple[float, float, float, float]) -> Any:
    """A map on its own scale of square roots; extent: left, right, bottom, top."""
    values = values.float().cpu()
    norm = _square_roots(values)
    return ax.imshow(values.numpy(), cmap=WEIGHTS, norm=norm, extent=extent, aspect="auto")


def _square_roots(values: Tensor) -> Any:
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, 0, top_of(values))


def _thinned(values: Tensor) -> Tensor:
    """A map of at most so many dots a side that each can be seen."""
    sides = [min(side, MOST_LABELS) for side in values.shape]
    return torch.nn.functional.adaptive_max_pool2d(values[None].float(), sides)[0]


def _frame(corner: tuple[float, float], side: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, side, side, fill=False, edgecolor="#bbbbbb", linewidth=0.6)

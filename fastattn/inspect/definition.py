"""The statistics of attention weights, written plainly: what the fused kernels must equal.

Every step is an ordinary operation on the whole matrix, in its dtype: float64 weights give the exact answer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

POOL_MODES = ("mean", "sum", "max")


class Wanted(NamedTuple):
    """Which statistics are asked for beside those that are always there.

    top_k: links per query, 0 for none. pool: rows and columns of the grid, None for none; pool_mode: one of
    POOL_MODES.
    """

    top_k: int = 0
    pool: tuple[int, int] | None = None
    pool_mode: str = "mean"


class Statistics(NamedTuple):
    """The tensors of an AttentionSummary, which documents them, in its order."""

    entropy: Tensor
    max_weight: Tensor
    max_index: Tensor
    received: Tensor
    distance: Tensor
    lse: Tensor
    topk_weights: Tensor | None
    topk_indices: Tensor | None
    pooled: Tensor | None


def statistics(weights: Tensor, lse: Tensor, visible: Tensor, wanted: Wanted) -> Statistics:
    """The statistics of dense weights.

    Args:
        weights: [B, Hq, Lq, Lk], 0 where not visible; rows may add up to less than 1.
        lse: [B, Hq, Lq], handed on.
        visible: bool of weights' shape.
        wanted: what is asked for.
    Returns:
        Entropy, received, distance and pooled (but for its maximum) differentiable in the weights.
    """
    is_nan = weights.isnan().any(-1, keepdim=True)
    # A hidden key ranks behind every visible one; in a row of NaN no key is the largest.
    ranks = torch.where(visible & ~is_nan, weights.detach(), -1.0)
    ordered, order = ranks.sort(dim=-1, descending=True, stable=True)
    order = torch.where(ordered < 0, -1, order)
    ordered = ordered.clamp(min=0).masked_fill(is_nan, torch.nan)
    if order.shape[-1] < max(1, wanted.top_k):  # fewer keys than links
        missing = max(1, wanted.top_k) - order.shape[-1]
        order = torch.nn.functional.pad(order, (0, missing), value=-1)
        padding = torch.where(is_nan, torch.nan, 0.0).to(ordered.dtype)
        ordered = torch.cat([ordered, padding.expand(*ordered.shape[:-1], missing)], -1)
    return Statistics(
        entropy=_entropy(weights),
        max_weight=ordered[..., 0],
        max_index=order[..., 0],
        received=weights.sum(2),
        distance=(weights * _distances(weights.shape[2], weights.shape[3], weights.device)).sum(-1),
        lse=lse,
        topk_weights=ordered[..., : wanted.top_k] if wanted.top_k else None,
        topk_indices=order[..., : wanted.top_k] if wanted.top_k else None,
        pooled=None if wanted.pool is None else _pooled(weights, wanted.pool, wanted.pool_mode),
    )


def _entropy(weights: Tensor) -> Tensor:
    is_zero = weights == 0  # log 0 must reach neither the sum nor its gradient
    return torch.where(is_zero, 0.0, -weights * torch.where(is_zero, 1.0, weights).log()).sum(-1)


def _distances(seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
    """|i + offset - j| with the last query at the last key."""
    i = torch.arange(seqlen_q, device=device)[:, None] + (seqlen_k - seqlen_q)
    return (i - torch.arange(seqlen_k, device=device)).abs()


def cells(length: int, count: int, device: torch.device | None = None) -> Tensor:
    """The cell of each of `length` positions, floor(i * count / length): int64 [length].

    >>> cells(5, 2)
    tensor([0, 0, 0, 1, 1])
    """
    return torch.arange(length, device=device) * count // max(length, 1)


def _pooled(weights: Tensor, pool: tuple[int, int], mode: str) -> Tensor:
    rows = cells(weights.shape[2], pool[0], weights.device)
    cols = cells(weights.shape[3], pool[1], weights.device)
    shape = list(weights.shape[:2])
    if mode == "max":
        grid = weights.new_zeros(*shape, weights.shape[2], pool[1])
        grid = grid.index_reduce(3, cols, weights.detach(), "amax")
        return weights.new_zeros(*shape, *pool).index_reduce(2, rows, grid, "amax")
    grid = weights.new_zeros(*shape, weights.shape[2], pool[1]).index_add(3, cols, weights)
    grid = weights.new_zeros(*shape, *pool).index_add(2, rows, grid)
    if mode == "sum":
        return grid
    return grid / (rows.bincount(minlength=pool[0])[:, None] * cols.bincount(minlength=pool[1]))

"""The statistics of attention weights, written plainly: what the fused kernels must equal.

Every step is an ordinary operation on the whole matrix, in its dtype: float64 weights give the exact answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.weight_statistics import Results, Wanted, cells, pairs_per_cell


def statistics(weights: Tensor, scores: Tensor, lse: Tensor, wanted: Wanted) -> Results:
    """The statistics of dense weights.

    Args:
        weights: [B, Hq, Lq, Lk], 0 where not visible; rows may add up to less than 1.
        scores: [B, Hq, Lq, Lk], of which they are the exponentials, by which the largest are ranked.
        lse: [B, Hq, Lq], handed on.
        wanted: what is asked for.
    """
    largest, order = _ranked(weights.detach(), scores.detach(), max(1, wanted.top_k))
    return Results(
        entropy=_entropy(weights),
        received=weights.sum(2),
        distance=(weights * _distances(weights.shape[2], weights.shape[3], weights.device)).sum(-1),
        lse=lse,
        pooled=_pooled(weights, wanted.pool, wanted.pool_mode),
        max_weight=largest[..., 0],
        max_index=order[..., 0],
        topk_weights=largest[..., : wanted.top_k],
        topk_indices=order[..., : wanted.top_k],
    )


def _ranked(weights: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest weights of each row, descending, and their keys; 0 and -1 where there are none.

    Where weights round to the same number the greater score is first, of equal scores the lower key.
    """
    is_nan = weights.isnan().any(-1, keepdim=True)  # of such a row no key is the largest
    by_score = scores.masked_fill(is_nan, 0.0).sort(dim=-1, descending=True, stable=True).indices
    weights = weights.masked_fill(is_nan, 0.0).gather(-1, by_score)
    largest, order = weights.sort(dim=-1, descending=True, stable=True)
    order = torch.where(largest > 0, by_score.gather(-1, order), -1)
    missing = max(0, count - weights.shape[-1])
    largest, order = (
        torch.nn.functional.pad(found[..., :count], (0, missing), value=nothing)
        for found, nothing in ((largest, 0), (order, -1))
    )
    return largest.masked_fill(is_nan, torch.nan), order


def _entropy(weights: Tensor) -> Tensor:
    is_zero = weights == 0  # log 0 must reach neither the sum nor its gradient
    return torch.where(is_zero, 0.0, -weights * torch.where(is_zero, 1.0, weights).log()).sum(-1)


def _distances(seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
    """|i + offset - j| with the last query at the last key."""
    i = torch.arange(seqlen_q, device=device)[:, None] + (seqlen_k - seqlen_q)
    return (i - torch.arange(seqlen_k, device=device)).abs()


def _pooled(weights: Tensor, pool: tuple[int, int], mode: str) -> Tensor:
    grid = weights.new_zeros(*weights.shape[:2], *pool)
    if 0 in pool:
        return grid
    rows = cells(weights.shape[2], pool[0], weights.device)
    cols = cells(weights.shape[3], pool[1], weights.device)
    strip = weights.new_zeros(*weights.shape[:3], pool[1])
    if mode == "max":
        strip = strip.scatter_reduce(3, cols.expand_as(weights), weights.detach(), "amax")
        return grid.scatter_reduce(2, rows[:, None].expand_as(strip), strip, "amax")
    grid = grid.index_add(2, rows, strip.index_add(3, cols, weights))
    return grid if mode == "sum" else grid / pairs_per_cell(weights.shape[2], weights.shape[3], grid)

"""What a summary of attention weights asks for and gets: what its definition and its kernels share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

POOL_MODES = ("mean", "sum", "max")  # at fastattn._C's numbers


class Wanted(NamedTuple):
    """top_k: largest weights of each query. pool: rows and columns of the grid; (0, 0) for none."""

    top_k: int = 0
    pool: tuple[int, int] = (0, 0)
    pool_mode: str = "mean"


class Results(NamedTuple):
    """The statistics, as fastattn.inspect.AttentionSummary documents them; absent ones have no elements."""

    entropy: Tensor  # [B, Hq, Lq]
    received: Tensor  # [B, Hq, Lk]
    distance: Tensor  # [B, Hq, Lq]
    lse: Tensor  # [B, Hq, Lq]
    pooled: Tensor  # [B, Hq, rows, cols]
    max_weight: Tensor  # [B, Hq, Lq]
    max_index: Tensor  # int64 [B, Hq, Lq]
    topk_weights: Tensor  # [B, Hq, Lq, top_k]
    topk_indices: Tensor  # int64 [B, Hq, Lq, top_k]

    def constant(self, pool_mode: str) -> tuple[Tensor, ...]:
        """Those that no gradient reaches."""
        return self[LOSSES - 1 :] if pool_mode == "max" else self[LOSSES:]


LOSSES = 5  # leading fields of Results that gradients reach


def cells(length: int, count: int, device: torch.device | None = None) -> Tensor:
    """The cell of each of `length` positions, floor(i * count / length): int64 [length].

    >>> cells(5, 2)
    tensor([0, 0, 0, 1, 1])
    """
    return torch.arange(length, device=device) * count // max(length, 1)


def pairs_per_cell(seqlen_q: int, seqlen_k: int, pooled: Tensor) -> Tensor:
    """How many pairs each cell of `pooled` [..., rows, cols] holds: [rows, cols], in its dtype.

    >>> pairs_per_cell(5, 3, torch.zeros(2, 3))
    tensor([[3., 3., 3.],
            [2., 2., 2.]])
    """

    def sizes(length: int, count: int) -> Tensor:
        # Cell n starts at ceil(n * length / count).
        starts = -(-torch.arange(count + 1, device=pooled.device) * length // count)
        return starts.diff().to(pooled.dtype)

    return sizes(seqlen_q, pooled.shape[-2])[:, None] * sizes(seqlen_k, pooled.shape[-1])

"""A mask whose queries stand in another order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.masks.base import Mask, register
from fastattn.masks.space import MaskShape, Pairs, lookup


@register
@dataclass(frozen=True, eq=False, repr=False)
class Reordered(Mask):
    """Row i of batch entry b is row order[b, i] of `mask`.

    It becomes block lists, so it serves neither `torch.compile` nor maps over `order`.

    Args:
        mask: whose rows these are.
        order: int64 [B, Lq].
    """

    mask: Mask
    order: Tensor

    def _visible(self, at: Pairs) -> Tensor:
        rows = lookup(self.order, at.b, at.i)
        return self.mask._visible(Pairs(at.shape, at.b, at.h, rows, at.j))

    def _check(self, shape: MaskShape, device: torch.device) -> None:
        self.mask._check(shape, device)

    def _varies(self, shape: MaskShape, device: torch.device) -> tuple[bool, bool]:
        return self.order.shape[0] > 1, self.mask._varies(shape, device)[1]

    def __repr__(self) -> str:
        return f"reordered({self.mask!r})"

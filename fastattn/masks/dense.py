"""A mask given as a bool tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.checks import not_a_mask
from fastattn.masks.base import LoweredMask, Mask, register
from fastattn.masks.space import MaskShape, Pairs, check_device, describe, lookup
from fastattn.spec import dtype_name


def dense(mask: Tensor) -> Mask:
    """Pairs where the tensor is True; kernels read it in place by its strides.

    Args:
        mask: bool, broadcastable to [B, Hq, Lq, Lk].

    Raises:
        TypeError: not a bool tensor.
        ValueError: more than 4 dimensions, or, when used, sizes that do not broadcast.
        NotImplementedError: used in a packed (varlen) call, whose sequences each have their own indices.

    Example: `dense(scores > 0) & causal()`.
    """
    if not isinstance(mask, Tensor):
        raise not_a_mask("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor (True = attend), got {dtype_name(mask.dtype)}")
    if mask.dim() > 4:
        raise ValueError(f"mask must have at most 4 dimensions, got shape {list(mask.shape)}")
    return Dense(mask)


@register
@dataclass(frozen=True, eq=False, repr=False)
class Dense(Mask):
    """A bool tensor."""

    tensor: Tensor

    def _tensor(self, shape: MaskShape, device: torch.device) -> Tensor:
        """The tensor with four dimensions, not expanded."""
        if shape.seqlens_q is not None:
            raise NotImplementedError(
                "dense masks have no meaning in a packed (varlen) call: use another mask"
            )
        tensor = check_device("mask", self.tensor, device)
        tensor = tensor[(None,) * (4 - tensor.dim())]
        want = (shape.batch, shape.heads, shape.seqlen_q, shape.seqlen_k)
        if any(size not in (1, full) for size, full in zip(tensor.shape, want, strict=True)):
            raise ValueError(f"mask must broadcast to {list(want)}, got {list(self.tensor.shape)}")
        return tensor

    def _visible(self, at: Pairs) -> Tensor:
        tensor = self._tensor(at.shape, at.j.device)
        return tensor if at.complete else lookup(tensor, at.b, at.h, at.i, at.j)

    @property
    def needs_blocks(self) -> bool:
        return False

    @property
    def is_dense(self) -> bool:
        return True

    def _direct(self, shape: MaskShape, device: torch.device) -> LoweredMask:
        return LoweredMask(dense=self._tensor(shape, device))

    def _check(self, shape: MaskShape, device: torch.device) -> None:
        self._tensor(shape, device)

    def _varies(self, shape: MaskShape, device: torch.device) -> tuple[bool, bool]:
        tensor = self._tensor(shape, device)
        return tensor.shape[0] > 1, tensor.shape[1] > 1

    def __repr__(self) -> str:
        return f"dense({describe(self.tensor)})"

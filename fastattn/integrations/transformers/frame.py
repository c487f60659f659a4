"""The index space of one mask function, and the masks that its simplest statements make."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.masks import Mask, dense, padding
from fastattn.masks.band import Band
from fastattn.masks.space import MaskShape

Offset = int | Tensor

EVERYTHING: Mask = Band(None, None, "bottom_right")
NOTHING = ~EVERYTHING


@dataclass(frozen=True, eq=False)
class Frame:
    """Query i stands at position i + q_offset, key j at j + kv_offset.

    Args:
        q_offset: a tensor where the cache's length is one, as compiled code wants it.
    """

    shape: MaskShape
    q_offset: Offset
    kv_offset: int
    device: torch.device

    def band(self, lo: Offset | None, hi: Offset | None) -> Mask:
        """Keys i + lo <= j <= i + hi."""
        if isinstance(lo, Tensor) or isinstance(hi, Tensor):
            return self._ranges(lo, hi)
        seqlen_q, seqlen_k = self.shape.seqlen_q, self.shape.seqlen_k
        if (lo is None or seqlen_q - 1 + lo <= 0) and (hi is None or hi >= seqlen_k - 1):
            return EVERYTHING
        offset = seqlen_k - seqlen_q
        # About the bottom-right diagonal where it goes through the mask, so that it reads as it is meant, and
        # is the same for every length.
        if (lo is None or lo <= offset) and (hi is None or hi >= offset):
            lo, hi = (None if bound is None else bound - offset for bound in (lo, hi))
            return Band(lo, hi, "bottom_right")
        return Band(lo, hi, "top_left")

    def _ranges(self, lo: Offset | None, hi: Offset | None) -> Mask:
        """The same as one range of keys for each query: bounds that are tensors stay tensors."""
        rows = torch.arange(self.shape.seqlen_q, device=self.device)
        ends = torch.full_like(rows, self.shape.seqlen_k) if hi is None else (rows + hi + 1).clamp(min=0)
        starts = None if lo is None else (rows + lo).clamp(min=0)[None]
        return padding(ends[None], starts)

    def keys(self, visible: Tensor) -> Mask:
        """The keys where visible [B|1, 1|Lk] is True: a range where they are one, as padding leaves them."""
        if self._may_look(visible):
            if visible.all():
                return EVERYTHING
            # For one query a row of bools is read as fast as a range, and needs no search.
            found = None if self.shape.seqlen_q == 1 else _key_range(visible.expand(-1, self.shape.seqlen_k))
            if found is not None:
                return found
        return dense(visible[:, None, None])

    def _may_look(self, values: Tensor) -> bool:
        if torch.compiler.is_compiling() or values.is_meta:
            return False
        # With an offset in a tensor nothing was read back from the device so far, and nothing shall be.
        return values.is_cpu or not isinstance(self.q_offset, Tensor)

    def queries(self, visible: Tensor) -> Mask:
        """The queries where visible [B|1, 1|Lq] is True."""
        if self._may_look(visible) and visible.all():
            return EVERYTHING
        return dense(visible[:, None, :, None])


def _key_range(visible: Tensor) -> Mask | None:
    """The `padding` that is visible [B, Lk], or None where a row's keys are no range."""
    if visible.shape[1] == 0:
        return None
    starts = visible.to(torch.uint8).argmax(1)  # the first True; 0 where there is none
    ends = starts + visible.sum(1)
    at = torch.arange(visible.shape[1], device=visible.device)
    if not torch.equal((at >= starts[:, None]) & (at < ends[:, None]), visible):
        return None
    return padding(ends, starts if bool(starts.any()) else None)

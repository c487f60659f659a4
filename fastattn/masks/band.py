"""Bands along the diagonal: causal masks and sliding windows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastattn.checks import check_int
from fastattn.masks.base import LoweredMask, Mask, register
from fastattn.masks.space import Align, MaskShape, Pairs, check_align
from fastattn.masks.tiles import Tiler, TileRows, Tiles, low_words

FARTHEST = 2**31


def causal(*, align: Align = "bottom_right") -> Mask:
    """Keys j <= i + offset: each query sees keys up to its own position.

    Args:
        align: "bottom_right" (offset = seqlen_k - seqlen_q: the last query sees the last key) or "top_left"
            (offset 0).

    Raises:
        ValueError: unknown align.

    Example: with 2 queries and 3 keys `causal()` is [[1, 1, 0], [1, 1, 1]].
    """
    check_align(align)
    return Band(None, 0, align)


def window(left: int | None, right: int | None, *, align: Align = "bottom_right") -> Mask:
    """Keys i + offset - left <= j <= i + offset + right.

    Args:
        left, right: number of keys seen on each side of the query's own position, >= 0; None for no bound.
        align: as for `causal`.

    Raises:
        TypeError: a side is neither int nor None.
        ValueError: a side is negative, or unknown align.

    Example: `window(1, 0)` on 3x3 is [[1, 0, 0], [1, 1, 0], [0, 1, 1]].
    """
    check_align(align)
    # Beyond every length one bound is as good as another, and kernels add positions to it in 64 bits.
    left = None if left is None else min(check_int("window left", left, 0, or_none=True), FARTHEST)
    right = None if right is None else min(check_int("window right", right, 0, or_none=True), FARTHEST)
    return Band(None if left is None else -left, right, align)


@register
@dataclass(frozen=True, eq=False, repr=False)
class Band(Mask):
    """i + offset + lo <= j <= i + offset + hi."""

    lo: int | None
    hi: int | None
    align: Align

    def _visible(self, at: Pairs) -> Tensor:
        position = at.position(self.align)
        result = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=at.j.device)
        if self.lo is not None:
            result = result & (at.j >= position + self.lo)
        if self.hi is not None:
            result = result & (at.j <= position + self.hi)
        return result

    @property
    def needs_blocks(self) -> bool:
        return False

    def _direct(self, shape: MaskShape, device: torch.device) -> LoweredMask:
        if self.align == "top_left":
            return LoweredMask(lo_top=self.lo, hi_top=self.hi)
        return LoweredMask(lo_bottom=self.lo, hi_bottom=self.hi)

    def _tiler(self, shape: MaskShape, device: torch.device) -> Tiler:
        return _BandTiler(self)

    def __invert__(self) -> Mask:
        if self.lo is None and self.hi is not None:
            return replace(self, lo=self.hi + 1, hi=None)
        if self.hi is None and self.lo is not None:
            return replace(self, lo=None, hi=self.lo - 1)
        return super().__invert__()

    def __repr__(self) -> str:
        align = "" if self.align == "bottom_right" else f"align={self.align!r}"
        if self.lo is None and self.hi == 0:
            return f"causal({align})"
        left = None if self.lo is None else -self.lo
        if (left is not None and left < 0) or (self.hi is not None and self.hi < 0):
            # One side of a window, complemented.
            return f"~{~self!r}"
        return f"window({left}, {self.hi}{', ' if align else ''}{align})"


class _BandTiler(Tiler):
    def __init__(self, band: Band) -> None:
        self.band = band

    def classify(self, rows: TileRows) -> tuple[Tensor, Tensor]:
        first, last = rows.position(self.band.align)
        some = torch.ones(1, 1, dtype=torch.bool, device=first.device)
        every = some
        if self.band.lo is not None:
            some = some & (rows.j_last >= first + self.band.lo)
            every = every & (rows.j_first >= last + self.band.lo)
        if self.band.hi is not None:
            some = some & (rows.j_first <= last + self.band.hi)
            every = every & (rows.j_last <= first + self.band.hi)
        return some, every

    def words(self, tiles: Tiles) -> Tensor:
        position = tiles.position(self.band.align) - tiles.col * 64
        result = torch.full((1, 1), -1, dtype=torch.int64, device=position.device)
        if self.band.hi is not None:
            result = low_words(position + (self.band.hi + 1))
        if self.band.lo is not None:
            result = result & ~low_words(position + self.band.lo)
        return result

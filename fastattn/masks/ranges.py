"""Contiguous ranges of keys: padding and prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.masks.base import LoweredMask, Mask, register
from fastattn.masks.space import Ints, MaskShape, Pairs, as_ints, check_batch, ints_on, lookup, show
from fastattn.masks.tiles import TILE, Tiler, TileRows, Tiles, range_words, tile_bounds

INT32_MAX = 2**31 - 1


def padding(
    key_lengths: Tensor | int | Sequence[int], key_starts: Tensor | int | Sequence[int] | None = None
) -> Mask:
    """Keys start <= j < length.

    Args:
        key_lengths: int [B], or [B, Lq] per query (B or Lq may be 1): where the visible keys end.
        key_starts: the same for where they start (left padding); None for 0.

    Raises:
        TypeError: not integers.
        ValueError: other dimensions, or, when used, sizes that do not fit the call.

    Example: `padding([2, 3])` with 3 keys lets batch entry 0 see keys 0 and 1, entry 1 see all.
    """
    starts = None if key_starts is None else as_ints("padding key_starts", key_starts, (1, 2))
    return KeyRange("padding", as_ints("padding key_lengths", key_lengths, (1, 2)), starts)


def prefix(lengths: Tensor | int | Sequence[int]) -> Mask:
    """Keys j < length, visible to every query; `causal() | prefix(n)` is a prefix language model.

    Args:
        lengths: int [B] (B may be 1).

    Raises:
        TypeError: not integers.
        ValueError: other dimensions, or, when used, a batch size that does not fit the call.

    Example: `causal() | prefix(2)` on 3x3 is [[1, 1, 0], [1, 1, 0], [1, 1, 1]].
    """
    return KeyRange("prefix", as_ints("prefix lengths", lengths, (1,)), None)


@register
@dataclass(frozen=True, eq=False, repr=False)
class KeyRange(Mask):
    """starts <= j < ends; `name` is the constructor's, for messages."""

    name: str
    ends: Ints
    starts: Ints | None

    def _bounds(self, which: str, value: Ints, shape: MaskShape, device: torch.device) -> Tensor:
        """The bound as an integer tensor [B|1, Lq|1]."""
        name = f"{self.name} {which}"
        bounds = ints_on(name, value, device)
        if bounds.dim() == 1:
            bounds = bounds[:, None]
        check_batch(name, bounds.shape[0], shape.batch)
        if bounds.shape[1] not in (1, shape.seqlen_q):
            raise ValueError(
                f"{name} must have one entry per query in dimension 1, {shape.seqlen_q} (or 1), "
                f"got {bounds.shape[1]}"
            )
        return bounds

    def _ends(self, shape: MaskShape, device: torch.device) -> Tensor:
        return self._bounds("lengths" if self.name == "prefix" else "key_lengths", self.ends, shape, device)

    def _starts(self, shape: MaskShape, device: torch.device) -> Tensor | None:
        return None if self.starts is None else self._bounds("key_starts", self.starts, shape, device)

    def _visible(self, at: Pairs) -> Tensor:
        ends, starts = self._ends(at.shape, at.j.device), self._starts(at.shape, at.j.device)
        result = at.j < _at_rows(ends, at)
        return result if starts is None else result & (at.j >= _at_rows(starts, at))

    @property
    def needs_blocks(self) -> bool:
        return False

    def _direct(self, shape: MaskShape, device: torch.device) -> LoweredMask:
        ends, starts = self._ends(shape, device), self._starts(shape, device)
        return LoweredMask(key_ends=_as_int32(ends), key_starts=None if starts is None else _as_int32(starts))

    def _tiler(self, shape: MaskShape, device: torch.device) -> Tiler:
        return _RangeTiler(self._ends(shape, device).long(), self._starts(shape, device))

    def _check(self, shape: MaskShape, device: torch.device) -> None:
        self._ends(shape, device)
        self._starts(shape, device)

    def _varies(self, shape: MaskShape, device: torch.device) -> tuple[bool, bool]:
        starts = self._starts(shape, device)
        return self._ends(shape, device).shape[0] > 1 or (starts is not None and starts.shape[0] > 1), False

    def __repr__(self) -> str:
        starts = "" if self.starts is None else f", key_starts={show(self.starts)}"
        return f"{self.name}({show(self.ends)}{starts})"


class _RangeTiler(Tiler):
    def __init__(self, ends: Tensor, starts: Tensor | None) -> None:
        self.ends = ends
        self.starts = torch.zeros_like(ends[:1, :1]) if starts is None else starts.long()
        self.end_bounds = tile_bounds(self.ends)
        self.start_bounds = tile_bounds(self.starts)

    def classify(self, rows: TileRows) -> tuple[Tensor, Tensor]:
        start_min, start_max = (lookup(bound, rows.b, rows.row) for bound in self.start_bounds)
        end_min, end_max = (lookup(bound, rows.b, rows.row) for bound in self.end_bounds)
        some = (rows.j_first < end_max) & (rows.j_last >= start_min)
        every = (rows.j_last < end_min) & (rows.j_first >= start_max)
        return some, every

    def words(self, tiles: Tiles) -> Tensor:
        first, stop = (lookup(values, tiles.b, tiles.i) for values in (self.starts, self.ends))
        return range_words(first - tiles.col * TILE, stop - tiles.col * TILE)


def _at_rows(values: Tensor, at: Pairs) -> Tensor:
    return lookup(values.long(), at.b, at.i)


def _as_int32(values: Tensor) -> Tensor:
    # A bound beyond any key is a bound at the last key, so clamping keeps the meaning of larger integers.
    if values.dtype != torch.int32:
        values = values.clamp(0, INT32_MAX).to(torch.int32)
    return values.contiguous()

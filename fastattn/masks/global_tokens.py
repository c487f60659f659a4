"""Global tokens: positions that see everything and that everything sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.block_mask import pack
from fastattn.masks.base import Mask, register
from fastattn.masks.space import (
    Align,
    Ints,
    MaskShape,
    Pairs,
    as_ints,
    check_align,
    check_batch,
    check_device,
    ints_on,
    lookup,
    show,
)
from fastattn.masks.tiles import TILE, Tiler, TileRows, Tiles


def global_tokens(index_or_bool: Tensor | int | Sequence[int], *, align: Align = "bottom_right") -> Mask:
    """Pairs whose key j, or whose query's position i + offset, is a global position.

    Args:
        index_or_bool: global key positions: int [G] (or Python ints), or bool [Lk] or [B, Lk] (B may be 1),
            True = global. Positions that a call does not have are ignored.
        align: which position a row stands at, as for `causal`.

    Raises:
        TypeError: neither integers nor bool.
        ValueError: other dimensions, a negative index, unknown align, or, when used, sizes that do not fit.

    Example: `global_tokens([0])` on 3x3 is [[1, 1, 1], [1, 0, 0], [1, 0, 0]].
    """
    check_align(align)
    name = "global_tokens index_or_bool"
    if isinstance(index_or_bool, Tensor) and index_or_bool.dtype == torch.bool:
        if index_or_bool.dim() not in (1, 2):
            raise ValueError(f"{name} must have 1 or 2 dimensions, got shape {list(index_or_bool.shape)}")
        return GlobalTokens(index_or_bool, align)
    index = as_ints(name, index_or_bool, (1,))
    return GlobalTokens(index, align)


@register
@dataclass(frozen=True, eq=False, repr=False)
class GlobalTokens(Mask):
    """Global positions see and are seen by all."""

    positions: Ints
    align: Align

    def _flags(self, shape: MaskShape, device: torch.device) -> Tensor:
        """Whether each position at which a row or key can stand is global: bool [B|1, P]."""
        name = "global_tokens index_or_bool"
        # Rows aligned at the top left can stand beyond the last key.
        count = max(shape.seqlen_q, shape.seqlen_k) if self.align == "top_left" else shape.seqlen_k
        if isinstance(self.positions, Tensor) and self.positions.dtype == torch.bool:
            flags = check_device(name, self.positions, device)
            flags = flags[None] if flags.dim() == 1 else flags
            check_batch(name, flags.shape[0], shape.batch)
            if flags.shape[1] not in (shape.seqlen_k, count):
                raise ValueError(f"{name} must have length {shape.seqlen_k}, got {flags.shape[1]}")
            return torch.nn.functional.pad(flags, (0, count - flags.shape[1]))
        index = ints_on(name, self.positions, device).long()
        # One more entry takes the positions that do not exist.
        flags = torch.zeros(1, count + 1, dtype=torch.bool, device=device)
        index = torch.where((index >= 0) & (index < count), index, count)
        return flags.index_fill(1, index, 1)[:, :count]  # torch.jit.trace cannot write True down here

    def _visible(self, at: Pairs) -> Tensor:
        flags = self._flags(at.shape, at.j.device)
        return _at(flags, at.b, at.position(self.align)) | _at(flags, at.b, at.j)

    def _tiler(self, shape: MaskShape, device: torch.device) -> Tiler:
        return _GlobalTiler(self._flags(shape, device), self.align)

    def _check(self, shape: MaskShape, device: torch.device) -> None:
        flags, positions = self._flags(shape, device), self.positions
        # Elsewhere than on the CPU the check would wait for the device; negative positions are then ignored.
        if isinstance(positions, Tensor) and positions.dtype != torch.bool and flags.device.type == "cpu":
            least = int(positions.min()) if positions.numel() else 0
            if least < 0:
                raise ValueError(f"global_tokens index_or_bool must be >= 0, got {least}")

    def _varies(self, shape: MaskShape, device: torch.device) -> tuple[bool, bool]:
        return self._flags(shape, device).shape[0] > 1, False

    def __repr__(self) -> str:
        align = "" if self.align == "bottom_right" else f", align={self.align!r}"
        positions = list(self.positions) if isinstance(self.positions, tuple) else show(self.positions)
        return f"global_tokens({positions}{align})"


class _GlobalTiler(Tiler):
    """Counts of global positions up to each position tell how many lie in any range."""

    def __init__(self, flags: Tensor, align: Align) -> None:
        self.flags, self.align = flags, align
        self.before = torch.nn.functional.pad(flags.cumsum(1), (1, 0))
        padded = torch.nn.functional.pad(flags, (0, -flags.shape[1] % TILE))
        self.key_words = pack(padded.unflatten(1, (-1, TILE)))

    def _count(self, b: Tensor, first: Tensor, last: Tensor) -> Tensor:
        size = self.flags.shape[1]
        stop = lookup(self.before, b, (last + 1).clamp(0, size))
        return stop - lookup(self.before, b, first.clamp(0, size))

    def classify(self, rows: TileRows) -> tuple[Tensor, Tensor]:
        row_first, row_last = rows.position(self.align)
        in_rows = self._count(rows.b, row_first, row_last)
        in_keys = self._count(rows.b, rows.j_first, rows.j_last)
        some = (in_rows > 0) | (in_keys > 0)
        every = (in_rows == row_last - row_first + 1) | (in_keys == rows.j_last - rows.j_first + 1)
        return some, every

    def words(self, tiles: Tiles) -> Tensor:
        rows = _at(self.flags, tiles.b, tiles.position(self.align))
        return torch.where(rows, -1, lookup(self.key_words, tiles.b, tiles.col))


def _at(flags: Tensor, b: Tensor, position: Tensor) -> Tensor:
    """flags[b, position], False outside."""
    size = flags.shape[1]
    if size == 0:
        return torch.zeros_like(position, dtype=torch.bool)
    return lookup(flags, b, position.clamp(0, size - 1)) & (position >= 0) & (position < size)

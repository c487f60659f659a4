"""Block-sparse layouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.block_mask import pack
from fastattn.checks import check_int
from fastattn.masks.base import Mask, register
from fastattn.masks.space import MaskShape, Pairs, check_batch, check_device, check_heads, describe, lookup
from fastattn.masks.tiles import TILE, Tiler, TileRows, Tiles


def blocks(layout: Tensor, block_size: int) -> Mask:
    """Pairs with layout[b, h, i // block_size, j // block_size].

    Args:
        layout: bool [nQ, nK] or [B|1, H|1, nQ, nK]; nQ = ceil(Lq / block_size), nK = ceil(Lk / block_size).
        block_size: side of a block, >= 1.

    Raises:
        TypeError: layout is not a bool tensor, block_size is not an int.
        ValueError: other dimensions, block_size < 1, or, when used, sizes that do not fit the call.

    Example: `blocks(torch.eye(2, dtype=torch.bool), 2)` on 3x3 is [[1, 1, 0], [1, 1, 0], [0, 0, 1]].
    """
    if not isinstance(layout, Tensor) or layout.dtype != torch.bool:
        raise TypeError(f"blocks layout must be a bool tensor, got {describe(layout)}")
    if layout.dim() not in (2, 4):
        raise ValueError(f"blocks layout must have 2 or 4 dimensions, got shape {list(layout.shape)}")
    return Blocks(layout, check_int("blocks block_size", block_size, 1))


@register
@dataclass(frozen=True, eq=False, repr=False)
class Blocks(Mask):
    """A layout of square blocks."""

    layout: Tensor
    block_size: int

    def _layout(self, shape: MaskShape, device: torch.device) -> Tensor:
        """The layout as [B|1, H|1, nQ, nK]."""
        layout = check_device("blocks layout", self.layout, device)
        layout = layout[None, None] if layout.dim() == 2 else layout
        check_batch("blocks layout", layout.shape[0], shape.batch)
        check_heads("blocks layout", layout.shape[1], shape.heads)
        want = [-(-length // self.block_size) for length in (shape.seqlen_q, shape.seqlen_k)]
        if list(layout.shape[2:]) != want:
            raise ValueError(
                f"blocks layout must have {want} blocks of {self.block_size} "
                f"for {shape.seqlen_q}x{shape.seqlen_k}, got {list(layout.shape[2:])}"
            )
        return layout

    def _visible(self, at: Pairs) -> Tensor:
        layout = self._layout(at.shape, at.j.device)
        return lookup(layout, at.b, at.h, at.i // self.block_size, at.j // self.block_size)

    def _tiler(self, shape: MaskShape, device: torch.device) -> Tiler:
        return _BlocksTiler(self._layout(shape, device), self.block_size, shape.seqlen_k)

    def _check(self, shape: MaskShape, device: torch.device) -> None:
        self._layout(shape, device)

    def _varies(self, shape: MaskShape, device: torch.device) -> tuple[bool, bool]:
        layout = self._layout(shape, device)
        return layout.shape[0] > 1, layout.shape[1] > 1

    def __repr__(self) -> str:
        return f"blocks({describe(self.layout)}, {self.block_size})"


class _BlocksTiler(Tiler):
    """Sums of the layout above and to the left of each block count the set blocks of any rectangle."""

    def __init__(self, layout: Tensor, block_size: int, seqlen_k: int) -> None:
        self.size = block_size
        sums = layout.to(torch.int32).cumsum(2, dtype=torch.int32).cumsum(3, dtype=torch.int32)
        self.sums = torch.nn.functional.pad(sums, (1, 0, 1, 0))
        # Bits of every (block row, key tile), which the rows of a tile look up.
        column = torch.arange(-(-seqlen_k // TILE) * TILE, device=layout.device) // block_size
        column = column.clamp_(max=max(layout.shape[3] - 1, 0)).view(-1, TILE)
        self.row_words = pack(layout[:, :, :, column])

    def classify(self, rows: TileRows) -> tuple[Tensor, Tensor]:
        top, bottom = rows.i_first // self.size, rows.i_last // self.size + 1
        left, right = rows.j_first // self.size, rows.j_last // self.size + 1

        def total(row: Tensor, col: Tensor) -> Tensor:
            return lookup(self.sums, rows.b, rows.h, row, col)

        count = total(bottom, right) - total(top, right) - total(bottom, left) + total(top, left)
        return count > 0, count == (bottom - top) * (right - left)

    def words(self, tiles: Tiles) -> Tensor:
        return lookup(self.row_words, tiles.b, tiles.h, tiles.i // self.size, tiles.col)

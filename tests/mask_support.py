"""Definitions of masks pair by pair, and what kernels would make of a lowered mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastattn.masks import LoweredMask, Mask, MaskShape

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pair:
    """Where a definition is evaluated: indices and the sequence's own lengths."""

    b: int
    h: int
    i: int
    j: int
    len_q: int
    len_k: int

    def position(self, align: str) -> int:
        return self.i + (self.len_k - self.len_q if align == "bottom_right" else 0)


Definition = Callable[[Pair], bool]


def by_definition(definition: Definition, shape: MaskShape) -> Tensor:
    """Dense bool [B, H, Lq, Lk], one Python call a pair."""
    lens_q = [shape.seqlen_q] * shape.batch if shape.seqlens_q is None else shape.seqlens_q.tolist()
    lens_k = [shape.seqlen_k] * shape.batch if shape.seqlens_k is None else shape.seqlens_k.tolist()
    result = torch.zeros(shape.batch, shape.heads, shape.seqlen_q, shape.seqlen_k, dtype=torch.bool)
    for b in range(shape.batch):
        for h in range(shape.heads):
            rows = [
                [definition(Pair(b, h, i, j, lens_q[b], lens_k[b])) for j in range(lens_k[b])]
                for i in range(lens_q[b])
            ]
            if lens_q[b] and lens_k[b]:
                result[b, h, : lens_q[b], : lens_k[b]] = torch.tensor(rows)
    return result


def expand(lowered: LoweredMask, shape: MaskShape) -> Tensor:
    """What a kernel would make of a lowered mask: dense bool [B, H, Lq, Lk]."""
    lens_q = torch.full((shape.batch,), shape.seqlen_q) if shape.seqlens_q is None else shape.seqlens_q
    lens_k = torch.full((shape.batch,), shape.seqlen_k) if shape.seqlens_k is None else shape.seqlens_k
    i = torch.arange(shape.seqlen_q)[:, None]
    j = torch.arange(shape.seqlen_k)[None]
    result = torch.ones(shape.batch, shape.heads, shape.seqlen_q, shape.seqlen_k, dtype=torch.bool)
    for b in range(shape.batch):
        offset = int(lens_k[b]) - int(lens_q[b])
        visible = (i < lens_q[b]) & (j < lens_k[b])
        for lo, hi, at in (
            (lowered.lo_top, lowered.hi_top, 0),
            (lowered.lo_bottom, lowered.hi_bottom, offset),
        ):
            visible &= torch.tensor(True) if lo is None else j >= i + at + lo
            visible &= torch.tensor(True) if hi is None else j <= i + at + hi
        for bound, keeps in ((lowered.key_starts, torch.ge), (lowered.key_ends, torch.lt)):
            if bound is not None:
                assert bound.dtype == torch.int32 and bound.is_contiguous()
                visible &= keeps(j, bound.expand(shape.batch, shape.seqlen_q)[b][:, None])
        result[b] &= visible
    if lowered.dense is not None:
        assert lowered.dense.dtype == torch.bool and lowered.dense.dim() == 4
        result &= lowered.dense
    if lowered.block is not None:
        check_block(lowered, shape)
        # Full tiles are clipped to a sequence's own lengths, as kernels do.
        result &= lowered.block.to_dense()
    return result


def check_block(lowered: LoweredMask, shape: MaskShape) -> None:
    """Both lists say the same, ascending; no tile is kept in a form that a cheaper one could have."""
    block = lowered.block
    assert block is not None
    assert all(x.dtype == torch.int32 for x in pytree.tree_leaves(block))
    assert all(getattr(lowered, name) is None for name in vars(lowered) if name != "block")
    batch, heads, rows = block.row_ptr.shape[0], block.row_ptr.shape[1], block.row_ptr.shape[2] - 1
    cols = block.col_ptr.shape[2] - 1
    assert (rows, cols) == (-(-shape.seqlen_q // 64), -(-shape.seqlen_k // 64))
    assert batch in (1, shape.batch) and heads in (1, shape.heads)
    by_row, by_col = set(), set()
    row_ptr, col_ptr = block.row_ptr.flatten(0, 1).tolist(), block.col_ptr.flatten(0, 1).tolist()
    row_tiles, row_bits = block.row_tiles.tolist(), block.row_bits.tolist()
    col_tiles, col_bits = block.col_tiles.tolist(), block.col_bits.tolist()
    for group in range(batch * heads):
        for row in range(rows):
            span = slice(row_ptr[group][row], row_ptr[group][row + 1])
            assert row_tiles[span] == sorted(set(row_tiles[span]))
            by_row |= {(group, row, *item) for item in zip(row_tiles[span], row_bits[span], strict=True)}
        for col in range(cols):
            span = slice(col_ptr[group][col], col_ptr[group][col + 1])
            assert col_tiles[span] == sorted(set(col_tiles[span]))
            by_col |= {
                (group, tile, col, bits) for tile, bits in zip(col_tiles[span], col_bits[span], strict=True)
            }
    assert by_row == by_col and len(by_row) == len(row_tiles) == len(col_tiles)
    used = {bits for _, _, _, bits in by_row if bits >= 0}
    assert used == set(range(block.bits.shape[0]))
    assert len({tuple(tile) for tile in block.bits.flatten(1).tolist()}) == block.bits.shape[0]
    assert all(any(tile) for tile in block.bits.flatten(1).tolist())


def check(mask: Mask, definition: Definition, shape: MaskShape) -> None:
    """Definition, dense form and kernel form agree."""
    want = by_definition(definition, shape)
    full = (shape.batch, shape.heads, shape.seqlen_q, shape.seqlen_k)
    assert torch.equal(mask.to_dense(shape, CPU).expand(full), want)
    assert torch.equal(expand(mask.lower(shape, CPU), shape), want)

"""Block lists: the form in which any mask reaches a kernel that skips what it need not visit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

TILE = 64


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """Visible pairs as lists of 64x64 tiles: nq = ceil(seqlen_q / 64), nk = ceil(seqlen_k / 64).

    The leading dimensions Bm and Hm are the batch size or 1, the number of query heads or 1. All tensors are
    int32. A pair outside its sequence is invisible: its bit is 0, and readers clip full tiles to the lengths.

    Args:
        row_ptr: [Bm, Hm, nq + 1], offsets into row_tiles and row_bits.
        row_tiles: [nnz], key-tile index, ascending within a row of tiles.
        row_bits: [nnz], -1 for a full tile, else an index into bits.
        col_ptr: [Bm, Hm, nk + 1], offsets into col_tiles and col_bits.
        col_tiles: [nnz], query-tile index, ascending within a column of tiles.
        col_bits: [nnz], as row_bits.
        bits: [T, 64, 2], the distinct partial tiles: for each row a little-endian 64-bit word, whose bit c
            says whether column c is visible.
        seqlen_q, seqlen_k: the lengths it was built for.
    """

    row_ptr: Tensor
    row_tiles: Tensor
    row_bits: Tensor
    col_ptr: Tensor
    col_tiles: Tensor
    col_bits: Tensor
    bits: Tensor
    seqlen_q: int
    seqlen_k: int

    def to_dense(self) -> Tensor:
        """Expand to bool [Bm, Hm, seqlen_q, seqlen_k]; for looking and for tests, O(N^2) memory."""
        batch, heads, rows = self.row_ptr.shape[0], self.row_ptr.shape[1], self.row_ptr.shape[2] - 1
        cols = self.col_ptr.shape[2] - 1
        counts = self.row_ptr.diff(dim=2).flatten().long()
        row = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts)
        words = self.bits.reshape(-1, 2 * TILE).view(torch.int64)
        tiles = torch.cat([unpack(words), words.new_ones(1, TILE, TILE, dtype=torch.bool)])
        grid = torch.zeros(batch * heads * rows, cols, TILE, TILE, dtype=torch.bool, device=counts.device)
        grid[row, self.row_tiles.long()] = tiles[self.row_bits.long()]
        dense = grid.view(batch, heads, rows, cols, TILE, TILE).transpose(3, 4)
        dense = dense.reshape(batch, heads, rows * TILE, cols * TILE)
        return dense[:, :, : self.seqlen_q, : self.seqlen_k]

    @property
    def nbytes(self) -> int:
        """Memory that the lists and bit tiles take."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def __repr__(self) -> str:
        batch, heads = self.row_ptr.shape[:2]
        return (
            f"BlockMask({self.seqlen_q}x{self.seqlen_k}, batch={batch}, heads={heads}, "
            f"tiles={self.row_tiles.numel()}, bit_tiles={self.bits.shape[0]})"
        )


def pack(visible: Tensor) -> Tensor:
    """Bits of bool [..., 64] as one int64 word [...]: bit c is column c.

    Eight bools are eight bytes of 0 or 1. Byte k sits at bit 8k; the multiplier's bit 56 - 7k moves it to bit
    56 + k, and nothing else reaches the top byte, which so holds the eight bits in order.
    """
    if visible.numel() == 0:
        return visible.new_zeros(visible.shape[:-1], dtype=torch.int64)
    octets = visible.contiguous().view(torch.uint8).view(torch.int64)
    octets = ((octets * 0x0102040810204080) >> 56) & 0xFF
    return octets.to(torch.uint8).view(torch.int64).squeeze(-1)


def unpack(words: Tensor) -> Tensor:
    """Inverse of pack: int64 [...] to bool [..., 64]."""
    return ((words.unsqueeze(-1) >> torch.arange(TILE, device=words.device)) & 1).bool()


def _flatten(mask: BlockMask) -> tuple[list[Tensor], tuple[int, int]]:
    return [getattr(mask, name) for name in _TENSORS], (mask.seqlen_q, mask.seqlen_k)


def _unflatten(tensors: Iterable[Any], lengths: tuple[int, int]) -> BlockMask:
    seqlen_q, seqlen_k = lengths
    return BlockMask(**dict(zip(_TENSORS, tensors, strict=True)), seqlen_q=seqlen_q, seqlen_k=seqlen_k)


_TENSORS = tuple(field.name for field in fields(BlockMask) if not field.name.startswith("seqlen"))
pytree.register_pytree_node(
    BlockMask, _flatten, _unflatten, serialized_type_name="fastattn.block_mask.BlockMask"
)

"""How fast: tile sizes, warps and pipeline stages by architecture, head dim and dtype.

Nothing is tuned at run time; `python -m fastattn.backends.triton.compile` shows what each entry compiles to.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

# Shared memory that one block may have, in bytes, by compute capability; unknown ones count as the smallest.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}
SMALLEST = 101_376
BLOCK_MASK_TILE = 64


class TileConfig(NamedTuple):
    """A kernel's speed choices; what it computes does not depend on them."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def block_dim(head_dim: int) -> int:
    """The width of a tile that holds head_dim columns: a power of two, at least what a product takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


@cache
def forward_config(arch: int, dim: int, itemsize: int, blocks: bool, seqlen_q: int) -> TileConfig:
    """Of attention_fwd.

    Args:
        arch: compute capability, 90 for 9.0.
        dim: block_dim of the wider of head_dim and head_dim_v.
        itemsize: bytes of an element of q.
        blocks: whether there is a block mask, whose tiles are 64 x 64.
        seqlen_q: rows; a few of them need no large tile.
    """
    room = SHARED_MEMORY.get(arch, SMALLEST)
    if itemsize == 4:  # no tensor cores at full precision: registers limit, not memory
        config = TileConfig(64, 64 if dim <= 64 else 32, 4 if dim <= 128 else 8, 2 if dim <= 64 else 1)
    elif arch in (90, 100, 103):
        config = {
            16: TileConfig(128, 128, 8, 3),
            32: TileConfig(128, 128, 8, 3),
            64: TileConfig(128, 128, 8, 3),
            128: TileConfig(128, 128, 8, 2),
            256: TileConfig(128, 64, 8, 2),
        }[dim]
    elif room > SMALLEST:
        config = {256: TileConfig(128, 32, 8, 2)}.get(dim, TileConfig(128, 64, 4 if dim <= 64 else 8, 3))
    else:
        config = {128: TileConfig(64, 64, 4, 2), 256: TileConfig(64, 32, 4, 1)}.get(
            dim, TileConfig(128, 64, 4, 2)
        )
    if blocks:
        stages = config.num_stages if dim <= 128 else 1
        config = TileConfig(BLOCK_MASK_TILE, BLOCK_MASK_TILE, 8 if dim == 256 else 4, stages)
    elif seqlen_q <= 16:
        config = config._replace(block_m=16, num_warps=4)
    elif seqlen_q <= 64:
        config = config._replace(block_m=64, num_warps=4)
    return config


@cache
def backward_config(arch: int, dim: int, itemsize: int, blocks: bool) -> TileConfig:
    """Of attention_bwd_dq and attention_bwd_dkdv: rows by keys."""
    if itemsize == 4:
        config = TileConfig(32, 32, 4, 1) if dim > 64 else TileConfig(64, 32, 4, 1)
    elif arch in (90, 100, 103):
        config = {
            16: TileConfig(64, 128, 8, 2),
            32: TileConfig(64, 128, 8, 2),
            64: TileConfig(64, 128, 8, 2),
            128: TileConfig(64, 128, 8, 2),
            256: TileConfig(64, 64, 8, 1),
        }[dim]
    elif SHARED_MEMORY.get(arch, SMALLEST) > SMALLEST:
        config = TileConfig(64, 64, 4 if dim <= 64 else 8, 2) if dim <= 128 else TileConfig(32, 64, 8, 1)
    else:
        config = TileConfig(64, 64, 4, 1) if dim <= 64 else TileConfig(32, 32, 4, 1)
    if blocks:
        config = TileConfig(BLOCK_MASK_TILE, BLOCK_MASK_TILE, 4 if dim <= 64 else 8, 1)
    return config


@cache
def bias_config(arch: int, dim: int, itemsize: int) -> TileConfig:
    """Of the kernels that make one tile of dS at a time; square, as the tiles of a block mask are."""
    return TileConfig(BLOCK_MASK_TILE, BLOCK_MASK_TILE, 4 if dim <= 64 else 8, 1)

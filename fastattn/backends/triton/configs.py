"""How fast: tile sizes, warps and pipeline stages by architecture, head dim and dtype.

Nothing is tuned at run time; `python -m fastattn.backends.triton.compile` shows what each entry compiles to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

# Shared memory that one block may have, in bytes, by compute capability; unknown ones count as the smallest.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}
SMALLEST = 101_376
HOPPER_AND_LATER = (90, 100, 103)  # with as much memory, and products of whole warp groups
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


def _fitted(config: TileConfig, arch: int, needed: Callable[[TileConfig], int], fixed: bool) -> TileConfig:
    """The config, with fewer stages and then smaller tiles (unless they are fixed) until it fits."""
    room = SHARED_MEMORY.get(arch, SMALLEST)
    while needed(config) > room:
        if config.num_stages > 1:
            config = config._replace(num_stages=config.num_stages - 1)
        elif not fixed and config.block_n > 32:
            config = config._replace(block_n=config.block_n // 2)
        elif not fixed and config.block_m > 32:
            config = config._replace(block_m=config.block_m // 2)
        else:
            break
    return config


@cache
def forward_config(
    arch: int, dim: int, itemsize: int, blocks: bool, seqlen_q: int, pair_bytes: int = 0
) -> TileConfig:
    """Of attention_fwd.

    Args:
        arch: compute capability, 90 for 9.0.
        dim: block_dim of the wider of head_dim and head_dim_v.
        itemsize: bytes of an element of q.
        blocks: whether there is a block mask, whose tiles are 64 x 64.
        seqlen_q: rows; a few of them need no large tile.
        pair_bytes: what is read for each pair: of a mask, a bias.
    """
    if itemsize == 4:  # no tensor cores at full precision: registers limit, not memory
        config = TileConfig(64, 64 if dim <= 64 else 32, 4 if dim <= 128 else 8, 2 if dim <= 64 else 1)
    elif arch in HOPPER_AND_LATER:
        size = 128 if dim <= 128 else 64  # wider accumulators would spill
        config = TileConfig(size, size, 8, 3 if dim <= 64 else 2)
    else:
        config = TileConfig(128 if dim <= 128 else 64, 64, 8, 2)
    if blocks:
        config = TileConfig(BLOCK_MASK_TILE, BLOCK_MASK_TILE, 8 if dim == 256 else 4, config.num_stages)
    elif seqlen_q <= 16:
        config = config._replace(block_m=16, num_warps=4)
    elif seqlen_q <= 64:
        config = config._replace(block_m=64, num_warps=4)

    def needed(c: TileConfig) -> int:  # q, the stages of k and v, a tile of pairs
        rows_and_keys = c.block_m + 2 * c.num_stages * c.block_n
        return itemsize * dim * rows_and_keys + pair_bytes * c.block_m * c.block_n

    return _fitted(config, arch, needed, blocks)


# Where a forward pass of few rows would leave multiprocessors idle, several programs share a row tile's keys.
PROGRAMS_EACH = 2  # programs that a multiprocessor is given: more hide more of a load's latency
MOST_PARTS = 64  # which one program reads at once


@cache
def backward_config(arch: int, dim: int, itemsize: int, blocks: bool, pair_bytes: int = 0) -> TileConfig:
    """Of attention_bwd_rows, attention_bwd_dq and attention_bwd_dkdv: rows by keys."""
    if itemsize == 4:
        config = TileConfig(64, 64, 8, 1) if dim <= 64 else TileConfig(32, 32, 4, 1)
    elif arch in HOPPER_AND_LATER:
        config = TileConfig(64, 128 if dim <= 128 else 64, 8, 2)
    else:
        config = TileConfig(64, 64, 4 if dim <= 64 else 8, 2)
    if blocks:
        config = TileConfig(BLOCK_MASK_TILE, BLOCK_MASK_TILE, 4 if dim <= 64 else 8, config.num_stages)

    def needed(c: TileConfig) -> int:  # q and dO with the stages of k and v, or the other way round
        rows, keys = sorted((c.block_m, c.block_n))
        again = 0 if arch in HOPPER_AND_LATER else keys  # which dQ's or dK's product reads in another layout
        tiles = 2 * (rows + c.num_stages * keys) + again
        return itemsize * dim * tiles + pair_bytes * c.block_m * c.block_n

    return _fitted(config, arch, needed, blocks)


@cache
def bias_config(arch: int, dim: int, itemsize: int, pair_bytes: int = 0) -> TileConfig:
    """Of the kernels that make one tile of dS at a time; square, as the tiles of a block mask are."""
    return TileConfig(BLOCK_MASK_TILE, BLOCK_MASK_TILE, 4 if dim <= 64 else 8, 1)

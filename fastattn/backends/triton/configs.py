"""How fast: tile sizes, warps and pipeline stages by architecture, head dim and dtype.

Nothing is tuned at run time; `python -m fastattn.backends.triton.compile` shows what each entry compiles to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

AMD = 0  # in place of a compute capability: any of AMD's devices, none of which was ever tried

# Shared memory that one block may have, in bytes, by compute capability; unknown ones count as the smallest
# of NVIDIA's.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}
SHARED_MEMORY[AMD] = 65_536
SMALLEST = 101_376
HOPPER_AND_LATER = (90, 100, 103)  # with as much memory, and products of whole warp groups
# How many tiles of keys a backward pass of 16-bit numbers keeps once more in shared memory, for a product
# that reads them in another layout, by compute capability; 1 elsewhere. In float32 as many as on sm_100.
TILES_AGAIN = {90: 0, 100: 2, 103: 2}
BLOCK_MASK_TILE = 64  # of which a kernel may take parts
SMALLEST_TILE = 16  # rows or keys that a product takes


class TileConfig(NamedTuple):
    """A kernel's speed choices; what it computes does not depend on them."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def block_dim(head_dim: int) -> int:
    """The width of a tile that holds head_dim columns: a power of two, at least what a product takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _fitted(config: TileConfig, arch: int, needed: Callable[[TileConfig], int]) -> TileConfig:
    """The config, with fewer stages and then smaller tiles until it fits."""
    room = SHARED_MEMORY.get(arch, SMALLEST)
    while needed(config) > room and config.num_stages > 1:
        config = config._replace(num_stages=config.num_stages - 1)
    for smallest in (32, SMALLEST_TILE):
        while needed(config) > room and config.block_n > smallest:
            config = config._replace(block_n=config.block_n // 2)
        while needed(config) > room and config.block_m > smallest:
            config = config._replace(block_m=config.block_m // 2)
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

    return _fitted(config, arch, needed)


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
        again = 2 if itemsize == 4 else TILES_AGAIN.get(arch, 1)
        tiles = 2 * (rows + c.num_stages * keys) + again * keys
        return itemsize * dim * tiles + pair_bytes * c.block_m * c.block_n

    return _fitted(config, arch, needed)


@cache
def bias_config(arch: int, dim: int, itemsize: int, pair_bytes: int = 0) -> TileConfig:
    """Of the kernels that make one tile of dS at a time; square, so that rows + keys are a power of two."""
    size = BLOCK_MASK_TILE

    def needed(size: int) -> int:  # q, dO, k and v, what is read and made for each pair
        return itemsize * dim * 4 * size + (pair_bytes + 4) * size * size

    while needed(size) > SHARED_MEMORY.get(arch, SMALLEST) and size > SMALLEST_TILE:
        size //= 2
    return TileConfig(size, size, 4 if dim <= 64 else 8, 1)

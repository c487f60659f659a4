"""Which rows or keys a program owns: what the kernels of scores and of summaries begin with."""

import triton
import triton.language as tl

from fastattn.backends.triton.tile import sequence


@triton.jit
def row_program(lengths, BLOCK_M: tl.constexpr):
    """(b, h, head of k, first row, first row of q, first row of k, len_q, len_k); the longest tiles of a
    causal call come first. The first row may be len_q or more: then there is nothing to do."""
    num_tiles = tl.cdiv(lengths.seqlen_q, BLOCK_M)
    bh = tl.program_id(0) // num_tiles
    tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    b = bh // lengths.num_heads
    h = bh % lengths.num_heads
    h_kv = h // (lengths.num_heads // lengths.num_heads_kv)
    q_begin, k_begin, len_q, len_k = sequence(lengths, b)
    return b, h, h_kv, tile * BLOCK_M, q_begin, k_begin, len_q, len_k


@triton.jit
def whole_tiles(begin, end, start, count, BLOCK_N: tl.constexpr):
    """(first, stop) of the keys of those tiles, of `count` from `start` on, that every row sees whole."""
    last = start + count * BLOCK_N
    first = tl.minimum(tl.cdiv(tl.max(begin), BLOCK_N) * BLOCK_N, last)
    return first, tl.minimum(tl.maximum(tl.min(end) // BLOCK_N * BLOCK_N, first), last)


@triton.jit
def key_program(lengths, BLOCK_N: tl.constexpr):
    """(b, head of k, query heads of its group, first key, first row of q, first row of k, len_q, len_k)."""
    num_tiles = tl.cdiv(lengths.seqlen_k, BLOCK_N)
    bh = tl.program_id(0) // num_tiles
    tile = tl.program_id(0) % num_tiles
    b = bh // lengths.num_heads_kv
    group = lengths.num_heads // lengths.num_heads_kv
    q_begin, k_begin, len_q, len_k = sequence(lengths, b)
    return b, bh % lengths.num_heads_kv, group, tile * BLOCK_N, q_begin, k_begin, len_q, len_k

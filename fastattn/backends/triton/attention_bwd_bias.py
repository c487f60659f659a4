"""Gradients of biases, which add dS up over what they are broadcast along, in a fixed order.

A program owns what it adds to: nothing is atomic, and the bits are the same from run to run.
"""

import triton
import triton.language as tl

from fastattn.backends.triton.gradient import row_tile_inputs, tile_gradient
from fastattn.backends.triton.tile import key_range, key_tile, key_tiles, pair_address, row_base, sequence


@triton.jit(do_not_specialize=["batches", "heads"])
def attention_bwd_bias(
    q, k, v, lse, dout, delta, residual, dbias, lengths, rules, batches, heads,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
    VARIES_BY_KEY: tl.constexpr,
):  # fmt: skip
    """dbias of a row tile: dS, or its sums over keys, added up over the entries and heads that share it.

    dbias: Pairs, float32, zeros, [batches, heads, Lq, Lk or 1] with batches 1 or B and heads 1 or Hq.
    """
    num_tiles = tl.cdiv(lengths.seqlen_q, BLOCK_M)
    owner = tl.program_id(0) // num_tiles
    tile = tl.program_id(0) % num_tiles
    shared_b = lengths.batch // batches
    shared_h = lengths.num_heads // heads
    i0 = tile * BLOCK_M
    r = tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_M], tl.float32)
    for n in range(shared_b * shared_h):
        b = owner // heads * shared_b + n // shared_h
        h = owner % heads * shared_h + n % shared_h
        q_begin, k_begin, len_q, len_k = sequence(lengths, b)
        if i0 < len_q:
            h_kv = h // (lengths.num_heads // lengths.num_heads_kv)
            i, rows, grad, row_lse, row_residual, row_delta = row_tile_inputs(
                q, dout, lse, residual, delta, b, h, q_begin, i0, len_q, HEAD_DIM, HEAD_DIM_V, BLOCK_D,
                BLOCK_DV, BLOCK_M, NATURAL,
            )  # fmt: skip
            begin, end = key_range(rules, b, i, len_q, len_k)
            start, count = key_tiles(rules, b, h, i0, tl.min(begin), tl.max(end), BLOCK_N)
            for t in range(count):
                j0, bits = key_tile(rules, start, t, BLOCK_N)
                _, ds, _ = tile_gradient(
                    rows, grad, row_lse, row_residual, row_delta, k, v, lengths, rules, b,
                    h, h_kv, k_begin, i0, i, j0, bits, begin, end, len_k - len_q, len_q,
                    len_k, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
                    NATURAL, PRECISION, CHECK=True, HIDES=True,
                )  # fmt: skip
                if VARIES_BY_KEY:
                    j = j0 + tl.arange(0, BLOCK_N)
                    inside = (r < len_q - i0)[:, None] & (j < len_k)[None, :]
                    at = pair_address(dbias, b, h, (i0 + r)[:, None], j[None, :])
                    tl.store(at, tl.load(at, mask=inside, other=0.0) + ds, mask=inside)
                    tl.debug_barrier()  # another thread may hold an element the next time
                else:
                    total += tl.where(r < len_q - i0, tl.sum(ds, 1), 0.0)
    if not VARIES_BY_KEY:
        b = owner // heads * shared_b
        h = owner % heads * shared_h
        at = pair_address(dbias, b, h, i0 + r, r * 0)
        tl.store(at, total, mask=i0 + r < lengths.seqlen_q)


@triton.jit(do_not_specialize=["parts", "num_diagonals"])
def attention_bwd_diagonals(
    q, k, v, lse, dout, delta, residual, partial, lengths, rules, parts, num_diagonals,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of dS along diagonals j - i, of every parts-th row tile of one head.

    partial: Rows, float32, zeros, [B, Hq, parts, num_diagonals].
    """
    part = tl.program_id(0) % parts
    bh = tl.program_id(0) // parts
    b = bh // lengths.num_heads
    h = bh % lengths.num_heads
    h_kv = h // (lengths.num_heads // lengths.num_heads_kv)
    q_begin, k_begin, len_q, len_k = sequence(lengths, b)
    offset = len_k - len_q
    base = row_base(partial, b, h, part)
    # Diagonal c of a tile runs through its pairs (m, m + c - (BLOCK_M - 1)).
    m = tl.arange(0, BLOCK_M)[:, None]
    c = tl.arange(0, BLOCK_M + BLOCK_N)[None, :]
    column = m + c - (BLOCK_M - 1)
    on_tile = (column >= 0) & (column < BLOCK_N)
    column = tl.minimum(tl.maximum(column, 0), BLOCK_N - 1)
    for tile in range(part, tl.cdiv(len_q, BLOCK_M), parts):
        i0 = tile * BLOCK_M
        i, rows, grad, row_lse, row_residual, row_delta = row_tile_inputs(
            q, dout, lse, residual, delta, b, h, q_begin, i0, len_q, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
            BLOCK_M, NATURAL,
        )  # fmt: skip
        begin, end = key_range(rules, b, i, len_q, len_k)
        start, count = key_tiles(rules, b, h, i0, tl.min(begin), tl.max(end), BLOCK_N)
        for t in range(count):
            j0, bits = key_tile(rules, start, t, BLOCK_N)
            _, ds, _ = tile_gradient(
                rows, grad, row_lse, row_residual, row_delta, k, v, lengths, rules, b, h,
                h_kv, k_begin, i0, i, j0, bits, begin, end, offset, len_q, len_k, HEAD_DIM,
                HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, NATURAL, PRECISION,
                CHECK=True, HIDES=True,
            )  # fmt: skip
            ds = tl.where(m < len_q - i0, ds, 0.0)
            sums = tl.sum(tl.where(on_tile, tl.gather(ds, column, 1), 0.0), 0)
            d = tl.arange(0, BLOCK_M + BLOCK_N)
            index = j0 - i0 - (BLOCK_M - 1) + d - offset * rules.diag.bottom_right - rules.diag.first
            inside = (index >= 0) & (index < num_diagonals)
            at = base + index
            tl.store(at, tl.load(at, mask=inside, other=0.0) + sums, mask=inside)
            tl.debug_barrier()  # another thread may hold an element the next time

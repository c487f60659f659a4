"""Sums, or maxima, of the weights over the cells of a grid: pooled maps, and what each key receives, whose
grid has one row and a column for each key.

A program owns some rows of one row of cells, and walks all keys: nothing is atomic.
"""

import triton
import triton.language as tl

from fastattn.backends.triton.tile import (
    apply,
    band,
    exp_of,
    key_range,
    load_keys,
    load_rows,
    product,
    row_base,
    row_tile,
    row_tiles,
    sequence,
)


@triton.jit
def _gather(x, axis: tl.constexpr, MAXIMUM: tl.constexpr):
    """The sum, or the largest of numbers from 0 on, NaN where one is."""
    if MAXIMUM:
        lost = tl.max((x != x).to(tl.int32), axis) > 0
        return tl.where(lost, float("nan"), tl.max(tl.where(x == x, x, 0.0), axis))
    else:
        return tl.sum(x, axis)


@triton.jit
def _join(a, b, MAXIMUM: tl.constexpr):
    if MAXIMUM:
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    else:
        return a + b


@triton.jit(do_not_specialize=["grid_rows", "grid_cols", "parts"])
def summary_cells(
    q, k, shift, factor, cells, lengths, rules, grid_rows, grid_cols, parts,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NATURAL: tl.constexpr, PRECISION: tl.constexpr, MAXIMUM: tl.constexpr,
):  # fmt: skip
    """Row i falls into row floor(i * grid_rows / Lq) of cells, and keys likewise.

    shift, factor: [B, Hq, Lq], of summary_fwd.
    cells: [B, Hq, grid_rows, parts, grid_cols], float32, zeros.
    """
    part = tl.program_id(0) % parts
    row = tl.program_id(0) // parts % grid_rows
    bh = tl.program_id(0) // parts // grid_rows
    b = bh // lengths.num_heads
    h = bh % lengths.num_heads
    h_kv = h // (lengths.num_heads // lengths.num_heads_kv)
    q_begin, k_begin, len_q, len_k = sequence(lengths, b)
    row_begin = tl.cdiv(row.to(tl.int64) * len_q, grid_rows).to(tl.int32)
    row_end = tl.cdiv((row + 1).to(tl.int64) * len_q, grid_rows).to(tl.int32)
    per_part = tl.cdiv(row_end - row_begin, parts)
    row_begin += part * per_part
    row_end = tl.minimum(row_end, row_begin + per_part)
    base = cells + tl.program_id(0).to(tl.int64) * grid_cols
    lo, hi = band(rules.bounds, len_k - len_q)
    r = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    for j0 in range(0, len_k, BLOCK_N):
        keys = load_keys(k, lengths, b, h_kv, k_begin, j0, len_k, BLOCK_N, BLOCK_D, HEAD_DIM, True)
        last = tl.minimum(j0 + BLOCK_N, len_k) - 1
        column = tl.zeros([BLOCK_N], tl.float32)
        first_row = tl.maximum(row_begin, j0 - hi)
        start, count = row_tiles(rules, b, h, j0, first_row, tl.minimum(row_end, last - lo + 1), BLOCK_M)
        for t in range(count):
            i0, bits = row_tile(rules, start, t, BLOCK_M)
            if (i0 < row_end) & (i0 + BLOCK_M > row_begin):
                i = tl.minimum(i0 + r, len_q - 1)
                begin, end = key_range(rules, b, i, len_q, len_k)
                end = tl.where((i0 + r >= row_begin) & (i0 + r < row_end), end, 0)
                rows = load_rows(
                    row_base(q, b, h, q_begin + i0), q.row, r, BLOCK_D, HEAD_DIM, len_q - i0, True
                )
                s = product(rows, tl.trans(keys), None, PRECISION)
                s, _ = apply(
                    rules, s, b, h, i[:, None], (j0 + n)[None, :], begin[:, None], end[:, None],
                    len_k - len_q, len_q, len_k, bits, True,
                )  # fmt: skip
                at = bh.to(tl.int64) * lengths.seqlen_q + i
                p = exp_of(s - tl.load(shift + at)[:, None], NATURAL) * tl.load(factor + at)[:, None]
                p = tl.where(s == float("-inf"), 0.0, p)
                column = _join(column, _gather(p, 0, MAXIMUM), MAXIMUM)
        # There are no more columns of cells than keys: a tile has at most BLOCK_N of them.
        first = (tl.cast(j0, tl.int64) * grid_cols // len_k).to(tl.int32)
        cell = ((j0 + n).to(tl.int64) * grid_cols // len_k).to(tl.int32) - first
        held = (cell[:, None] == n[None, :]) & (j0 + n <= last)[:, None]
        found = _gather(tl.where(held, column[:, None], 0.0), 0, MAXIMUM)
        inside = first + n <= (last.to(tl.int64) * grid_cols // len_k).to(tl.int32)
        at = base + first + n
        tl.store(at, _join(tl.load(at, mask=inside, other=0.0), found, MAXIMUM), mask=inside)
        tl.debug_barrier()  # another thread may hold a cell the next time

"""What the backward kernels need of each row: delta, and what rounding took from its lse."""

import triton
import triton.language as tl

from fastattn.backends.triton.gradient import load_large_lse, sink_total, store_delta, tile_total
from fastattn.backends.triton.programs import row_program
from fastattn.backends.triton.tile import (
    key_range,
    key_tile,
    key_tiles,
    load_keys,
    load_rows,
    product,
    row_base,
)


@triton.jit
def attention_bwd_rows(
    q, k, out, lse, dout, dlse, delta, residual, sinks, lengths, rules,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta = dO·out - dlse; residual = log(sum of exp(s - lse)), which is 0 but for rounding."""
    b, h, h_kv, i0, q_begin, k_begin, len_q, len_k = row_program(lengths, BLOCK_M)
    if i0 >= len_q:
        return
    r = tl.arange(0, BLOCK_M)
    i = tl.minimum(i0 + r, len_q - 1)
    store_delta(out, dout, dlse, delta, b, h, q_begin, i0, i, len_q, HEAD_DIM_V, BLOCK_DV, BLOCK_M)
    row_lse, is_large = load_large_lse(lse, b, h, q_begin, i, NATURAL)
    rest = tl.zeros([BLOCK_M], tl.float32)
    if tl.max(is_large.to(tl.int32), 0) > 0:
        rows = load_rows(row_base(q, b, h, q_begin + i0), q.row, r, BLOCK_D, HEAD_DIM, len_q - i0, True)
        begin, end = key_range(rules, b, i, len_q, len_k)
        total = sink_total(sinks, row_lse, h, BLOCK_M, NATURAL)
        start, count = key_tiles(rules, b, h, i0, tl.min(begin), tl.max(end), BLOCK_N)
        for t in tl.range(0, count, num_stages=1):
            j0, bits = key_tile(rules, start, t, BLOCK_N)
            keys = load_keys(k, lengths, b, h_kv, k_begin, j0, len_k, BLOCK_N, BLOCK_D, HEAD_DIM, True)
            s = product(rows, tl.trans(keys), None, PRECISION)
            total += tile_total(
                rules, s, row_lse, b, h, i, j0, begin, end, len_q, len_k, bits, BLOCK_N, NATURAL
            )
        rest = tl.where(is_large, tl.log(total) if NATURAL else tl.log2(total), 0.0)
    tl.store(row_base(residual, b, h, q_begin + i0) + r * residual.row, rest, mask=r < len_q - i0)

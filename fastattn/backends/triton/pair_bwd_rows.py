"""What the backward kernels for scores that are no product need of each row: see attention_bwd_rows."""

import triton
import triton.language as tl

from fastattn.backends.triton.gradient import load_large_lse, sink_total, store_delta, tile_total
from fastattn.backends.triton.pair_scores import pair_tile
from fastattn.backends.triton.programs import row_program
from fastattn.backends.triton.tile import key_range, key_tile, key_tiles, row_base


@triton.jit
def pair_bwd_rows(
    q, k, v, w, out, lse, dout, dlse, delta, residual, sinks, lengths, rules,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, NATURAL: tl.constexpr, SCORE: tl.constexpr,
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
        begin, end = key_range(rules, b, i, len_q, len_k)
        total = sink_total(sinks, row_lse, h, BLOCK_M, NATURAL)
        start, count = key_tiles(rules, b, h, i0, tl.min(begin), tl.max(end), BLOCK_N)
        for t in range(count):
            j0, bits = key_tile(rules, start, t, BLOCK_N)
            s = pair_tile(
                q, k, w, lengths, b, h, h_kv, q_begin, k_begin, i0, j0, len_q, len_k, HEAD_DIM, BLOCK_M,
                BLOCK_N, BLOCK_H, SCORE,
            )  # fmt: skip
            total += tile_total(
                rules, s, row_lse, b, h, i, j0, begin, end, len_q, len_k, bits, BLOCK_N, NATURAL
            )
        rest = tl.where(is_large, tl.log(total) if NATURAL else tl.log2(total), 0.0)
    tl.store(row_base(residual, b, h, q_begin + i0) + r * residual.row, rest, mask=r < len_q - i0)

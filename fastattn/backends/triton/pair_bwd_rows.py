"""What the backward kernels for scores that are no product need of each row: see attention_bwd_rows."""

import triton
import triton.language as tl

from fastattn.backends.triton.attention_bwd_rows import LARGE_LSE
from fastattn.backends.triton.gradient import load_lse, load_per_row
from fastattn.backends.triton.pair_scores import pair_tile
from fastattn.backends.triton.programs import row_program
from fastattn.backends.triton.tile import apply, exp_of, key_range, key_tile, key_tiles, load_rows, row_base


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
    inside = r < len_q - i0
    o = load_rows(row_base(out, b, h, q_begin + i0), out.row, r, BLOCK_DV, HEAD_DIM_V, len_q - i0, True)
    do = load_rows(row_base(dout, b, h, q_begin + i0), dout.row, r, BLOCK_DV, HEAD_DIM_V, len_q - i0, True)
    dots = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if dlse is not None:
        dots -= load_per_row(dlse, b, h, q_begin, i)
    tl.store(row_base(delta, b, h, q_begin + i0) + r * delta.row, dots, mask=inside)

    row_lse = load_lse(lse, b, h, q_begin, i, NATURAL)
    natural = load_per_row(lse, b, h, q_begin, i)
    is_large = (tl.abs(natural) >= LARGE_LSE) & (natural - natural == 0)
    rest = tl.zeros([BLOCK_M], tl.float32)
    if tl.max(is_large.to(tl.int32), 0) > 0:
        begin, end = key_range(rules, b, i, len_q, len_k)
        total = tl.zeros([BLOCK_M], tl.float32)
        if sinks is not None:
            total += exp_of(tl.load(sinks + h) - row_lse, NATURAL)
        start, count = key_tiles(rules, b, h, i0, tl.min(begin), tl.max(end), BLOCK_N)
        for t in range(count):
            j0, bits = key_tile(rules, start, t, BLOCK_N)
            s = pair_tile(
                q, k, w, lengths, b, h, h_kv, q_begin, k_begin, i0, j0, len_q, len_k, HEAD_DIM, BLOCK_M,
                BLOCK_N, BLOCK_H, SCORE,
            )  # fmt: skip
            j = (j0 + tl.arange(0, BLOCK_N))[None, :]
            s, _ = apply(
                rules, s, b, h, i[:, None], j, begin[:, None], end[:, None], len_k - len_q, len_q, len_k,
                bits, True,
            )  # fmt: skip
            total += tl.sum(exp_of(s - row_lse[:, None], NATURAL), 1)
        rest = tl.where(is_large, tl.log(total) if NATURAL else tl.log2(total), 0.0)
    tl.store(row_base(residual, b, h, q_begin + i0) + r * residual.row, rest, mask=inside)

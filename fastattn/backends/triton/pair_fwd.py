"""The forward pass for scores that are no product: a program walks the keys of a few rows of one head.

The arithmetic of a pair's features outweighs all else, so there is one loop, which checks every pair.
"""

import triton
import triton.language as tl

from fastattn.backends.triton.pair_scores import pair_tile
from fastattn.backends.triton.programs import row_program
from fastattn.backends.triton.tile import (
    apply,
    exp_of,
    kept,
    key_range,
    key_tile,
    key_tiles,
    load_rows,
    not_finite,
    product,
    row_base,
    store_result,
)


@triton.jit
def pair_fwd(
    q, k, v, w, out, lse, sinks, lengths, rules,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
    SCORE: tl.constexpr,
):  # fmt: skip
    """out and, unless it is None, lse of BLOCK_M rows; see arguments.py for what comes in."""
    b, h, h_kv, i0, q_begin, k_begin, len_q, len_k = row_program(lengths, BLOCK_M)
    if i0 >= len_q:
        return
    r = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    i = tl.minimum(i0 + r, len_q - 1)
    begin, end = key_range(rules, b, i, len_q, len_k)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:  # one more logit, which carries no value
        m = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + h)
        l = tl.where(m == float("-inf"), 0.0, 1.0)
    start, count = key_tiles(rules, b, h, i0, tl.min(begin), tl.max(end), BLOCK_N)
    for t in range(count):
        j0, bits = key_tile(rules, start, t, BLOCK_N)
        s = pair_tile(
            q, k, w, lengths, b, h, h_kv, q_begin, k_begin, i0, j0, len_q, len_k, HEAD_DIM, BLOCK_M, BLOCK_N,
            BLOCK_H, SCORE,
        )  # fmt: skip
        s, _ = apply(
            rules, s, b, h, i[:, None], (j0 + n)[None, :], begin[:, None], end[:, None], len_k - len_q, len_q,
            len_k, bits, True,
        )  # fmt: skip
        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # of a row that has seen nothing yet
        p = exp_of(s - m_safe[:, None], NATURAL)
        rescale = exp_of(m - m_safe, NATURAL)
        l = l * rescale + tl.sum(p, 1)
        m = m_new
        if rules.dropout is not None:
            p *= kept(rules.dropout, b, h, lengths.num_heads, i0, j0, BLOCK_M, BLOCK_N)
        values = load_rows(
            row_base(v, b, h_kv, k_begin + j0), v.row, n, BLOCK_DV, HEAD_DIM_V, len_k - j0, True
        )
        finite = values - values == 0
        acc = product(p.to(values.dtype), tl.where(finite, values, 0.0), acc * rescale[:, None], PRECISION)
        if not_finite(values):  # which reach only the rows that see them
            seen = (s != float("-inf")).to(tl.float16)
            acc = tl.where(tl.dot(seen, (finite == 0).to(tl.float16)) > 0, float("nan"), acc)

    store_result(out, lse, rules, b, h, q_begin + i0, r, acc, m, l, len_q - i0, BLOCK_DV, HEAD_DIM_V, NATURAL)

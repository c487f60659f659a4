"""dQ and dw for scores that are no product: a program keeps a few rows, whole, and walks the keys.

A tile [rows, keys, features] of the pairs' features is made once, and gives both the scores and, when those
have become gradients, what they are multiplied by.
"""

import triton
import triton.language as tl

from fastattn.backends.triton.gradient import row_tile_inputs, score_gradient
from fastattn.backends.triton.pair_scores import by_query, feature_parts, pair_features, score_of
from fastattn.backends.triton.programs import row_program
from fastattn.backends.triton.tile import (
    apply,
    kept,
    key_range,
    key_tile,
    key_tiles,
    load_rows,
    row_base,
    store_rows,
)


@triton.jit
def pair_bwd_dq(
    q, k, v, w, lse, dout, delta, residual, dq, dw, lengths, rules,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NATURAL: tl.constexpr, SCORE: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M rows, and what they add to dw.

    dw: [programs, HEAD_DIM] of float32, or None.
    """
    b, h, h_kv, i0, q_begin, k_begin, len_q, len_k = row_program(lengths, BLOCK_M)
    if i0 >= len_q:
        return
    i, rows, grad, row_lse, row_residual, row_delta = row_tile_inputs(
        q, dout, lse, residual, delta, b, h, q_begin, i0, len_q, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
        BLOCK_M, NATURAL,
    )  # fmt: skip
    rows = rows.to(tl.float32)[:, None, :]
    grad = grad.to(tl.float32)[:, None, :]
    r = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    weights = tl.full([BLOCK_D], 1.0, tl.float32)
    if SCORE == "additive":
        weights = tl.load(w + d, mask=d < HEAD_DIM, other=0.0)
    begin, end = key_range(rules, b, i, len_q, len_k)
    end = tl.where(i0 + r < len_q, end, 0)  # rows beyond the last add nothing to dw
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_w = tl.zeros([BLOCK_D], tl.float32)
    start, count = key_tiles(rules, b, h, i0, tl.min(begin), tl.max(end), BLOCK_N)
    for t in range(count):
        j0, bits = key_tile(rules, start, t, BLOCK_N)
        keys = load_rows(row_base(k, b, h_kv, k_begin + j0), k.row, n, BLOCK_D, HEAD_DIM, len_k - j0, True)
        values = load_rows(
            row_base(v, b, h_kv, k_begin + j0), v.row, n, BLOCK_DV, HEAD_DIM_V, len_k - j0, True
        )
        features = pair_features(rows, keys.to(tl.float32)[None, :, :], SCORE)
        s, slope = score_of(tl.sum(feature_parts(features, weights[None, None, :], SCORE), 2), SCORE)
        dp = tl.sum(grad * values.to(tl.float32)[None, :, :], 2)
        keep = True
        if rules.dropout is not None:
            keep = kept(rules.dropout, b, h, lengths.num_heads, i0, j0, BLOCK_M, BLOCK_N)
        j = (j0 + n)[None, :]
        final, _ = apply(
            rules, s, b, h, i[:, None], j, begin[:, None], end[:, None], len_k - len_q, len_q, len_k, bits,
            True,
        )  # fmt: skip
        _, _, ds = score_gradient(
            rules, s, dp, row_lse[:, None], row_residual[:, None], row_delta[:, None], keep, b, h, i[:, None],
            j, begin[:, None], end[:, None], len_k - len_q, len_q, len_k, bits, NATURAL, True, True,
        )  # fmt: skip
        # A key that is not finite reaches only the rows that see it.
        features = tl.where((final != float("-inf"))[:, :, None], features, 0.0)
        ds = (ds * slope)[:, :, None]
        acc += tl.sum(by_query(ds, features, SCORE), 1)
        if dw is not None:
            acc_w += tl.sum(tl.sum(ds * features, 1), 0)
    store_rows(
        row_base(dq, b, h, q_begin + i0), dq.row, r, acc * weights[None, :], BLOCK_D, HEAD_DIM, len_q - i0
    )
    if dw is not None:
        tl.store(dw + tl.program_id(0) * HEAD_DIM + d, acc_w, mask=d < HEAD_DIM)

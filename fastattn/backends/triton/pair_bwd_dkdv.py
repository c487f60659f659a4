"""dK and dV for scores that are no product: a program keeps a few keys, whole, and walks the rows that see
them, for every query head of its group. Tiles are [keys, rows, features]."""

import triton
import triton.language as tl

from fastattn.backends.triton.gradient import load_lse, load_per_row, score_gradient
from fastattn.backends.triton.pair_scores import by_query, feature_parts, pair_features, score_of
from fastattn.backends.triton.programs import key_program
from fastattn.backends.triton.tile import (
    apply,
    band,
    kept,
    key_range,
    load_rows,
    row_base,
    row_tile,
    row_tiles,
    store_rows,
)


@triton.jit
def _add_rows(
    dk, dv, keys, values, weights, q, lse, dout, delta, residual, lengths, rules, b, h, q_begin, i0, j0, bits,
    len_q, len_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NATURAL: tl.constexpr, SCORE: tl.constexpr,
):  # fmt: skip
    """What rows i0 to i0 + BLOCK_M - 1 add to dK, but for a factor, and dV."""
    r = tl.arange(0, BLOCK_M)
    i = tl.minimum(i0 + r, len_q - 1)
    begin, end = key_range(rules, b, i, len_q, len_k)
    end = tl.where(i0 + r < len_q, end, 0)
    rows = load_rows(row_base(q, b, h, q_begin + i0), q.row, r, BLOCK_D, HEAD_DIM, len_q - i0, True)
    grad = load_rows(row_base(dout, b, h, q_begin + i0), dout.row, r, BLOCK_DV, HEAD_DIM_V, len_q - i0, True)
    grad = grad.to(tl.float32)[None, :, :]
    features = pair_features(rows.to(tl.float32)[None, :, :], keys, SCORE)
    s, slope = score_of(tl.sum(feature_parts(features, weights, SCORE), 2), SCORE)
    dp = tl.sum(values * grad, 2)
    keep = True
    if rules.dropout is not None:
        keep = tl.trans(kept(rules.dropout, b, h, lengths.num_heads, i0, j0, BLOCK_M, BLOCK_N))
    row_lse = load_lse(lse, b, h, q_begin, i, NATURAL)[None, :]
    row_residual = load_per_row(residual, b, h, q_begin, i)[None, :]
    row_delta = load_per_row(delta, b, h, q_begin, i)[None, :]
    j = (j0 + tl.arange(0, BLOCK_N))[:, None]
    final, _ = apply(
        rules, s, b, h, i[None, :], j, begin[None, :], end[None, :], len_k - len_q, len_q, len_k, bits, True
    )  # fmt: skip
    p, _, ds = score_gradient(
        rules, s, dp, row_lse, row_residual, row_delta, keep, b, h, i[None, :], j, begin[None, :],
        end[None, :], len_k - len_q, len_q, len_k, bits, NATURAL, True, True,
    )  # fmt: skip
    # A row that is not finite reaches only the keys that it sees.
    seen = (final != float("-inf"))[:, :, None]
    dv += tl.sum(p[:, :, None] * tl.where(seen, grad, 0.0), 1)
    dk += tl.sum(by_query((ds * slope)[:, :, None], tl.where(seen, features, 0.0), SCORE), 1)
    return dk, dv


@triton.jit
def pair_bwd_dkdv(
    q, k, v, w, lse, dout, delta, residual, dk, dv, lengths, rules,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NATURAL: tl.constexpr, SCORE: tl.constexpr,
):  # fmt: skip
    """dV_j = sum over i of P_ij dO_i; dK_j = sum over i of dS_ij times the score's derivative by k_j."""
    b, h_kv, group, j0, q_begin, k_begin, len_q, len_k = key_program(lengths, BLOCK_N)
    limit = len_k
    if lengths.cu_seqlens_k is None:
        limit = lengths.seqlen_k  # keys beyond an entry's length have gradients of 0
    if j0 >= limit:
        return
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    keys = load_rows(row_base(k, b, h_kv, k_begin + j0), k.row, n, BLOCK_D, HEAD_DIM, len_k - j0, True)
    values = load_rows(row_base(v, b, h_kv, k_begin + j0), v.row, n, BLOCK_DV, HEAD_DIM_V, len_k - j0, True)
    keys = keys.to(tl.float32)[:, None, :]
    values = values.to(tl.float32)[:, None, :]
    # Factors of the features in the sum, and of finished gradients.
    weights = tl.full([BLOCK_D], 1.0, tl.float32)
    factor = -weights
    if SCORE == "additive":
        weights = tl.load(w + d, mask=d < HEAD_DIM, other=0.0)
        factor = weights
    lo, hi = band(rules.bounds, len_k - len_q)
    first = tl.maximum(j0 - hi, 0)
    stop = tl.where(j0 < len_k, tl.minimum(tl.minimum(j0 + BLOCK_N, len_k) - lo, len_q), 0)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for g in range(group):
        h = h_kv * group + g
        start, count = row_tiles(rules, b, h, j0, first, stop, BLOCK_M)
        for t in range(count):
            i0, bits = row_tile(rules, start, t, BLOCK_M)
            acc_k, acc_v = _add_rows(
                acc_k, acc_v, keys, values, weights[None, None, :], q, lse, dout, delta, residual, lengths,
                rules, b, h, q_begin, i0, j0, bits, len_q, len_k, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
                BLOCK_M, BLOCK_N, NATURAL, SCORE,
            )  # fmt: skip
    acc_k = acc_k * factor[None, :]
    store_rows(row_base(dk, b, h_kv, k_begin + j0), dk.row, n, acc_k, BLOCK_D, HEAD_DIM, limit - j0)
    store_rows(row_base(dv, b, h_kv, k_begin + j0), dv.row, n, acc_v, BLOCK_DV, HEAD_DIM_V, limit - j0)

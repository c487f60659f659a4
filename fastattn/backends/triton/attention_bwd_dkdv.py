"""dK and dV: a program walks the row tiles that see one tile of keys, for every query head of its group.

It works on transposed tiles, [keys, rows], so that P and dS are operands of products as they are made.
"""

import triton
import triton.language as tl

from fastattn.backends.triton.gradient import load_lse, load_per_row, score_gradient, seen_by
from fastattn.backends.triton.programs import key_program
from fastattn.backends.triton.tile import (
    CONTAIN,
    add_reached,
    band,
    finite_or_zero,
    kept,
    key_range,
    load_keys,
    load_rows,
    not_finite,
    product,
    row_base,
    row_tile,
    row_tiles,
    store_rows,
)


@triton.jit
def _row_gradient(
    keys, values, q, lse, dout, delta, residual, lengths, rules, b, h, q_begin, i0, j0, bits, len_q, len_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
    CHECK: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """Of rows i0 to i0 + BLOCK_M - 1: (q, dO, what multiplies dO in dV, dS, the gradient by scale * q·k, and
    begin and end of the keys that are each row's)."""
    r = tl.arange(0, BLOCK_M)
    i = i0 + r
    at = i
    if CHECK:
        at = tl.minimum(i, len_q - 1)
    begin, end = key_range(rules, b, at, len_q, len_k)
    if CHECK:
        end = tl.where(i < len_q, end, 0)
    rows = load_rows(row_base(q, b, h, q_begin + i0), q.row, r, BLOCK_D, HEAD_DIM, len_q - i0, CHECK)
    grad = load_rows(row_base(dout, b, h, q_begin + i0), dout.row, r, BLOCK_DV, HEAD_DIM_V, len_q - i0, CHECK)
    s = product(keys, tl.trans(rows), None, PRECISION)
    dp = product(values, tl.trans(grad), None, PRECISION)
    keep = True
    if rules.dropout is not None:
        keep = tl.trans(kept(rules.dropout, b, h, lengths.num_heads, i0, j0, BLOCK_M, BLOCK_N))
    row_lse = load_lse(lse, b, h, q_begin, at, NATURAL)
    row_residual = load_per_row(residual, b, h, q_begin, at)
    row_delta = load_per_row(delta, b, h, q_begin, at)
    j = j0 + tl.arange(0, BLOCK_N)
    weight, ds, by_product = score_gradient(
        rules, s, dp, row_lse[None, :], row_residual[None, :], row_delta[None, :], keep, b, h, i[None, :],
        j[:, None], begin[None, :], end[None, :], len_k - len_q, len_q, len_k, bits, NATURAL, CHECK, HIDES,
    )  # fmt: skip
    return rows, grad, weight, ds, by_product, begin, end


@triton.jit
def _add_rows(
    dk, dv, column, keys, values, q, lse, dout, delta, residual, lengths, rules, b, h, q_begin, i0, j0, bits,
    len_q, len_k, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV:
    tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NATURAL: tl.constexpr, PRECISION:
    tl.constexpr, CHECK: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """What rows i0 to i0 + BLOCK_M - 1 add to dK, dV and the sums of dS over rows."""
    rows, grad, weight, ds, by_product, _, _ = _row_gradient(
        keys, values, q, lse, dout, delta, residual, lengths, rules, b, h, q_begin, i0, j0, bits, len_q,
        len_k, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, NATURAL, PRECISION, CHECK, HIDES,
    )  # fmt: skip
    dv = product(weight.to(grad.dtype), grad, dv, PRECISION)
    dk = product(by_product.to(rows.dtype), rows, dk, PRECISION)
    return dk, dv, column + tl.sum(ds, 1)


@triton.jit
def _contained(
    keys, values, q, lse, dout, delta, residual, lengths, rules, b, h_kv, group, q_begin, j0, first, stop,
    len_q, len_k, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV:
    tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NATURAL: tl.constexpr, PRECISION:
    tl.constexpr, OF_V: tl.constexpr,
):  # fmt: skip
    """dV, or else dK / scale, once more: a row that is not finite reaches only the keys it sees.

    One of the two at a time, since both with what reaches them are more than sm_100's tensor memory holds.
    """
    STEP: tl.constexpr = CONTAIN if BLOCK_M > CONTAIN else BLOCK_M
    total = tl.zeros([BLOCK_N, BLOCK_DV if OF_V else BLOCK_D], tl.float32)
    reached = tl.zeros([BLOCK_N, BLOCK_DV if OF_V else BLOCK_D], tl.float32)
    j = j0 + tl.arange(0, BLOCK_N)
    for g in range(group):
        h = h_kv * group + g
        start, count = row_tiles(rules, b, h, j0, first, stop, STEP)
        for t in tl.range(0, count, num_stages=1):
            i0, bits = row_tile(rules, start, t, STEP)
            rows, grad, weight, _, by_product, begin, end = _row_gradient(
                keys, values, q, lse, dout, delta, residual, lengths, rules, b, h, q_begin, i0, j0, bits,
                len_q, len_k, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, STEP, BLOCK_N, NATURAL, PRECISION,
                CHECK=True, HIDES=True,
            )  # fmt: skip
            i = i0 + tl.arange(0, STEP)
            seen = seen_by(
                rules, tl.zeros([BLOCK_N, STEP], tl.float32), b, h, i[None, :], j[:, None], begin[None, :],
                end[None, :], len_k - len_q, len_q, len_k, bits,
            )  # fmt: skip
            if OF_V:
                total = product(weight.to(grad.dtype), finite_or_zero(grad), total, PRECISION)
                reached = add_reached(reached, seen, grad)
            else:
                total = product(by_product.to(rows.dtype), finite_or_zero(rows), total, PRECISION)
                reached = add_reached(reached, seen, rows)
    return tl.where(reached > 0, float("nan"), total)


@triton.jit
def attention_bwd_dkdv(
    q, k, v, lse, dout, delta, residual, dk, dv, columns, lengths, rules, scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
    HIDES: tl.constexpr,
):  # fmt: skip
    """dV_j = sum over i of P_ij dO_i; dK_j = scale * sum over i of dS_ij q_i.

    columns: [B, Hq, Lk] of the sums of dS over rows, or None.
    """
    b, h_kv, group, j0, q_begin, k_begin, len_q, len_k = key_program(lengths, BLOCK_N)
    limit = len_k
    if lengths.cu_seqlens_k is None:
        limit = lengths.seqlen_k  # keys beyond an entry's length have gradients of 0
    if j0 >= limit:
        return
    n = tl.arange(0, BLOCK_N)
    keys = load_keys(k, lengths, b, h_kv, k_begin, j0, len_k, BLOCK_N, BLOCK_D, HEAD_DIM, True)
    values = load_keys(v, lengths, b, h_kv, k_begin, j0, len_k, BLOCK_N, BLOCK_DV, HEAD_DIM_V, True)
    lo, hi = band(rules.bounds, len_k - len_q)
    last = tl.minimum(j0 + BLOCK_N, len_k) - 1
    first = tl.maximum(j0 - hi, 0)
    stop = tl.where(j0 < len_k, tl.minimum(last - lo + 1, len_q), 0)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    for g in range(group):
        h = h_kv * group + g
        column = tl.zeros([BLOCK_N], tl.float32)
        start, count = row_tiles(rules, b, h, j0, first, stop, BLOCK_M)
        before = count
        skipped = 0
        if rules.blocks is None and rules.key_starts is None and rules.key_ends is None:
            end = start + count * BLOCK_M
            whole = tl.minimum(tl.cdiv(tl.maximum(j0 + BLOCK_N - 1 - hi, 0), BLOCK_M) * BLOCK_M, end)
            whole_end = tl.minimum(j0 - lo + 1, len_q) // BLOCK_M * BLOCK_M
            whole_end = tl.minimum(tl.maximum(whole_end, whole), end)
            whole_end = tl.where(j0 + BLOCK_N <= len_k, whole_end, whole)
            for i0 in range(whole, whole_end, BLOCK_M):
                acc_k, acc_v, column = _add_rows(
                    acc_k, acc_v, column, keys, values, q, lse, dout, delta, residual, lengths, rules, b, h,
                    q_begin, i0, j0, -1, len_q, len_k, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M,
                    BLOCK_N, NATURAL, PRECISION, CHECK=False, HIDES=HIDES,
                )  # fmt: skip
            before = (whole - start) // BLOCK_M
            skipped = (whole_end - whole) // BLOCK_M
        for t in range(count - skipped):
            i0, bits = row_tile(rules, start, tl.where(t < before, t, t + skipped), BLOCK_M)
            acc_k, acc_v, column = _add_rows(
                acc_k, acc_v, column, keys, values, q, lse, dout, delta, residual, lengths, rules, b, h,
                q_begin, i0, j0, bits, len_q, len_k, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M,
                BLOCK_N, NATURAL, PRECISION, CHECK=True, HIDES=True,
            )  # fmt: skip
        if columns is not None:
            tl.store(row_base(columns, b, h, j0) + n * columns.row, column, mask=j0 + n < limit)

    if not_finite(acc_v):
        acc_v = _contained(
            keys, values, q, lse, dout, delta, residual, lengths, rules, b, h_kv, group, q_begin, j0, first,
            stop, len_q, len_k, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, NATURAL, PRECISION,
            OF_V=True,
        )  # fmt: skip
    store_rows(row_base(dv, b, h_kv, k_begin + j0), dv.row, n, acc_v, BLOCK_DV, HEAD_DIM_V, limit - j0)
    if not_finite(acc_k):
        acc_k = _contained(
            keys, values, q, lse, dout, delta, residual, lengths, rules, b, h_kv, group, q_begin, j0, first,
            stop, len_q, len_k, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, NATURAL, PRECISION,
            OF_V=False,
        )  # fmt: skip
    store_rows(row_base(dk, b, h_kv, k_begin + j0), dk.row, n, acc_k * scale, BLOCK_D, HEAD_DIM, limit - j0)

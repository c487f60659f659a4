"""Gradients of statistics of the weights: attention's backward pass with dL/dp in the place of dO·v.

docs/kernels/summary.md derives it; csrc/cpu/weight_gradients.h is the same on the CPU.
"""

import triton
import triton.language as tl

from fastattn.backends.triton.gradient import load_lse, load_per_row
from fastattn.backends.triton.programs import key_program, row_program
from fastattn.backends.triton.tile import (
    LN2,
    apply,
    band,
    exp_of,
    key_range,
    key_tile,
    key_tiles,
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
def _loss_gradient(losses, log_p, lengths, b, h, i, j, len_q, len_k):
    """dL/dp of the pairs (i, j), whose ln p comes in; finite where they are hidden.

    losses: summary_host.Losses; i, j: positions within the lengths, [M, 1] and [1, N] or the other way round.
    """
    bh = (b * lengths.num_heads + h).to(tl.int64)
    gradient = tl.zeros_like(log_p)
    if losses.entropy is not None:
        # Below this a weight is 0: of a hidden key 0 * -inf must not become NaN.
        log_p = tl.maximum(log_p, -1000.0, propagate_nan=tl.PropagateNan.ALL)
        gradient -= tl.load(losses.entropy + bh * lengths.seqlen_q + i) * (log_p + 1)
    if losses.distance is not None:
        away = tl.abs(i + (len_k - len_q) - j).to(tl.float32)
        gradient += tl.load(losses.distance + bh * lengths.seqlen_q + i) * away
    if losses.received is not None:
        gradient += tl.load(losses.received + bh * lengths.seqlen_k + j)
    if losses.pooled is not None:
        row = i.to(tl.int64) * losses.grid_rows // len_q
        col = j.to(tl.int64) * losses.grid_cols // len_k
        gradient += tl.load(losses.pooled + (bh * losses.grid_rows + row) * losses.grid_cols + col)
    return gradient


@triton.jit
def summary_bwd_rows(
    q, k, lse, losses, mean, residual, sinks, lengths, rules,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """residual = log(sum of exp(s - lse)), which is 0 but for rounding; mean = sum over keys of p dL/dp."""
    b, h, h_kv, i0, q_begin, k_begin, len_q, len_k = row_program(lengths, BLOCK_M)
    r = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    i = tl.minimum(i0 + r, len_q - 1)
    begin, end = key_range(rules, b, i, len_q, len_k)
    rows = load_rows(row_base(q, b, h, q_begin + i0), q.row, r, BLOCK_D, HEAD_DIM, len_q - i0, True)
    row_lse = load_lse(lse, b, h, q_begin, i, NATURAL)
    seen = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    start, count = key_tiles(rules, b, h, i0, tl.min(begin), tl.max(end), BLOCK_N)
    for t in range(count):
        j0, bits = key_tile(rules, start, t, BLOCK_N)
        keys = load_keys(k, lengths, b, h_kv, k_begin, j0, len_k, BLOCK_N, BLOCK_D, HEAD_DIM, True)
        s = product(rows, tl.trans(keys), None, PRECISION)
        s, _ = apply(
            rules, s, b, h, i[:, None], (j0 + n)[None, :], begin[:, None], end[:, None], len_k - len_q, len_q,
            len_k, bits, True,
        )  # fmt: skip
        log_e = s - row_lse[:, None]
        e = exp_of(log_e, NATURAL)
        log_e = log_e if NATURAL else log_e * LN2
        j = tl.minimum(j0 + n, len_k - 1)[None, :]
        gradient = _loss_gradient(losses, log_e, lengths, b, h, i[:, None], j, len_q, len_k)
        seen += tl.sum(e, 1)
        weighted += tl.sum(tl.where(s == float("-inf"), 0.0, e * gradient), 1)
    total = seen
    if sinks is not None:
        total += exp_of(tl.load(sinks + h) - row_lse, NATURAL)
    total = tl.where(total == 0, 1.0, total)
    if losses.entropy is not None:  # ln p = ln e - ln total
        at = (b * lengths.num_heads + h).to(tl.int64) * lengths.seqlen_q + i
        weighted += tl.load(losses.entropy + at) * tl.log(total) * seen
    inside = r < len_q - i0
    tl.store(row_base(mean, b, h, q_begin + i0) + r * mean.row, weighted / total, mask=inside)
    rest = tl.log(total) if NATURAL else tl.log2(total)
    tl.store(row_base(residual, b, h, q_begin + i0) + r * residual.row, rest, mask=inside)


@triton.jit
def _score_gradient(
    s, lse, residual, mean, dlse, losses, lengths, rules, b, h, q_begin, i, j, begin, end, len_q, len_k, bits,
    NATURAL: tl.constexpr,
):  # fmt: skip
    """(which pairs are seen, the gradient by scale * q·k) from s = q·k; i, begin and end in rows' shape."""
    row_lse = load_lse(lse, b, h, q_begin, i, NATURAL)
    row_residual = load_per_row(residual, b, h, q_begin, i)
    s, slope = apply(rules, s, b, h, i, j, begin, end, len_k - len_q, len_q, len_k, bits, True)
    log_p = (s - row_lse) - row_residual
    p = exp_of(log_p, NATURAL)
    log_p = log_p if NATURAL else log_p * LN2
    gradient = _loss_gradient(losses, log_p, lengths, b, h, i, tl.minimum(j, len_k - 1), len_q, len_k)
    # The mean goes before the gradient of lse comes: where one key has all the weight this is exactly 0.
    gradient -= load_per_row(mean, b, h, q_begin, i)
    ds = p * (gradient + load_per_row(dlse, b, h, q_begin, i)) * slope
    seen = s != float("-inf")
    return seen, tl.where(seen, ds, 0.0)


@triton.jit
def _add_product(acc, ds, seen, rows, PRECISION: tl.constexpr):
    """acc + ds @ rows; a row that is not finite reaches only what sees it."""
    finite = rows - rows == 0
    acc = product(ds.to(rows.dtype), tl.where(finite, rows, 0.0), acc, PRECISION)
    if not_finite(rows):
        acc = tl.where(tl.dot(seen.to(tl.float16), (finite == 0).to(tl.float16)) > 0, float("nan"), acc)
    return acc


@triton.jit
def summary_bwd_dq(
    q, k, lse, losses, mean, dlse, residual, dq, lengths, rules, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ_i = scale * sum over j of dS_ij k_j."""
    b, h, h_kv, i0, q_begin, k_begin, len_q, len_k = row_program(lengths, BLOCK_M)
    r = tl.arange(0, BLOCK_M)
    i = tl.minimum(i0 + r, len_q - 1)
    begin, end = key_range(rules, b, i, len_q, len_k)
    rows = load_rows(row_base(q, b, h, q_begin + i0), q.row, r, BLOCK_D, HEAD_DIM, len_q - i0, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    start, count = key_tiles(rules, b, h, i0, tl.min(begin), tl.max(end), BLOCK_N)
    for t in range(count):
        j0, bits = key_tile(rules, start, t, BLOCK_N)
        keys = load_keys(k, lengths, b, h_kv, k_begin, j0, len_k, BLOCK_N, BLOCK_D, HEAD_DIM, True)
        s = product(rows, tl.trans(keys), None, PRECISION)
        seen, ds = _score_gradient(
            s, lse, residual, mean, dlse, losses, lengths, rules, b, h, q_begin, i[:, None],
            (j0 + tl.arange(0, BLOCK_N))[None, :], begin[:, None], end[:, None], len_q, len_k, bits, NATURAL,
        )  # fmt: skip
        acc = _add_product(acc, ds, seen, keys, PRECISION)
    store_rows(row_base(dq, b, h, q_begin + i0), dq.row, r, acc * scale, BLOCK_D, HEAD_DIM, len_q - i0)


@triton.jit
def summary_bwd_dk(
    q, k, lse, losses, mean, dlse, residual, dk, lengths, rules, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK_j = scale * sum over i of dS_ij q_i, on transposed tiles."""
    b, h_kv, group, j0, q_begin, k_begin, len_q, len_k = key_program(lengths, BLOCK_N)
    n = tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_M)
    keys = load_keys(k, lengths, b, h_kv, k_begin, j0, len_k, BLOCK_N, BLOCK_D, HEAD_DIM, True)
    lo, hi = band(rules.bounds, len_k - len_q)
    first = tl.maximum(j0 - hi, 0)
    stop = tl.minimum(tl.minimum(j0 + BLOCK_N, len_k) - lo, len_q)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for g in range(group):
        h = h_kv * group + g
        start, count = row_tiles(rules, b, h, j0, first, stop, BLOCK_M)
        for t in range(count):
            i0, bits = row_tile(rules, start, t, BLOCK_M)
            i = tl.minimum(i0 + r, len_q - 1)
            begin, end = key_range(rules, b, i, len_q, len_k)
            end = tl.where(i0 + r < len_q, end, 0)
            rows = load_rows(row_base(q, b, h, q_begin + i0), q.row, r, BLOCK_D, HEAD_DIM, len_q - i0, True)
            s = product(keys, tl.trans(rows), None, PRECISION)
            seen, ds = _score_gradient(
                s, lse, residual, mean, dlse, losses, lengths, rules, b, h, q_begin, i[None, :],
                (j0 + n)[:, None], begin[None, :], end[None, :], len_q, len_k, bits, NATURAL,
            )  # fmt: skip
            acc = _add_product(acc, ds, seen, rows, PRECISION)
    store_rows(row_base(dk, b, h_kv, k_begin + j0), dk.row, n, acc * scale, BLOCK_D, HEAD_DIM, len_k - j0)

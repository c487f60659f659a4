"""The gradient of one tile of scores, which every backward kernel makes anew from q, k and lse."""

import triton
import triton.language as tl

from fastattn.backends.triton.tile import LOG2E, apply, exp_of, kept, load_keys, load_rows, product, row_base

# Up to here a float32 holds lse to 4e-6, which is what P then errs by.
LARGE_LSE = tl.constexpr(64.0)


@triton.jit
def load_per_row(t, b, h, first, i):
    """One number for each row: Rows of [B, H, L] at first + i."""
    return tl.load(row_base(t, b, h, first) + i * t.row)


@triton.jit
def load_lse(lse, b, h, first, i, NATURAL: tl.constexpr):
    """lse in the unit of the scores, 0 for a row that sees nothing."""
    x = load_per_row(lse, b, h, first, i)
    x = tl.where(x == float("-inf"), 0.0, x)
    return x if NATURAL else x * LOG2E


@triton.jit
def load_large_lse(lse, b, h, first, i, NATURAL: tl.constexpr):
    """(lse in the unit of the scores, whether it is so large that rounding took from P)."""
    x = load_per_row(lse, b, h, first, i)
    return load_lse(lse, b, h, first, i, NATURAL), (tl.abs(x) >= LARGE_LSE) & (x - x == 0)


@triton.jit
def store_delta(
    out, dout, dlse, delta, b, h, q_begin, i0, i, len_q,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = dO·out - dlse of the rows of a tile."""
    r = tl.arange(0, BLOCK_M)
    o = load_rows(row_base(out, b, h, q_begin + i0), out.row, r, BLOCK_DV, HEAD_DIM_V, len_q - i0, True)
    do = load_rows(row_base(dout, b, h, q_begin + i0), dout.row, r, BLOCK_DV, HEAD_DIM_V, len_q - i0, True)
    dots = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if dlse is not None:
        dots -= load_per_row(dlse, b, h, q_begin, i)
    tl.store(row_base(delta, b, h, q_begin + i0) + r * delta.row, dots, mask=r < len_q - i0)


@triton.jit
def sink_total(sinks, row_lse, h, BLOCK_M: tl.constexpr, NATURAL: tl.constexpr):
    """What the sink adds to the sum of exp(s - lse) of each row."""
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:
        total += exp_of(tl.load(sinks + h) - row_lse, NATURAL)
    return total


@triton.jit
def tile_total(
    rules, s, row_lse, b, h, i, j0, begin, end, len_q, len_k, bits,
    BLOCK_N: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """What a tile of scores, their rules not yet applied, adds to it."""
    j = (j0 + tl.arange(0, BLOCK_N))[None, :]
    s, _ = apply(
        rules, s, b, h, i[:, None], j, begin[:, None], end[:, None], len_k - len_q, len_q, len_k, bits, True
    )
    return tl.sum(exp_of(s - row_lse[:, None], NATURAL), 1)


@triton.jit
def score_gradient(
    rules, s, dp, lse, residual, delta, keep, b, h, i, j, begin, end, offset, len_q, len_k, bits,
    NATURAL: tl.constexpr, CHECK: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """(what multiplies dO in dV, dS, the gradient by scale * q·k) from s = q·k and dp = dO·v.

    Args:
        lse, residual, delta: of the rows, in the shape of i.
        keep: 1 where dropout keeps a pair, else 0; not read without dropout.
        HIDES: whether a pair may be hidden: then nothing that is not finite may leave it.
    """
    s, slope = apply(rules, s, b, h, i, j, begin, end, offset, len_q, len_k, bits, CHECK)
    p = exp_of((s - lse) - residual, NATURAL)
    if HIDES:
        p = tl.where(s == float("-inf"), 0.0, p)
    weight = p
    if rules.dropout is not None:
        weight = p * (keep * rules.dropout.scale)
        dp *= keep * rules.dropout.scale
    ds = p * (dp - delta)
    by_product = ds * slope
    if HIDES:
        ds = tl.where(s == float("-inf"), 0.0, ds)
        by_product = tl.where(s == float("-inf"), 0.0, by_product)
    return weight, ds, by_product


@triton.jit
def seen_by(rules, zeros, b, h, i, j, begin, end, offset, len_q, len_k, bits):
    """1 for the visible pairs of a tile of zeros, whatever q and k hold, else 0: an operand of a product."""
    s, _ = apply(rules, zeros, b, h, i, j, begin, end, offset, len_q, len_k, bits, True)
    return (s != float("-inf")).to(tl.float16)


@triton.jit
def row_tile_inputs(
    q, dout, lse, residual, delta, b, h, q_begin, i0, len_q,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """(i, q, dO, lse, residual, delta) of the rows of a tile; rows beyond the last repeat it, as zeros."""
    r = tl.arange(0, BLOCK_M)
    i = tl.minimum(i0 + r, len_q - 1)
    rows = load_rows(row_base(q, b, h, q_begin + i0), q.row, r, BLOCK_D, HEAD_DIM, len_q - i0, True)
    grad = load_rows(row_base(dout, b, h, q_begin + i0), dout.row, r, BLOCK_DV, HEAD_DIM_V, len_q - i0, True)
    return (
        i, rows, grad, load_lse(lse, b, h, q_begin, i, NATURAL),
        load_per_row(residual, b, h, q_begin, i), load_per_row(delta, b, h, q_begin, i),
    )  # fmt: skip


@triton.jit
def tile_gradient(
    rows, grad, row_lse, row_residual, row_delta, k, v, lengths, rules, b, h, h_kv, k_begin, i0, i, j0, bits,
    begin, end, offset, len_q, len_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
    CHECK: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """(keys, dS, the gradient by scale * q·k) of rows i with keys j0 to j0 + BLOCK_N - 1."""
    keys = load_keys(k, lengths, b, h_kv, k_begin, j0, len_k, BLOCK_N, BLOCK_D, HEAD_DIM, CHECK)
    values = load_keys(v, lengths, b, h_kv, k_begin, j0, len_k, BLOCK_N, BLOCK_DV, HEAD_DIM_V, CHECK)
    s = product(rows, tl.trans(keys), None, PRECISION)
    dp = product(grad, tl.trans(values), None, PRECISION)
    keep = True
    if rules.dropout is not None:
        keep = kept(rules.dropout, b, h, lengths.num_heads, i0, j0, BLOCK_M, BLOCK_N)
    j = (j0 + tl.arange(0, BLOCK_N))[None, :]
    _, ds, by_product = score_gradient(
        rules, s, dp, row_lse[:, None], row_residual[:, None], row_delta[:, None], keep, b, h, i[:, None], j,
        begin[:, None], end[:, None], offset, len_q, len_k, bits, NATURAL, CHECK, HIDES,
    )  # fmt: skip
    return keys, ds, by_product

"""The forward pass: a program walks the key tiles of one tile of rows and one head.

Tiles that every row sees whole come first, without any check; then those at the edges of what is seen. A
block mask's tiles are walked as its lists name them. docs/kernels/triton.md has the derivation.
"""

import triton
import triton.language as tl

from fastattn.backends.triton.programs import row_program, whole_tiles
from fastattn.backends.triton.tile import (
    CONTAIN,
    add_reached,
    apply,
    exp_of,
    finite_or_zero,
    kept,
    key_range,
    key_tile,
    key_tiles,
    load_keys,
    load_rows,
    load_tile,
    not_finite,
    product,
    row_base,
    store_result,
    store_rows,
)


@triton.jit
def _attend(
    acc, m, l, q, k, v, k_tiles, v_tiles, lengths, rules, b, h, h_kv, k_begin, i0, i, j0, bits, begin, end,
    offset, len_q, len_k, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV:
    tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NATURAL: tl.constexpr, PRECISION:
    tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running (sum of exp(s - m) v, maximum m, sum of exp(s - m)).

    k_tiles, v_tiles: descriptors for tiles that are whole, or None.
    """
    if k_tiles is not None and not CHECK:
        keys = load_tile(k_tiles, lengths, b, h_kv, k_begin + j0, BLOCK_N, BLOCK_D)
    else:
        keys = load_keys(k, lengths, b, h_kv, k_begin, j0, len_k, BLOCK_N, BLOCK_D, HEAD_DIM, CHECK)
    s = product(q, tl.trans(keys), None, PRECISION)
    j = (j0 + tl.arange(0, BLOCK_N))[None, :]
    s, _ = apply(
        rules, s, b, h, i[:, None], j, begin[:, None], end[:, None], offset, len_q, len_k, bits, CHECK
    )
    m_new = tl.maximum(m, tl.max(s, 1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # of a row that has seen nothing yet
    p = exp_of(s - m_safe[:, None], NATURAL)
    rescale = exp_of(m - m_safe, NATURAL)
    l = l * rescale + tl.sum(p, 1)
    if rules.dropout is not None:
        p *= kept(rules.dropout, b, h, lengths.num_heads, i0, j0, BLOCK_M, BLOCK_N)
    if v_tiles is not None and not CHECK:
        values = load_tile(v_tiles, lengths, b, h_kv, k_begin + j0, BLOCK_N, BLOCK_DV)
    else:
        values = load_keys(v, lengths, b, h_kv, k_begin, j0, len_k, BLOCK_N, BLOCK_DV, HEAD_DIM_V, CHECK)
    acc = product(p.to(values.dtype), values, acc * rescale[:, None], PRECISION)
    return acc, m_new, l


@triton.jit
def _contain(
    acc, reached, m, q, k, v, lengths, rules, b, h, h_kv, k_begin, i0, i, j0, bits, begin, end, offset, len_q,
    len_k, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """_attend for a known maximum, without the values that are not finite; what these reach is added up."""
    keys = load_keys(k, lengths, b, h_kv, k_begin, j0, len_k, BLOCK_N, BLOCK_D, HEAD_DIM, True)
    s = product(q, tl.trans(keys), None, PRECISION)
    j = (j0 + tl.arange(0, BLOCK_N))[None, :]
    s, _ = apply(
        rules, s, b, h, i[:, None], j, begin[:, None], end[:, None], offset, len_q, len_k, bits, True
    )
    seen, _ = apply(
        rules, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), b, h, i[:, None], j, begin[:, None], end[:, None],
        offset, len_q, len_k, bits, True,
    )  # fmt: skip
    m_safe = tl.where(m == float("-inf"), 0.0, m)
    p = exp_of(s - m_safe[:, None], NATURAL)
    if rules.dropout is not None:
        p *= kept(rules.dropout, b, h, lengths.num_heads, i0, j0, BLOCK_M, BLOCK_N)
    values = load_keys(v, lengths, b, h_kv, k_begin, j0, len_k, BLOCK_N, BLOCK_DV, HEAD_DIM_V, True)
    acc = product(p.to(values.dtype), finite_or_zero(values), acc, PRECISION)
    return acc, add_reached(reached, seen != float("-inf"), values)


@triton.jit
def attention_fwd(
    q, k, v, out, lse, sinks, lengths, rules, k_tiles, v_tiles, parts,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and, unless it is None, lse of one row tile of one head; see arguments.py for what comes in.

    With parts, what the keys of part program_id(1) alone give, for attention_combine.
    """
    b, h, h_kv, i0, q_begin, k_begin, len_q, len_k = row_program(lengths, BLOCK_M)
    if i0 >= len_q:
        return
    offset = len_k - len_q
    r = tl.arange(0, BLOCK_M)
    i = tl.minimum(i0 + r, len_q - 1)
    begin, end = key_range(rules, b, i, len_q, len_k)
    if parts is not None:  # as many whole tiles each, of the keys that the entry has
        length = tl.cdiv(tl.cdiv(len_k, parts.num_parts), BLOCK_N) * BLOCK_N
        begin = tl.maximum(begin, tl.program_id(1) * length)
        end = tl.minimum(end, (tl.program_id(1) + 1) * length)
    rows = load_rows(row_base(q, b, h, q_begin + i0), q.row, r, BLOCK_D, HEAD_DIM, len_q - i0, True)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:  # one more logit, which carries no value
        m = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + h)
        if parts is not None:  # in one part of them
            m = tl.where(tl.program_id(1) == 0, m, float("-inf"))
        l = tl.where(m == float("-inf"), 0.0, 1.0)

    start, count = key_tiles(rules, b, h, i0, tl.min(begin), tl.max(end), BLOCK_N)
    before = count
    skipped = 0
    if rules.blocks is None:
        whole, whole_end = whole_tiles(begin, end, start, count, BLOCK_N)
        for j0 in range(whole, whole_end, BLOCK_N):
            acc, m, l = _attend(
                acc, m, l, rows, k, v, k_tiles, v_tiles, lengths, rules, b, h, h_kv, k_begin, i0, i, j0, -1,
                begin, end, offset, len_q, len_k, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
                NATURAL, PRECISION, CHECK=False,
            )  # fmt: skip
        before = (whole - start) // BLOCK_N
        skipped = (whole_end - whole) // BLOCK_N
    for t in range(count - skipped):
        j0, bits = key_tile(rules, start, tl.where(t < before, t, t + skipped), BLOCK_N)
        acc, m, l = _attend(
            acc, m, l, rows, k, v, None, None, lengths, rules, b, h, h_kv, k_begin, i0, i, j0, bits, begin,
            end, offset, len_q, len_k, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, NATURAL,
            PRECISION, CHECK=True,
        )  # fmt: skip

    if not_finite(acc):  # once more: a value that is not finite reaches only the rows that see it
        STEP: tl.constexpr = CONTAIN if BLOCK_N > CONTAIN else BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        reached = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        start, count = key_tiles(rules, b, h, i0, tl.min(begin), tl.max(end), STEP)
        for t in tl.range(0, count, num_stages=1):
            j0, bits = key_tile(rules, start, t, STEP)
            acc, reached = _contain(
                acc, reached, m, rows, k, v, lengths, rules, b, h, h_kv, k_begin, i0, i, j0, bits, begin, end,
                offset, len_q, len_k, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, STEP, NATURAL,
                PRECISION,
            )  # fmt: skip
        acc = tl.where(reached > 0, float("nan"), acc)

    if parts is not None:
        inside = r < len_q - i0
        part = tl.program_id(1).to(tl.int64)
        base = row_base(parts.out, b, h, q_begin + i0) + part * parts.out_stride
        store_rows(base, parts.out.row, r, acc, BLOCK_DV, HEAD_DIM_V, len_q - i0)
        at = part * parts.row_stride + r * parts.m.row
        tl.store(row_base(parts.m, b, h, q_begin + i0) + at, m, mask=inside)
        tl.store(row_base(parts.l, b, h, q_begin + i0) + at, l, mask=inside)
    else:
        store_result(
            out, lse, rules, b, h, q_begin + i0, r, acc, m, l, len_q - i0, BLOCK_DV, HEAD_DIM_V, NATURAL
        )

"""What programs for parts of the keys found, put together: the last step of a forward pass that was split."""

import triton
import triton.language as tl

from fastattn.backends.triton.programs import row_program
from fastattn.backends.triton.tile import exp_of, row_base, store_result


@triton.jit
def attention_combine(
    out, lse, parts, lengths, rules,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NATURAL: tl.constexpr,
):  # fmt: skip
    """out = sum of exp(m_s - m) acc_s / sum of exp(m_s - m) l_s over the parts s, and lse unless it is None.

    A program has one row: BLOCK_M is 1, and BLOCK_N is at least the number of parts.
    """
    b, h, _, i, q_begin, _, len_q, _ = row_program(lengths, BLOCK_M)
    if i >= len_q:
        return
    s = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_DV)
    there = s < parts.num_parts
    per_row = s.to(tl.int64) * parts.row_stride
    m_part = tl.load(row_base(parts.m, b, h, q_begin + i) + per_row, mask=there, other=float("-inf"))
    l_part = tl.load(row_base(parts.l, b, h, q_begin + i) + per_row, mask=there, other=0.0)
    at = row_base(parts.out, b, h, q_begin + i) + s[:, None].to(tl.int64) * parts.out_stride + d[None, :]
    acc = tl.load(at, mask=there[:, None] & (d < HEAD_DIM_V)[None, :], other=0.0)

    m = tl.max(m_part, 0)
    weight = exp_of(m_part - tl.where(m == float("-inf"), 0.0, m), NATURAL)
    r = tl.arange(0, BLOCK_M)
    total = tl.sum(weight[:, None] * acc, 0)[None, :]
    store_result(
        out, lse, rules, b, h, q_begin + i, r, total, m + tl.zeros([BLOCK_M], tl.float32),
        tl.sum(weight * l_part, 0) + tl.zeros([BLOCK_M], tl.float32), 1, BLOCK_DV, HEAD_DIM_V, NATURAL,
    )  # fmt: skip

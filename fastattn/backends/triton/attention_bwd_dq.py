"""dQ: a program walks the key tiles of one tile of rows and one head, as the forward pass does."""

import triton
import triton.language as tl

from fastattn.backends.triton.gradient import row_tile_inputs, seen_by, tile_gradient
from fastattn.backends.triton.programs import row_program, whole_tiles
from fastattn.backends.triton.tile import (
    CONTAIN,
    add_reached,
    finite_or_zero,
    key_range,
    key_tile,
    key_tiles,
    not_finite,
    product,
    row_base,
    store_rows,
)


@triton.jit
def attention_bwd_dq(
    q, k, v, lse, dout, delta, residual, dq, lengths, rules, scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
    HIDES: tl.constexpr,
):  # fmt: skip
    """dQ_i = scale * sum over j of dS_ij k_j."""
    b, h, h_kv, i0, q_begin, k_begin, len_q, len_k = row_program(lengths, BLOCK_M)
    if i0 >= len_q:
        return
    offset = len_k - len_q
    i, rows, grad, row_lse, row_residual, row_delta = row_tile_inputs(
        q, dout, lse, residual, delta, b, h, q_begin, i0, len_q, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
        BLOCK_M, NATURAL,
    )  # fmt: skip
    begin, end = key_range(rules, b, i, len_q, len_k)
    start, count = key_tiles(rules, b, h, i0, tl.min(begin), tl.max(end), BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    before = count
    skipped = 0
    if rules.blocks is None:
        whole, whole_end = whole_tiles(begin, end, start, count, BLOCK_N)
        for j0 in range(whole, whole_end, BLOCK_N):
            keys, _, ds = tile_gradient(
                rows, grad, row_lse, row_residual, row_delta, k, v, lengths, rules, b, h,
                h_kv, k_begin, i0, i, j0, -1, begin, end, offset, len_q, len_k, HEAD_DIM,
                HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, NATURAL, PRECISION,
                CHECK=False, HIDES=HIDES,
            )  # fmt: skip
            acc = product(ds.to(keys.dtype), keys, acc, PRECISION)
        before = (whole - start) // BLOCK_N
        skipped = (whole_end - whole) // BLOCK_N
    for t in range(count - skipped):
        j0, bits = key_tile(rules, start, tl.where(t < before, t, t + skipped), BLOCK_N)
        keys, _, ds = tile_gradient(
            rows, grad, row_lse, row_residual, row_delta, k, v, lengths, rules, b, h, h_kv,
            k_begin, i0, i, j0, bits, begin, end, offset, len_q, len_k, HEAD_DIM, HEAD_DIM_V,
            BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, NATURAL, PRECISION, CHECK=True, HIDES=True,
        )  # fmt: skip
        acc = product(ds.to(keys.dtype), keys, acc, PRECISION)

    if not_finite(acc):  # once more: a key that is not finite reaches only the rows that see it
        STEP: tl.constexpr = CONTAIN if BLOCK_N > CONTAIN else BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        reached = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        start, count = key_tiles(rules, b, h, i0, tl.min(begin), tl.max(end), STEP)
        for t in tl.range(0, count, num_stages=1):
            j0, bits = key_tile(rules, start, t, STEP)
            keys, _, ds = tile_gradient(
                rows, grad, row_lse, row_residual, row_delta, k, v, lengths, rules, b, h,
                h_kv, k_begin, i0, i, j0, bits, begin, end, offset, len_q, len_k, HEAD_DIM,
                HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, STEP, NATURAL, PRECISION,
                CHECK=True, HIDES=True,
            )  # fmt: skip
            j = (j0 + tl.arange(0, STEP))[None, :]
            seen = seen_by(
                rules, tl.zeros([BLOCK_M, STEP], tl.float32), b, h, i[:, None], j, begin[:, None],
                end[:, None], offset, len_q, len_k, bits,
            )  # fmt: skip
            acc = product(ds.to(keys.dtype), finite_or_zero(keys), acc, PRECISION)
            reached = add_reached(reached, seen, keys)
        acc = tl.where(reached > 0, float("nan"), acc)
    r = tl.arange(0, BLOCK_M)
    store_rows(row_base(dq, b, h, q_begin + i0), dq.row, r, acc * scale, BLOCK_D, HEAD_DIM, len_q - i0)

"""One tile of scores, from q·k to what softmax reads: what all kernels share.

Indices i of rows and j of keys come as [M, 1] and [1, N], or the other way round where a kernel works on the
transposed tile: nothing here minds. A new kind of mask or bias is added here, and in no kernel.
"""

import triton
import triton.language as tl

TILE = tl.constexpr(64)  # of a block mask
# Keys, or rows, at a time in the loops for what is not finite: larger tiles there take registers from the
# loops that are always walked, of which the compiler spills.
CONTAIN = tl.constexpr(32)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(2**30)  # beyond any position
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """a @ b, added to acc unless that is None, in float32."""
    if INTERPRETED:
        # It would multiply the bits of bfloat16 as integers, and add up in an order that depends on the
        # shape, where tensor cores have one: S of the backward pass must be S of the forward pass.
        exact = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
        return exact if acc is None else acc + exact
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def sequence(lengths, b):
    """(first row of q, first row of k, len_q, len_k) of a batch entry, kept within what there is."""
    q_begin = b * 0
    k_begin = b * 0
    len_q = q_begin + lengths.seqlen_q
    len_k = k_begin + lengths.seqlen_k
    if lengths.cu_seqlens_q is not None:
        q_begin = tl.minimum(tl.maximum(tl.load(lengths.cu_seqlens_q + b), 0), lengths.total_q)
        k_begin = tl.minimum(tl.maximum(tl.load(lengths.cu_seqlens_k + b), 0), lengths.total_k)
        q_end = tl.minimum(tl.load(lengths.cu_seqlens_q + b + 1), lengths.total_q)
        k_end = tl.minimum(tl.load(lengths.cu_seqlens_k + b + 1), lengths.total_k)
        len_q = tl.maximum(tl.minimum(q_end - q_begin, len_q), 0)
        len_k = tl.maximum(tl.minimum(k_end - k_begin, len_k), 0)
    if lengths.seqlens_k is not None:
        len_k = tl.maximum(tl.minimum(tl.load(lengths.seqlens_k + b), len_k), 0)
    return q_begin, k_begin, len_q, len_k


@triton.jit
def row_base(t, b, h, row):
    """The address of a row of Rows."""
    return t.ptr + b.to(tl.int64) * t.batch + h.to(tl.int64) * t.head + row.to(tl.int64) * t.row


@triton.jit
def load_rows(base, row_stride, r, BLOCK: tl.constexpr, WIDTH: tl.constexpr, limit, CHECK: tl.constexpr):
    """Rows base + r * row_stride, [len(r), BLOCK]: 0 beyond WIDTH columns and, if CHECK, from limit on."""
    d = tl.arange(0, BLOCK)
    at = base + r[:, None].to(tl.int64) * row_stride + d[None, :]
    if CHECK and WIDTH != BLOCK:
        return tl.load(at, mask=(r < limit)[:, None] & (d < WIDTH)[None, :], other=0.0)
    elif CHECK:
        return tl.load(at, mask=(r < limit)[:, None], other=0.0)
    elif WIDTH != BLOCK:
        return tl.load(at, mask=(d < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_rows(base, row_stride, r, x, BLOCK: tl.constexpr, WIDTH: tl.constexpr, limit):
    """The inverse of load_rows, in the dtype of what it points to."""
    d = tl.arange(0, BLOCK)
    inside = (r < limit)[:, None] & (d < WIDTH)[None, :]
    at = base + r[:, None].to(tl.int64) * row_stride + d[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def store_result(
    out, lse, rules, b, h, row, r, acc, m, l, limit,
    BLOCK_DV: tl.constexpr, HEAD_DIM_V: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """acc / l, and m + log l unless lse is None, in rows `row` + r of out and lse, of which `limit` exist."""
    factor = 1.0
    if rules.dropout is not None:
        factor = rules.dropout.scale
    result = acc * (factor / tl.where(l == 0, 1.0, l))[:, None]
    store_rows(row_base(out, b, h, row), out.row, r, result, BLOCK_DV, HEAD_DIM_V, limit)
    if lse is not None:
        log_sum = tl.where(l == 0, float("-inf"), (m if NATURAL else m * LN2) + tl.log(l))
        tl.store(row_base(lse, b, h, row) + r * lse.row, log_sum, mask=r < limit)


@triton.jit
def load_keys(
    t, lengths, b, h, k_begin, j0, len_k,
    BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Rows j0 to j0 + BLOCK_N - 1 of keys or values, wherever their pages lie."""
    r = tl.arange(0, BLOCK_N)
    if lengths.block_table is None:
        return load_rows(row_base(t, b, h, k_begin + j0), t.row, r, BLOCK, WIDTH, len_k - j0, CHECK)
    else:
        j = tl.minimum(j0 + r, len_k - 1)
        page = tl.load(lengths.block_table + b.to(tl.int64) * lengths.table_row + j // lengths.page_size)
        page = tl.minimum(tl.maximum(page, 0), lengths.num_pages - 1)
        at = page.to(tl.int64) * t.batch + (j % lengths.page_size) * t.row
        d = tl.arange(0, BLOCK)
        inside = (j0 + r < len_k)[:, None] & (d < WIDTH)[None, :]
        return tl.load(t.ptr + h.to(tl.int64) * t.head + at[:, None] + d[None, :], mask=inside, other=0.0)


@triton.jit
def load_tile(tiles, lengths, b, h, row, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr):
    """Rows row to row + BLOCK_N - 1 by a descriptor of [batch, heads, rows, columns]; 0 beyond its ends."""
    if lengths.cu_seqlens_k is not None:
        b = b * 0  # packed tensors are one entry
    return tl.reshape(tiles.load([b, h, row, 0]), [BLOCK_N, BLOCK])


@triton.jit
def band(bounds, offset):
    """(lo, hi) with i + lo <= j <= i + hi."""
    lo = offset * 0 - FAR
    hi = offset * 0 + FAR
    if bounds.lo_top is not None:
        lo = tl.maximum(lo, bounds.lo_top)
    if bounds.hi_top is not None:
        hi = tl.minimum(hi, bounds.hi_top)
    if bounds.lo_bottom is not None:
        lo = tl.maximum(lo, bounds.lo_bottom + offset)
    if bounds.hi_bottom is not None:
        hi = tl.minimum(hi, bounds.hi_bottom + offset)
    return lo, hi


@triton.jit
def key_range(rules, b, i, len_q, len_k):
    """The keys [begin, end) that band, lengths and key ranges leave to each row i."""
    lo, hi = band(rules.bounds, len_k - len_q)
    begin = tl.maximum(i + lo, 0)
    end = tl.minimum(i + hi + 1, len_k)
    if rules.key_starts is not None:
        starts = rules.key_starts
        begin = tl.maximum(begin, tl.load(starts.ptr + b * starts.batch + i * starts.row))
    if rules.key_ends is not None:
        ends = rules.key_ends
        end = tl.minimum(end, tl.load(ends.ptr + b * ends.batch + i * ends.row))
    return tl.minimum(begin, len_k), tl.maximum(end, 0)


@triton.jit
def key_tiles(rules, b, h, i0, first, stop, BLOCK_N: tl.constexpr):
    """(start, count) of the tiles, for key_tile to name, that hold all keys of [first, stop) that rows i0 and
    those after it may see. Those of a block mask are taken in tiles as large or smaller."""
    if rules.blocks is None:
        start = first // BLOCK_N * BLOCK_N
        return start, tl.maximum(tl.cdiv(stop - start, BLOCK_N), 0)
    else:
        at = rules.blocks.row_ptr + b * rules.blocks.row_batch + h * rules.blocks.row_head + i0 // TILE
        start = tl.load(at)
        return start, (tl.load(at + 1) - start) * (TILE // BLOCK_N)


@triton.jit
def key_tile(rules, start, t, BLOCK_N: tl.constexpr):
    """(first key, index of the block mask's bits or -1) of the t-th tile."""
    if rules.blocks is None:
        return start + t * BLOCK_N, -1
    else:
        whole = t // (TILE // BLOCK_N)
        at = start + whole
        j0 = tl.load(rules.blocks.row_tiles + at) * TILE + t * BLOCK_N - whole * TILE
        return j0, tl.load(rules.blocks.row_bits + at)


@triton.jit
def row_tiles(rules, b, h, j0, first, stop, BLOCK_M: tl.constexpr):
    """key_tiles, of the rows [first, stop) that may see keys from j0 on."""
    if rules.blocks is None:
        start = first // BLOCK_M * BLOCK_M
        return start, tl.maximum(tl.cdiv(stop - start, BLOCK_M), 0)
    else:
        at = rules.blocks.col_ptr + b * rules.blocks.col_batch + h * rules.blocks.col_head + j0 // TILE
        start = tl.load(at)
        return start, (tl.load(at + 1) - start) * (TILE // BLOCK_M)


@triton.jit
def row_tile(rules, start, t, BLOCK_M: tl.constexpr):
    """(first row, index of the block mask's bits or -1) of the t-th tile."""
    if rules.blocks is None:
        return start + t * BLOCK_M, -1
    else:
        whole = t // (TILE // BLOCK_M)
        at = start + whole
        i0 = tl.load(rules.blocks.col_tiles + at) * TILE + t * BLOCK_M - whole * TILE
        return i0, tl.load(rules.blocks.col_bits + at)


@triton.jit
def tanh(x):
    """To a few units in the last place: the quotient loses those of a small x, which its series keeps."""
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    y = x * x
    small = y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835))))
    return tl.where(tl.abs(x) < 0.3, x + x * small, tl.where(x < 0, -large, large))


@triton.jit
def apply(rules, s, b, h, i, j, begin, end, offset, len_q, len_k, bits, CHECK: tl.constexpr):
    """From q·k to (score, its derivative by scale * q·k); -inf for a hidden pair.

    Without CHECK every pair of the tile lies within the lengths and between begin and end.
    """
    s = s * rules.scale
    slope = 1.0
    if rules.softcap is not None:
        t = tanh(s)
        s = t * rules.softcap
        slope = 1.0 - t * t
    if CHECK:  # addresses stay inside; what is read there in vain is hidden below
        row = tl.minimum(i, len_q - 1)
        col = tl.minimum(j, len_k - 1)
    else:
        row = i
        col = j
    if rules.bias is not None:
        bias = tl.load(pair_address(rules.bias, b, h, row, col)).to(tl.float32)
        s = tl.where(bias == float("-inf"), bias, s + bias)  # which hides a NaN too
    if rules.diag is not None:
        diag = rules.diag
        r = col - row - offset * diag.bottom_right - diag.first
        s += tl.load(diag.ptr + b.to(tl.int64) * diag.batch + h.to(tl.int64) * diag.head + r)
    if rules.mask is not None:
        s = tl.where(tl.load(pair_address(rules.mask, b, h, row, col)) != 0, s, float("-inf"))
    if rules.blocks is not None:
        # The two words of a row are read once for the row, not once for each pair.
        word = rules.blocks.bits + (tl.maximum(bits, 0) * TILE + row % TILE) * 2
        low = tl.load(word, mask=(row >= 0) & (bits >= 0), other=-1)
        high = tl.load(word + 1, mask=(row >= 0) & (bits >= 0), other=-1)
        seen = (tl.where(j % TILE < 32, low, high) >> (j % 32)) & 1
        s = tl.where(seen != 0, s, float("-inf"))
    if CHECK:
        s = tl.where((j >= begin) & (j < end), s, float("-inf"))
    return s, slope


@triton.jit
def pair_address(t, b, h, i, j):
    """The address of pairs (i, j) of Pairs."""
    base = t.ptr + b.to(tl.int64) * t.batch + h.to(tl.int64) * t.head
    return base + i.to(tl.int64) * t.row + j.to(tl.int64) * t.col


@triton.jit
def kept(dropout, b, h, num_heads, i0, j0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """1 where dropout keeps the pair (i0 + m, j0 + n), else 0: a factor, since a dropped NaN stays one.

    One Philox call makes the words of columns j, j + 16, j + 32 and j + 48 of 64.
    """
    seed = tl.load(dropout.seed)
    i = (i0 + tl.arange(0, BLOCK_M))[:, None]
    head = (b * num_heads + h).to(tl.uint32)
    if BLOCK_N % 64 == 0:
        n = tl.arange(0, BLOCK_N // 4)[None, :]
        counter = (j0 // 4 + n).to(tl.uint32) + tl.zeros([BLOCK_M, 1], tl.uint32)
        row = i.to(tl.uint32) + counter * 0
        w0, w1, w2, w3 = tl.philox(seed, counter, row, row * 0 + head, counter * 0)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [M, N / 4, 2, 2], the last index the faster bit
        words = tl.permute(tl.reshape(words, [BLOCK_M, BLOCK_N // 64, 16, 4]), [0, 1, 3, 2])
        words = tl.reshape(words, [BLOCK_M, BLOCK_N])
    else:
        j = (j0 + tl.arange(0, BLOCK_N))[None, :]
        counter = (16 * (j // 64) + j % 16).to(tl.uint32) + tl.zeros([BLOCK_M, 1], tl.uint32)
        row = i.to(tl.uint32) + counter * 0
        w0, w1, w2, w3 = tl.philox(seed, counter, row, row * 0 + head, counter * 0)
        lane = j // 16 % 4
        words = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    return (words >= dropout.threshold).to(tl.float32)


@triton.jit
def exp_of(x, NATURAL: tl.constexpr):
    """exp of a difference of scores in their unit."""
    if NATURAL:
        return tl.exp2(x * LOG2E)
    else:
        return tl.exp2(x)


@triton.jit
def is_finite(x):
    """Which elements are neither NaN nor infinite."""
    wide = x.to(tl.float32)
    return wide - wide == 0


@triton.jit
def add_reached(reached, seen, x):
    """reached + seen @ (1 where x is not finite): above 0 where a visible pair brings what is not finite.

    A sum of its own, by which results become NaN after the loop: Triton 3.7's pass TritonGPUHoistTMEMAlloc
    fails for sm_100 on a loop that changes a running sum by a select as well.

    Args:
        seen: 1 for a visible pair, else 0, of any dtype.
    """
    return tl.dot(seen.to(tl.float16), (is_finite(x) == 0).to(tl.float16), reached)


@triton.jit
def finite_or_zero(x):
    """x, with 0 for NaN and infinity."""
    return tl.where(is_finite(x), x, 0.0)


@triton.jit
def not_finite(x):
    """Whether any element is NaN or infinite."""
    return tl.min(is_finite(x).to(tl.int32), axis=None) == 0

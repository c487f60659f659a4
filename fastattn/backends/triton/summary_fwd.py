"""Statistics of the weights of each row, in one walk over its keys: entropy, distance, the largest weights.

All are sums or maxima over e = exp(s - m), m the largest score so far, rescaled as an online softmax is.
docs/kernels/summary.md has the derivation.
"""

import triton
import triton.language as tl

from fastattn.backends.triton.programs import row_program
from fastattn.backends.triton.tile import (
    FAR,
    LN2,
    apply,
    exp_of,
    key_range,
    key_tile,
    key_tiles,
    load_keys,
    load_rows,
    product,
    row_base,
)


@triton.jit
def _no_links(BLOCK_M: tl.constexpr, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Unordered lists [BLOCK_M, BLOCK_K] of scores and of keys, which all differ; beyond TOP_K they stay."""
    column = tl.arange(0, BLOCK_K)[None, :] + tl.zeros([BLOCK_M, 1], tl.int32)
    return tl.where(column < TOP_K, float("-inf"), float("inf")), -1 - column


@triton.jit
def _add_links(links, keys, s, j0, BLOCK_N: tl.constexpr):
    """The lists after the scores [M, N] of the keys from j0 on. Few of a late tile enter.

    Keys come in ascending order and only a larger score displaces, the last of the least, so that the first
    of equal scores stay. Lists in order would need shifts across threads.
    """
    n = tl.arange(0, BLOCK_N)[None, :]
    least = tl.min(links, 1)
    largest = tl.max(s, 1)
    while tl.max((largest > least).to(tl.int32), 0) > 0:
        at = tl.argmax(s, 1)
        last = tl.max(tl.where(links == least[:, None], keys, -FAR), 1)
        displaced = (keys == last[:, None]) & (largest > least)[:, None]
        links = tl.where(displaced, largest[:, None], links)
        keys = tl.where(displaced, j0 + at[:, None], keys)
        s = tl.where(n == at[:, None], float("-inf"), s)
        least = tl.min(links, 1)
        largest = tl.max(s, 1)
    return links, keys


@triton.jit
def summary_fwd(
    q, k, entropy, distance, lse, max_weight, max_index, topk_weights, topk_indices, shift, factor, sinks,
    lengths, rules,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NATURAL: tl.constexpr, PRECISION: tl.constexpr, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The statistics of BLOCK_M rows, and what makes weights of their scores: p = exp(s - shift) * factor.

    entropy, distance, lse, max_weight, max_index, shift, factor: [B, Hq, Lq], dense; max_index int64.
    topk_weights, topk_indices: [B, Hq, Lq, TOP_K], dense, or None where TOP_K is 0.
    """
    b, h, h_kv, i0, q_begin, k_begin, len_q, len_k = row_program(lengths, BLOCK_M)
    r = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    i = tl.minimum(i0 + r, len_q - 1)
    begin, end = key_range(rules, b, i, len_q, len_k)
    rows = load_rows(row_base(q, b, h, q_begin + i0), q.row, r, BLOCK_D, HEAD_DIM, len_q - i0, True)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)  # of e, with the sink's
    seen = tl.zeros([BLOCK_M], tl.float32)  # of e
    spread = tl.zeros([BLOCK_M], tl.float32)  # of e ln e
    far = tl.zeros([BLOCK_M], tl.float32)  # of e |i + offset - j|
    best = m
    best_key = tl.zeros([BLOCK_M], tl.int32)
    if sinks is not None:
        m = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + h)
        total = tl.where(m == float("-inf"), 0.0, 1.0)
    if TOP_K > 0:
        links, keys_of = _no_links(BLOCK_M, TOP_K, BLOCK_K)
    start, count = key_tiles(rules, b, h, i0, tl.min(begin), tl.max(end), BLOCK_N)
    for t in range(count):
        j0, bits = key_tile(rules, start, t, BLOCK_N)
        keys = load_keys(k, lengths, b, h_kv, k_begin, j0, len_k, BLOCK_N, BLOCK_D, HEAD_DIM, True)
        s = product(rows, tl.trans(keys), None, PRECISION)
        s, _ = apply(
            rules, s, b, h, i[:, None], (j0 + n)[None, :], begin[:, None], end[:, None], len_k - len_q, len_q,
            len_k, bits, True,
        )  # fmt: skip
        known = tl.where(s == s, s, float("-inf"))  # a row with a NaN is lost, but its program goes on
        largest = tl.max(known, 1)
        best_key = tl.where(largest > best, j0 + tl.argmax(known, 1), best_key)
        best = tl.maximum(best, largest)
        if TOP_K > 0:
            links, keys_of = _add_links(links, keys_of, known, j0, BLOCK_N)

        m_new = tl.maximum(m, largest)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # of a row that has seen nothing yet
        log_e = s - m_safe[:, None]
        e = exp_of(log_e, NATURAL)
        rescale = exp_of(m - m_safe, NATURAL)
        moved = tl.where(m == float("-inf"), 0.0, m - m_safe)
        spread = rescale * (spread + seen * moved) + tl.sum(tl.where(s == float("-inf"), 0.0, e * log_e), 1)
        away = tl.abs(i[:, None] + (len_k - len_q) - (j0 + n)[None, :]).to(tl.float32)
        far = rescale * far + tl.sum(e * away, 1)
        seen = rescale * seen + tl.sum(e, 1)
        total = rescale * total + tl.sum(e, 1)
        m = m_new

    inside = r < len_q - i0
    at = (b * lengths.num_heads + h).to(tl.int64) * lengths.seqlen_q + i0 + r
    empty = total == 0
    divisor = tl.where(empty, 1.0, total)
    log_total = tl.log(divisor)
    if not NATURAL:
        spread = spread * LN2
    tl.store(entropy + at, (seen * log_total - spread) / divisor, mask=inside)
    tl.store(distance + at, far / divisor, mask=inside)
    log_sum = (m if NATURAL else m * LN2) + log_total
    tl.store(lse + at, tl.where(empty, float("-inf"), log_sum), mask=inside)
    m = tl.where(m == float("-inf"), 0.0, m)
    tl.store(shift + at, m, mask=inside)
    tl.store(factor + at, 1 / divisor, mask=inside)
    # Of a lost row the divisor is NaN, and so are its weights; a key of weight 0 is no link.
    weight = exp_of(best - m, NATURAL) / divisor
    tl.store(max_weight + at, weight, mask=inside)
    tl.store(max_index + at, tl.where(weight > 0, best_key, -1).to(tl.int64), mask=inside)
    if TOP_K > 0:
        column = tl.arange(0, BLOCK_K)[None, :]
        links = tl.where(column < TOP_K, links, float("-inf"))
        for place in range(TOP_K):  # descending, the first of equal scores first
            largest = tl.max(links, 1)
            key = tl.min(tl.where(links == largest[:, None], keys_of, FAR), 1)
            links = tl.where(keys_of == key[:, None], float("-inf"), links)
            keys_of = tl.where(keys_of == key[:, None], FAR, keys_of)
            weight = exp_of(largest - m, NATURAL) / divisor
            tl.store(topk_weights + at * TOP_K + place, weight, mask=inside)
            tl.store(
                topk_indices + at * TOP_K + place, tl.where(weight > 0, key, -1).to(tl.int64), mask=inside
            )

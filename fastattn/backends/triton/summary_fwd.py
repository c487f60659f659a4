"""Statistics of the weights of each row, in one walk over its keys: entropy, distance, and the largest weights.

All are sums or maxima over e = exp(s - m), m the largest score so far, and are rescaled as an online softmax is.
docs/kernels/summary.md has the derivation.
"""

import triton
import triton.language as tl

from fastattn.backends.triton.pair_scores import key_step, key_steps
from fastattn.backends.triton.tile import (
    LN2,
    apply,
    exp_of,
    key_range,
    load_keys,
    load_rows,
    product,
    row_base,
    sequence,
)


@triton.jit
def _insert(links, keys, score, key, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Lists [M, BLOCK_K] of scores, descending, and their keys, with one more of each row, [M], where it is
    above the last. Behind equal scores: keys arrive in ascending order."""
    column = tl.arange(0, BLOCK_K)[None, :]
    place = tl.sum((links >= score[:, None]).to(tl.int32), 1)[:, None]
    left = tl.maximum(column - 1, 0) + tl.zeros_like(keys)
    moved = tl.where(column == place, score[:, None], tl.gather(links, left, 1))
    moved_keys = tl.where(column == place, key[:, None], tl.gather(keys, left, 1))
    stays = (column < place) | (column >= TOP_K)
    return tl.where(stays, links, moved), tl.where(stays, keys, moved_keys)


@triton.jit
def _add_links(links, keys, s, j0, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The lists with the scores [M, N] of the keys from j0 on; late tiles have few that enter."""
    n = tl.arange(0, BLOCK_N)[None, :]
    last = tl.arange(0, BLOCK_K)[None, :] == TOP_K - 1
    least = tl.max(tl.where(last, links, float("-inf")), 1)
    largest = tl.max(s, 1)
    while tl.max((largest > least).to(tl.int32), 0) > 0:
        at = tl.argmax(s, 1)
        links, keys = _insert(links, keys, largest, j0 + at, TOP_K, BLOCK_K)
        s = tl.where(n == at[:, None], float("-inf"), s)
        least = tl.max(tl.where(last, links, float("-inf")), 1)
        largest = tl.max(s, 1)
    return links, keys


@triton.jit(do_not_specialize=["lengths"])
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
    num_tiles = tl.cdiv(lengths.seqlen_q, BLOCK_M)
    bh = tl.program_id(0) // num_tiles
    tile = num_tiles - 1 - tl.program_id(0) % num_tiles  # the longest of a causal call first
    b = bh // lengths.num_heads
    h = bh % lengths.num_heads
    h_kv = h // (lengths.num_heads // lengths.num_heads_kv)
    q_begin, k_begin, len_q, len_k = sequence(lengths, b)
    i0 = tile * BLOCK_M
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
        links = tl.full([BLOCK_M, BLOCK_K], float("-inf"), tl.float32)
        keys_of = tl.zeros([BLOCK_M, BLOCK_K], tl.int32)
    start, count = key_steps(rules, b, h, i0, tl.min(begin), tl.max(end), BLOCK_N)
    for t in range(count):
        j0, bits = key_step(rules, start, t, BLOCK_N)
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
            links, keys_of = _add_links(links, keys_of, known, j0, TOP_K, BLOCK_N, BLOCK_K)

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
    at = bh.to(tl.int64) * lengths.seqlen_q + i0 + r
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
        c = tl.arange(0, BLOCK_K)[None, :]
        weights = exp_of(links - m[:, None], NATURAL) / divisor[:, None]
        at = at[:, None] * TOP_K + c
        inside = inside[:, None] & (c < TOP_K)
        tl.store(topk_weights + at, weights, mask=inside)
        tl.store(topk_indices + at, tl.where(weights > 0, keys_of, -1).to(tl.int64), mask=inside)

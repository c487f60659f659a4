"""Scores that are sums over the features of a function of the pair (q_id, k_jd), in place of the product q·k.

The additive score w·tanh(q + k), and the logarithms of kernels of the distance r = |q - k|. A pair's features
exist in registers only, [rows, keys, features], and what is left of them is one number. The names are those
of csrc/cpu/pair_scores.h; docs/kernels/additive.md derives the gradients.
"""

import triton
import triton.language as tl

from fastattn.backends.triton.tile import row_base


@triton.jit
def rational_tanh(x):
    """tanh(x) within 6 units in the last place, by the polynomials of the CPU's kernels: one division, and no
    exponential, of which a device makes an eighth as many as multiplications."""
    x = tl.minimum(x, 9.0, propagate_nan=tl.PropagateNan.ALL)  # from here on tanh rounds to 1
    x = tl.maximum(x, -9.0, propagate_nan=tl.PropagateNan.ALL)
    z = x * x
    p = (((z * 1.3353413e-8 + 2.0608184e-5) * z + 3.4955344e-3) * z + 1.338098e-1) * z + 1.0
    q = (((z * 7.7760467e-7 + 3.2855463e-4) * z + 2.587678e-2) * z + 4.6714297e-1) * z + 1.0
    return x * p / q


@triton.jit
def pair_features(q, k, SCORE: tl.constexpr):
    """What the gradients need of each feature: tanh(q + k), or q - k."""
    if SCORE == "additive":
        return rational_tanh(q + k)
    else:
        return q - k


@triton.jit
def feature_parts(features, w, SCORE: tl.constexpr):
    """What each feature adds to the sum that score_of takes."""
    if SCORE == "additive":
        return features * w
    else:
        return features * features


@triton.jit
def by_query(ds, features, SCORE: tl.constexpr):
    """ds times the derivative by q_id, but for the factor w_d; ds is that of the sum, or of -r^2 / 2. The
    derivative by k_jd is the same, with the other sign for a distance."""
    if SCORE == "additive":
        return ds - ds * features * features
    else:
        return -ds * features


@triton.jit
def score_of(total, SCORE: tl.constexpr):
    """(score, its derivative by the sum, or by -r^2 / 2) from the sum over the features.

    The score is -inf beyond a kernel's support.
    """
    if SCORE == "additive":
        return total, 1.0
    elif SCORE == "gaussian":
        return -0.5 * total, 1.0
    elif SCORE == "boxcar":
        return tl.where(total > 1, float("-inf"), 0 * total), 0.0
    elif SCORE == "epanechnikov":
        rest = 1 - total
        return tl.where(total >= 1, float("-inf"), tl.log(rest)), tl.where(total < 1, 2 / rest, 0.0)
    else:
        r = tl.sqrt_rn(total)
        s = tl.where(r >= 1, float("-inf"), tl.log(1 - r))
        return s, tl.where((r > 0) & (r < 1), 1 / (r * (1 - r)), 0.0)  # at r = 0 it is taken to be 0


@triton.jit
def pair_tile(
    q, k, w, lengths, b, h, h_kv, q_begin, k_begin, i0, j0, len_q, len_k,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    SCORE: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_M, BLOCK_N] of the rows from i0 on with the keys from j0 on, by BLOCK_H features."""
    m = tl.arange(0, BLOCK_M)[:, None]
    n = tl.arange(0, BLOCK_N)[:, None]
    q_base = row_base(q, b, h, q_begin + i0) + m * q.row
    k_base = row_base(k, b, h_kv, k_begin + j0) + n * k.row
    total = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_H], tl.float32)
    for d0 in range(0, HEAD_DIM, BLOCK_H):
        d = (d0 + tl.arange(0, BLOCK_H))[None, :]
        rows = tl.load(q_base + d, mask=(m < len_q - i0) & (d < HEAD_DIM), other=0.0).to(tl.float32)
        keys = tl.load(k_base + d, mask=(n < len_k - j0) & (d < HEAD_DIM), other=0.0).to(tl.float32)
        features = pair_features(rows[:, None, :], keys[None, :, :], SCORE)
        weights = 1.0
        if SCORE == "additive":
            weights = tl.load(w + d, mask=d < HEAD_DIM, other=0.0)[:, None, :]
        total += feature_parts(features, weights, SCORE)
    s, _ = score_of(tl.sum(total, 2), SCORE)
    return s

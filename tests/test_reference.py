"""The oracle itself: against loops written out, against PyTorch's own call, and its bound's teeth."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastattn import masks, reference
from fastattn.testing import check, check_all, dropout_mask


def by_hand(q, k, v, visible, bias, scale, softcap, sinks, keep, p):
    """out and lse of one head by loops over numbers."""
    out, lses = [], []
    for i in range(q.shape[0]):
        weights = {}
        for j in range(k.shape[0]):
            if not visible[i][j] or bias[i][j] == -math.inf:
                continue
            s = scale * sum(float(a) * float(b) for a, b in zip(q[i], k[j], strict=True))
            if softcap is not None:
                s = softcap * math.tanh(s / softcap)
            weights[j] = math.exp(s + float(bias[i][j]))
        total = sum(weights.values()) + (math.exp(sinks) if sinks is not None else 0.0)
        lses.append(math.log(total) if total > 0 else -math.inf)
        row = [0.0] * v.shape[1]
        for j, weight in weights.items():
            if keep[i][j]:
                for d in range(v.shape[1]):
                    row[d] += weight / total / (1 - p) * float(v[j][d])
        out.append(row)
    return torch.tensor(out, dtype=torch.float64), torch.tensor(lses, dtype=torch.float64)


@pytest.mark.parametrize(
    "sinks", [None, torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=torch.float64)], ids=["plain", "sinks"]
)
@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_every_step_by_loops(p: float, softcap: float | None, sinks):
    generator = torch.Generator().manual_seed(0)
    batch, heads, heads_kv, lq, lk = 2, 4, 2, 5, 7
    q = torch.randn(batch, heads, lq, 3, generator=generator, dtype=torch.float64)
    k = torch.randn(batch, heads_kv, lk, 3, generator=generator, dtype=torch.float64)
    v = torch.randn(batch, heads_kv, lk, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(batch, 1, lq, lk, generator=generator) < 0.6
    mask[1, :, 2] = False
    bias = torch.randn(1, heads, lq, lk, generator=generator, dtype=torch.float64)
    bias[:, 1, :, 3] = -math.inf
    keep = dropout_mask(9, batch, heads, lq, lk, p)
    out, lse = reference.attention(
        q, k, v, mask=mask, bias=bias, scale=-1.1, softcap=softcap, sinks=sinks, dropout_p=p,
        dropout_seed=torch.tensor([9]), return_lse=True,
    )  # fmt: skip
    for b in range(batch):
        for h in range(heads):
            sink = None if sinks is None else float(sinks[h])
            parts = (q[b, h], k[b, h // 2], v[b, h // 2], mask[b, 0], bias[0, h])
            want = by_hand(*parts, -1.1, softcap, sink, keep[b, h], p)
            torch.testing.assert_close(out[b, h], want[0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(lse[b, h], want[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pytorch_agrees(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 16, generator=generator).to(dtype) for n in (20, 30, 30))
    mask = torch.rand(2, 1, 20, 30, generator=generator) < 0.5
    got = reference.attention(q, k, v, mask=mask)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    top_left = reference.attention(q, k, v, mask=masks.causal(align="top_left"))
    torch.testing.assert_close(top_left, F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_weights_give_the_output():
    q, k, v = (torch.randn(2, 2, n, 8, dtype=torch.float64) for n in (9, 12, 12))
    options = {"mask": masks.causal(), "softcap": 1.0, "sinks": torch.randn(2, dtype=torch.float64)}
    weights = reference.attention_weights(q, k, **options)
    torch.testing.assert_close(weights @ v, reference.attention(q, k, v, **options))
    assert (weights.sum(-1) < 1).all()


def test_reversed_keys_change_rounding_alone():
    q, k, v = (torch.randn(1, 2, 200, 16, dtype=torch.float64) for _ in range(3))
    options = {"mask": masks.causal(), "dropout_p": 0.3, "dropout_seed": torch.tensor([4])}
    forward = reference.attention(q, k, v, **options)
    backward = reference.attention(q, k, v, **options, reverse_keys=True)
    assert not torch.equal(forward, backward)
    torch.testing.assert_close(forward, backward, rtol=1e-13, atol=1e-13)


def test_varlen_is_attention_of_each_sequence():
    lens_q, lens_k = (3, 0, 5), (4, 2, 5)
    q, k, v = torch.randn(8, 4, 6), torch.randn(11, 2, 6), torch.randn(11, 2, 7)
    cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).int() for lens in (lens_q, lens_k))
    out, lse = reference.varlen_attention(q, k, v, cu_q, cu_k, mask=masks.causal(), return_lse=True)
    start_q, start_k = 0, 0
    for lq, lk in zip(lens_q, lens_k, strict=True):
        rows, keys = slice(start_q, start_q + lq), slice(start_k, start_k + lk)
        parts = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
        one, one_lse = reference.attention(*parts, mask=masks.causal(), return_lse=True)
        torch.testing.assert_close(out[rows], one[0].transpose(0, 1))
        torch.testing.assert_close(lse[:, rows], one_lse[0])
        start_q, start_k = start_q + lq, start_k + lk


def test_decode_is_attention_over_the_valid_keys():
    q, k, v = torch.randn(2, 4, 3, 6), torch.randn(2, 2, 20, 6), torch.randn(2, 2, 20, 5)
    lengths = torch.tensor([20, 7])
    out = reference.decode_attention(q, k, v, lengths, mask=masks.causal())
    pages = [x.unflatten(2, (5, 4)).transpose(1, 2).flatten(0, 1) for x in (k, v)]
    order = torch.randperm(10)
    table = torch.empty(10, dtype=torch.int32)
    table[order] = torch.arange(10, dtype=torch.int32)
    paged = reference.decode_attention(
        q, *(x[order] for x in pages), lengths, block_table=table.view(2, 5), mask=masks.causal()
    )
    torch.testing.assert_close(paged, out)
    for b, length in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        want = reference.attention(q[one], k[one, :, :length], v[one, :, :length], mask=masks.causal())
        torch.testing.assert_close(out[one], want)


EXACT = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (EXACT.float()[:2], r"shape \(2,\), expected \(3,\)"),
        (torch.tensor([1.0, math.nan, 4.0]), r"NaN at 1 wrong places, first \[1\]"),
        (torch.tensor([1.0, -2.0, math.inf]), r"\+inf at 1 wrong places"),
        (torch.tensor([1.0, -2.0, 4.00001]), r"error 1e-05 exceeds .* at \[2\]"),
    ],
    ids=["shape", "nan", "inf", "error"],
)
def test_check_notices(value: torch.Tensor, message: str):
    with pytest.raises(AssertionError, match=message):
        check("out", value, EXACT, EXACT.float())


def test_check_allows_what_it_should():
    eager = EXACT.float() + torch.tensor([0.0, 0.001, 0.0])
    check("out", EXACT.float() + 0.0019, EXACT, eager)
    with pytest.raises(AssertionError, match="exceeds"):
        check("out", EXACT.float() + 0.0021, EXACT, eager)
    infinite = torch.tensor([-math.inf, 1.0])
    check("lse", infinite, infinite.double(), infinite)


def test_check_all_wants_every_gradient():
    full = {"out": EXACT.float(), "dq": EXACT.float()}
    exact = {name: x.double() for name, x in full.items()}
    check_all(full, exact, full, torch.float32)
    with pytest.raises(AssertionError, match="no gradient"):
        check_all(full | {"dq": None}, exact, full, torch.float32)

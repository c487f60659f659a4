"""merge: attention over parts of the keys, put together, is attention over all of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from call_support import EXACT, grads, qkv, randn

import fastattn
from fastattn.masks import padding


def parts(q, k, v, cuts, **options):
    bounds = [0, *cuts, k.shape[2]]
    pairs = [
        fastattn.attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True, **options)
        for a, b in pairwise(bounds)
    ]
    return [out for out, _ in pairs], [lse for _, lse in pairs]


@pytest.mark.parametrize("cuts", [[], [3], [2, 2, 6], [0, 9]], ids=str)
def test_parts_make_the_whole(cuts):
    inputs = qkv(2, 4, 2, 5, 9, 8, 6, grad=True)
    got, got_grads = grads(lambda q, k, v: fastattn.merge(*parts(q, k, v, cuts)), inputs)
    want, want_grads = grads(lambda q, k, v: fastattn.attention(q, k, v, return_lse=True), inputs)
    for a, b in zip(got + got_grads, want + want_grads, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_the_docstrings_example_by_hand():
    out, lse = fastattn.merge([torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)], [torch.zeros(1, 1, 1)] * 2)
    assert out.tolist() == [[[[0.5, 0.5]]]]
    torch.testing.assert_close(lse, torch.full((1, 1, 1), 2.0).log())


def test_gradcheck():
    outs = [randn(1, 2, 3, 4, seed=n, grad=True) for n in range(3)]
    lses = [randn(1, 2, 3, seed=n + 9, grad=True) for n in range(3)]
    assert torch.autograd.gradcheck(lambda *t: fastattn.merge(t[:3], t[3:]), [*outs, *lses])
    assert torch.autograd.gradgradcheck(lambda *t: fastattn.merge(t[:3], t[3:]), [*outs, *lses])


def test_rows_that_are_empty_in_some_parts_or_all():
    q, k, v = qkv(2, 4, 4, 5, 8, grad=True)
    outs, lses = [], []
    for a, b, lengths in ((0, 4, [2, 0]), (4, 8, [0, 0])):
        out, lse = fastattn.attention(q, k[:, :, a:b], v[:, :, a:b], mask=padding(lengths), return_lse=True)
        outs.append(out)
        lses.append(lse)
    out, lse = fastattn.merge(outs, lses)
    want, want_lse = fastattn.attention(q, k, v, mask=padding([2, 0]), return_lse=True)
    torch.testing.assert_close(out, want, **EXACT)
    torch.testing.assert_close(lse, want_lse, **EXACT)
    assert (lse[1] == -torch.inf).all()
    loss = out.sum() + lse[0].sum()
    want_loss = want.sum() + want_lse[0].sum()
    for a, b in zip(
        torch.autograd.grad(loss, (q, k, v)), torch.autograd.grad(want_loss, (q, k, v)), strict=True
    ):
        torch.testing.assert_close(a, b, **EXACT)


def test_what_an_empty_part_holds_does_not_matter():
    out, lse = randn(1, 1, 2, 3), randn(1, 1, 2)
    garbage = torch.full_like(out, torch.nan)
    merged = fastattn.merge([out, garbage], [lse, torch.full_like(lse, -torch.inf)])
    torch.testing.assert_close(merged, (out, lse), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    q, k, v = qkv(2, 4, 2, 5, 9, dtype=dtype)
    out, lse = fastattn.merge(*parts(q, k, v, [4]))
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    want = fastattn.attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-2)


def test_extreme_values_do_not_overflow():
    out = torch.tensor([[[[1.0]]]]), torch.tensor([[[[3.0]]]])
    for size in (1e4, -1e4, 3e38, -3e38):
        merged, lse = fastattn.merge(out, [torch.full((1, 1, 1), size)] * 2)
        assert merged.item() == 2.0
        torch.testing.assert_close(lse.item(), size, rtol=1e-6, atol=1.0)
    merged, _ = fastattn.merge(out, [torch.full((1, 1, 1), 1e4), torch.full((1, 1, 1), -1e4)])
    assert merged.item() == 1.0


def test_an_infinite_part_is_all_of_the_sum():
    outs = [torch.full((1, 1, 2, 1), 3.0), torch.full((1, 1, 2, 1), 5.0)]
    lses = [torch.tensor([[[torch.inf, 0.0]]]), torch.tensor([[[0.0, 0.0]]])]
    out, lse = fastattn.merge(outs, lses)
    assert lse[0, 0, 0] == torch.inf
    assert (out[0, 0, 1], lse[0, 0, 1].exp()) == (4.0, 2.0)


def test_packed_parts():
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    q, k, v = randn(5, 4, 8), randn(5, 2, 8), randn(5, 2, 6)
    even, odd = torch.tensor([0, 2, 4]), torch.tensor([1, 3])
    pairs = [
        fastattn.varlen_attention(q, k[n], v[n], cu, torch.tensor(c, dtype=torch.int32), return_lse=True)
        for n, c in ((even, [0, 1, 3]), (odd, [0, 1, 2]))
    ]
    got = fastattn.merge([out for out, _ in pairs], [lse for _, lse in pairs])
    want = fastattn.varlen_attention(q, k, v, cu, cu, return_lse=True)
    torch.testing.assert_close(got, want, **EXACT)


def test_stacked_tensors_and_compile():
    outs, lses = parts(*qkv(2, 4, 2, 5, 9), [4])
    want = fastattn.merge(outs, lses)
    torch.testing.assert_close(fastattn.merge(torch.stack(outs), torch.stack(lses)), want, rtol=0, atol=0)
    compiled = torch.compile(fastattn.merge, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(outs, lses), want, **EXACT)

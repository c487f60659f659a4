"""summarize with an lse at hand: of the same call, in any size and layout, or of another, which raises."""

from __future__ import annotations

import math

import pytest
import torch
from call_support import EXACT, NATIVE
from summary_support import BACKENDS, qk

import fastattn
from fastattn.backends import cpu
from fastattn.inspect import summarize
from fastattn.masks import causal


@pytest.mark.skipif(not NATIVE, reason="the native core is not built")
@pytest.mark.parametrize("lse", [0.0, 15.0, 16.0, 100.0, -1e30, math.inf, -math.inf, math.nan])
def test_lse_of_another_call_raises(lse):
    """Also one so large that it is not used, and one that no finite scores have."""
    q = torch.zeros(1, 2, 3, 4)
    wrong = torch.full((1, 2, 3), math.log(3.0))
    wrong[0, 1, 2] = lse
    with pytest.raises(ValueError, match=r"lse must be what .* batch 0, head 1, query 2 add up to"):
        summarize(q, q, lse=wrong)


@pytest.mark.skipif(not NATIVE, reason="the native core is not built")
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("size", [1.0, 1e3], ids=["used", "too large to be used"])
def test_the_first_of_several_wrong_rows_is_named(use_threads, threads, size):
    """By batch, then head, then query, in whatever order their tasks end."""
    use_threads(threads)
    q, k = qk(2, 3, 3, 700, 9, dtype=torch.float32)
    q = q * size
    lse = summarize(q, k).lse
    for row in ((1, 2, 699), (1, 2, 0), (1, 1, 80), (1, 0, 699), (0, 2, 650), (0, 2, 310), (0, 2, 309)):
        lse[row] += lse.abs().max() + 1
        with pytest.raises(ValueError, match="batch {}, head {}, query {} add up".format(*row)):
            summarize(q, k, lse=lse)


@pytest.mark.skipif(not NATIVE, reason="the native core is not built")
@pytest.mark.parametrize("size", [1.0, 16.0, 1e3, 1e6, 1e9])
def test_a_given_lse_of_any_size(size):
    """What comes back is the lse of the scores, however much of a large one was lost to rounding."""
    q, k = qk(1, 2, 2, 40, 50, dtype=torch.float32)
    q = q * size
    _, lse = fastattn.attention(q, k, k, return_lse=True)
    got, want = summarize(q, k, lse=lse, top_k=2), summarize(q, k, top_k=2)
    for name, tensor in got.tensors().items():
        torch.testing.assert_close(tensor, want.tensors()[name], rtol=1e-5, atol=1e-6)
    off = summarize(q, k, lse=lse * (1 + 1e-5)) if size > 16 else got
    torch.testing.assert_close(off.lse, want.lse, rtol=3e-7, atol=2e-6)
    with pytest.raises(ValueError, match="lse must be what"):
        summarize(q, k, lse=lse + lse.abs().max() / 10 + 1)


LAYOUTS = {
    "dense": lambda lse: lse,
    "strided": lambda lse: torch.stack([lse, lse], -1)[..., 0],
    "transposed": lambda lse: lse.transpose(0, 2).contiguous().transpose(0, 2),
    "negated": lambda lse: torch._neg_view(-lse),
    "parameter": torch.nn.Parameter,
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_given_lse_of_any_layout(layout):
    """It is read as it is, and stays as it is, also where the summary's own is another."""
    q, k = qk(2, 2, 2, 5, 7, dtype=torch.float32)
    q[0, 0, 0] *= 1e3
    want = summarize(q, k)
    given = layout(want.lse)
    before = given.clone()
    got = summarize(q, k, lse=given)
    torch.testing.assert_close(got.entropy, want.entropy)
    torch.testing.assert_close(got.lse, want.lse)
    assert torch.equal(given, before) and got.lse.data_ptr() != given.data_ptr()


def test_a_negated_lse_where_kernels_get_addresses(monkeypatch):
    """As with torch < 2.10: what was made of it must live until they have read it."""
    monkeypatch.setattr(cpu, "reads_tensors", False)
    q, k = qk(2, 2, 2, 5, 7, dtype=torch.float32)
    want = summarize(q, k)
    got = summarize(q, k, lse=torch._neg_view(-want.lse))
    torch.testing.assert_close(got.entropy, want.entropy)
    assert torch.equal(got.lse, want.lse)


@pytest.mark.skipif(not NATIVE, reason="the native core is not built")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_lse_of_rows_that_are_not_finite(value):
    q, k = qk(1, 2, 2, 6, 9, dtype=torch.float32)
    q[0, 1, 3] = value
    _, lse = fastattn.attention(q, k, k, mask=causal(), return_lse=True)
    got, want = summarize(q, k, mask=causal(), lse=lse), summarize(q, k, mask=causal())
    assert got.entropy[0, 1, 3].isnan() and got.entropy.isnan().sum() == 1
    for name, tensor in got.tensors().items():
        torch.testing.assert_close(tensor, want.tensors()[name], equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_lse_of_a_summary_is_its_own(backend):
    """A gradient of it reaches q by the summary, and never the given tensor."""
    q, k = qk(1, 2, 2, 5, 7, grad=True)
    given = summarize(q, k, backend=backend).lse.detach().requires_grad_()
    got = torch.autograd.grad(summarize(q, k, lse=given, backend=backend).lse.sin().sum(), [q, k])
    want = torch.autograd.grad(summarize(q, k, backend=backend).lse.sin().sum(), [q, k])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    assert given.grad is None

"""Numbers at the edge of what the accumulator holds: huge scores, huge values, sums of thousands of terms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import masks
from fastattn.backends import cpu
from fastattn.testing.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, check

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native core fastattn._C is not built")

ISAS = ("baseline", "avx2", "avx512", "generic")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(leaves: dict[str, Tensor], dout: Tensor, dlse: Tensor, dtype: torch.dtype, backend: str):
    """The gradients of attention(**leaves) by name, in a dtype and on a backend."""
    leaves = {name: x.to(dtype).requires_grad_() for name, x in leaves.items()}
    out, lse = fastattn.attention(**leaves, return_lse=True, backend=backend)
    got = torch.autograd.grad((out, lse), list(leaves.values()), (dout.to(dtype), dlse.to(dtype)))
    return dict(zip(leaves, got, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sinks", [None, 0.0, 1.0], ids=["plain", "small-sink", "large-sink"])
@pytest.mark.parametrize("seqlen_q", [1, 4, 5])
@pytest.mark.parametrize("size", [1e9, 1e12])
def test_probabilities_of_huge_scores_add_up_to_1(size, seqlen_q, sinks, isa, use_isa):
    """Scores that differ by less than their own rounding, in another order of summation forward and backward:
    with dO = 1 the rows of dV still add up to what the keys weigh together."""
    use_isa(isa)
    q = randn(1, 2, seqlen_q, 64).abs()
    k = q.mean(2, keepdim=True) + 1e-6 * randn(1, 2, 300, 64, seed=1)
    q, k = q * math.sqrt(size), k * math.sqrt(size)
    v = randn(1, 2, 300, 8, seed=2).requires_grad_()
    lse = fastattn.attention(q, k, v, return_lse=True, backend="cpu")[1]
    options = {} if sinks is None else {"sinks": sinks * lse.detach().amax((0, 2))}
    out = fastattn.attention(q.requires_grad_(), k.requires_grad_(), v, **options, backend="cpu")
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(x.isfinite().all() for x in (dq, dk, dv))
    total = dv.sum(2)
    if sinks != 1.0:  # a small sink has no weight beside such scores
        torch.testing.assert_close(total, torch.full_like(total, float(seqlen_q)), rtol=1e-5, atol=0)
    else:
        assert (total >= 0).all() and (total <= seqlen_q * (1 + 1e-5)).all()


def test_a_sum_over_a_long_batch_is_as_exact_as_a_tree():
    """Gradients of a sink and of a bias that keys, heads and batch share: sums of many thousand terms."""
    leaves = {"q": randn(64, 4, 64, 4), "k": randn(64, 4, 65, 4, seed=1), "v": randn(64, 4, 65, 4, seed=2)}
    dout, dlse = randn(64, 4, 64, 4, seed=3), torch.ones(64, 4, 64)
    for name, shape in {"sinks": (4,), "bias": (64, 1)}.items():
        call = leaves | {name: randn(*shape, seed=4)}
        exact = gradients(call, dout, dlse, torch.float64, "reference")[name]
        native = gradients(call, dout, dlse, torch.float32, "reference")[name]
        got = gradients(call, dout, dlse, torch.float32, "cpu")[name]
        check(name, got, exact, native, GRADIENT_FACTOR)


@pytest.mark.parametrize("shape", [(5, 7), (5, 1), (1, 7), (1, 1)], ids=str)
def test_biases_shared_by_a_long_batch(shape):
    """With dO = 0 and dlse = 1 a bias's gradient adds up probabilities of 4096 calls: no rounding but that
    of the terms may be left, where a chain of float32 would lose a bit for each doubling."""
    q, k, v = randn(2048, 2, 5, 1), randn(2048, 2, 7, 1, seed=1), randn(2048, 2, 7, 1, seed=2)
    bias = randn(*shape, seed=3).requires_grad_()
    _, lse = fastattn.attention(q, k, v, bias=bias, return_lse=True, backend="cpu")
    (got,) = torch.autograd.grad(lse, bias, torch.ones_like(lse))
    weights = (q.double() @ k.double().mT + bias.double()).softmax(-1)
    exact = weights.detach().sum_to_size(shape)
    torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("options", [{}, {"mask": masks.causal()}, {"sinks": torch.ones(2)}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 70])
def test_a_mean_of_huge_values_is_finite(seqlen_q, dtype, options, isa, use_isa):
    """1000 values of 1e38 have a mean, although their sum is beyond float32."""
    use_isa(isa)
    q, k = randn(1, 2, seqlen_q, 16).to(dtype), randn(1, 2, 1000, 16, seed=1).to(dtype)
    v = (1e38 * randn(1, 2, 1000, 16, seed=2).abs().clamp(0.5, 2)).to(dtype)
    got = fastattn.attention(q, k, v, **options, backend="cpu")
    exact = fastattn.attention(q.double(), k.double(), v.double(), **options, backend="reference")
    native = fastattn.attention(q, k, v, **options, backend="reference")
    check("out", got, exact, native, FORWARD_FACTOR)

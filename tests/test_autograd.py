"""Gradients: against finite differences, autocast, checkpointing, double backward, forward mode."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from call_support import EXACT, NATIVE, qkv, randn, same_as_reference
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.biases import ALiBi, RelativePosition
from fastattn.masks import causal, documents, padding, window

needs_native = pytest.mark.skipif(not NATIVE, reason="the native core is not built")

OPTIONS = {
    "plain": {},
    "causal": {"mask": causal()},
    "window": {"mask": window(1, 1)},
    "padding": {"mask": padding([2, 1])},
    "documents": {"mask": documents(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 1, 2]]))},
    "bool": {"mask": torch.tensor([True, False, True, True, False])},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": -0.8},
    "dropout": {"dropout_p": 0.3, "dropout_seed": torch.tensor([5])},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options):
    inputs = qkv(2, 4, 2, 4, 5, 4, 3, grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v: fastattn.attention(q, k, v, return_lse=True, **options), inputs
    )


BIASES = [(4, 5), (1, 5), (2, 1, 4, 5), (2, 4, 1, 1), (4, 4, 1), (1,), (2, 4, 4, 5)]


@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_gradcheck_of_tensor_biases(shape):
    inputs = [*qkv(2, 4, 2, 4, 5, 4, 3, grad=True), randn(*shape, grad=True)]
    assert torch.autograd.gradcheck(
        lambda q, k, v, bias: fastattn.attention(q, k, v, bias=bias, mask=causal(), return_lse=True), inputs
    )


def test_gradcheck_of_slopes_tables_and_sinks():
    inputs = qkv(2, 4, 2, 4, 5, 4, 3, grad=True)
    slopes, table, sinks = randn(4, grad=True), randn(8, 4, grad=True), randn(4, grad=True)
    for bias, parameter in ((ALiBi, slopes), (ALiBi, randn(2, 4, grad=True)), (RelativePosition, table)):
        assert torch.autograd.gradcheck(
            lambda q, k, v, p, s, bias=bias: fastattn.attention(
                q, k, v, bias=bias(p), sinks=s, return_lse=True
            ),
            [*inputs, parameter, sinks],
        )


def test_only_what_needs_a_gradient():
    for n in range(3):
        inputs = qkv(2, 4, 2, 4, 5)
        inputs[n].requires_grad_()
        out = fastattn.attention(*inputs, bias=randn(4, 5))
        (grad,) = torch.autograd.grad(out.sum(), inputs[n])
        want = torch.autograd.grad(
            fastattn.attention(*inputs, bias=randn(4, 5), backend="reference").sum(), inputs[n]
        )
        torch.testing.assert_close(grad, want[0], **EXACT)
    q, k, v = qkv(2, 4, 2, 4, 5)
    for name, value in (("sinks", randn(4, grad=True)), ("bias", randn(4, 5, grad=True))):
        out = fastattn.attention(q, k, v, **{name: value})
        assert out.requires_grad
        want = fastattn.attention(q, k, v, **{name: value}, backend="reference")
        loss = randn(*out.shape)
        torch.testing.assert_close(
            torch.autograd.grad(out, value, loss)[0], torch.autograd.grad(want, value, loss)[0], **EXACT
        )


@pytest.mark.parametrize("part", ["out", "lse", "both"])
def test_gradients_of_out_and_lse_apart(part):
    def call(q, k, v, **options):
        out, lse = fastattn.attention(q, k, v, return_lse=True, **options)
        return {"out": out, "lse": lse, "both": (out, lse)}[part]

    if part == "lse":
        q, k, v = qkv(2, 4, 2, 5, 7, grad=True)
        got = torch.autograd.grad(call(q, k, v).sum(), (q, k))
        want = torch.autograd.grad(call(q, k, v, backend="reference").sum(), (q, k))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, **EXACT)
    else:
        same_as_reference(qkv(2, 4, 2, 5, 7, grad=True), call)


def test_upstream_gradients_of_any_strides():
    q, k, v = qkv(2, 4, 2, 5, 7, grad=True)
    out = fastattn.attention(q, k, v)
    for dout in (
        torch.ones(()).double().expand_as(out),
        randn(2, 5, 4, 8).transpose(1, 2),
        randn(2, 4, 8, 5).mT,
        randn(2, 4, 5, 16)[..., ::2],
    ):
        got = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        want = torch.autograd.grad(out, (q, k, v), dout.contiguous(), retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_gradients_keep_the_stride_order():
    q, k, v = (
        t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in qkv(2, 4, 2, 5)
    )
    for grad in torch.autograd.grad(fastattn.attention(q, k, v).sum(), (q, k, v)):
        assert grad.transpose(1, 2).is_contiguous()


@needs_native
def test_double_backward_points_to_the_reference():
    q, k, v = qkv(1, 2, 2, 3, grad=True)
    out = fastattn.attention(q, k, v)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    torch.testing.assert_close(
        grad, torch.autograd.grad(fastattn.attention(q, k, v).square().sum(), q)[0], rtol=0, atol=0
    )
    with pytest.raises(NotImplementedError, match="no double backward: call with backend='reference'"):
        torch.autograd.grad(grad.sum(), q)
    assert torch.autograd.gradgradcheck(lambda *t: fastattn.attention(*t, backend="reference"), (q, k, v))


@needs_native
def test_forward_mode_points_to_the_reference():
    q, k, v = qkv(1, 2, 2, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(
            NotImplementedError, match="no forward-mode derivative: call with backend='reference'"
        ):
            fastattn.attention(dual, k, v)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            fastattn.attention(q, k, v, bias=forward_ad.make_dual(randn(3, 3), torch.ones(3, 3).double()))
        fastattn.attention(q, k, v)
        out = fastattn.attention(dual, k, v, backend="reference")
        tangent = forward_ad.unpack_dual(out).tangent
    step = 1e-6
    difference = fastattn.attention(q + step, k, v) - fastattn.attention(q - step, k, v)
    torch.testing.assert_close(tangent, difference / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "call", [fastattn.attention, fastattn.scaled_dot_product_attention], ids=["ours", "sdpa"]
)
def test_autocast_as_torch(call, dtype):
    q, k, v = qkv(2, 4, 4, 5, 7, dtype=torch.float32, grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out = call(q, k, v)
        want = F.scaled_dot_product_attention(q, k, v)
        assert out.dtype == want.dtype == dtype
        assert call(q.double(), k.double(), v.double()).dtype == torch.float64
        assert call(q.half(), k.bfloat16(), v).dtype == dtype
    torch.testing.assert_close(out.float(), want.float(), rtol=0, atol=2e-2)
    got = torch.autograd.grad(out.sum(), (q, k, v))
    for a, b in zip(got, torch.autograd.grad(want.sum(), (q, k, v)), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=5e-2)


def test_autocast_of_biases():
    q, k, v = qkv(2, 4, 4, 5, 7, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for bias in (torch.zeros(5, 7), torch.zeros(5, 7).half(), torch.zeros(5, 7).bfloat16()):
            out = fastattn.attention(q, k, v, bias=bias)
            assert out.dtype == torch.bfloat16
            torch.testing.assert_close(out, fastattn.attention(q, k, v), rtol=0, atol=2e-2)
            assert fastattn.scaled_dot_product_attention(q, k, v, bias).dtype == torch.bfloat16


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_redraws_the_same_dropout(use_reentrant):
    q, k, v = qkv(2, 4, 2, 5, 7, grad=True)

    def block(q, k, v):
        return fastattn.attention(q * 1, k, v, dropout_p=0.5).tanh()

    results = []
    for run in (block, lambda *t: checkpoint(block, *t, use_reentrant=use_reentrant)):
        torch.manual_seed(11)
        for tensor in (q, k, v):
            tensor.grad = None
        out = run(q, k, v)
        out.square().sum().backward()
        results.append([out, q.grad, k.grad, v.grad])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@needs_native
def test_saved_tensor_hooks_see_what_is_saved():
    q, k, v = qkv(1, 2, 2, 4, grad=True)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        fastattn.attention(q, k, v, mask=torch.ones(4, 4).bool()).sum().backward()
    assert any(t.dtype == torch.bool for t in packed)


def test_changing_a_saved_input_raises():
    q, k, v = qkv(1, 2, 2, 4, grad=True)
    key = k * 1
    out = fastattn.attention(q, key, v)
    key.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_nothing_is_kept_alive():
    q, k, v = qkv(1, 2, 2, 4, grad=True)
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    refs = [weakref.ref(out), weakref.ref(lse)]
    out.sum().backward()
    del out, lse
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    assert q.grad is not None


def test_accumulation_into_leaves():
    q, k, _ = qkv(1, 2, 2, 4, grad=True)
    for _ in range(2):
        fastattn.attention(q, k, q).sum().backward()
    want = torch.autograd.grad(fastattn.attention(q, k, q, backend="reference").sum(), (q, k))
    torch.testing.assert_close(q.grad, 2 * want[0], **EXACT)
    torch.testing.assert_close(k.grad, 2 * want[1], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_have_their_inputs_dtypes(dtype):
    q, k, v = qkv(2, 4, 2, 5, 7, dtype=dtype, grad=True)
    bias = randn(5, 7, dtype=dtype, grad=True)
    wide = randn(4, 1, 1, dtype=torch.float32, grad=True)
    sinks = randn(4, dtype=torch.float64, grad=True)
    for tensor in (bias, wide):
        out = fastattn.attention(q, k, v, bias=tensor, sinks=sinks)
        for grad, of in zip(
            torch.autograd.grad(out.sum(), (q, tensor, sinks)), (q, tensor, sinks), strict=True
        ):
            assert grad.dtype == of.dtype
            assert grad.shape == of.shape


def test_saved_tensors_may_move():
    """What a hook brings back, other memory with other strides, serves the backward pass as well."""
    q, k, v = (torch.randn(2, 3, 9, 8, requires_grad=True) for _ in range(3))
    plain = torch.autograd.grad(fastattn.attention(q, k, v).square().sum(), (q, k, v))

    def moved(t):
        return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() == 4 else t.clone()

    with torch.autograd.graph.saved_tensors_hooks(moved, lambda t: t):
        out = fastattn.attention(q, k, v)
    for grad, want in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), plain, strict=True):
        assert torch.equal(grad, want)


def test_batched_gradients_say_what_to_do():
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    for options in ({}, {"mask": causal()}):
        out = fastattn.attention(q, q, q, **options)
        with pytest.raises(NotImplementedError, match=r"one gradient at a time.*backend='reference'"):
            torch.autograd.grad(out, q, torch.ones(2, *out.shape), is_grads_batched=True)

"""summarize under torch.compile, opcheck, torch.func, checkpointing and double backward."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from call_support import EXACT, NATIVE, qkv, randn

from fastattn.biases import ALiBi
from fastattn.call import Call
from fastattn.inspect import fused, summarize
from fastattn.lowering import lower
from fastattn.masks import causal, padding, prefix
from fastattn.ops import _flat

pytestmark = pytest.mark.skipif(not NATIVE, reason="the native core is not built")

OPTIONS = {
    "plain": {},
    "causal": {"mask": causal()},
    "padding": {"mask": padding(torch.tensor([3, 7])), "pool_mode": "sum"},
    "blocks": {"mask": causal() | prefix(2), "softcap": 2.0},
    "bias": {"bias": randn(4, 5, 7), "pool_mode": "max"},
    "alibi": {"bias": ALiBi(randn(4)), "sinks": randn(4, seed=2)},
}
RESULTS = ("entropy", "received", "distance", "lse", "pooled")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def qk(**options):
    return qkv(2, 4, 2, 5, 7, **options)[:2]


def loss(q, k, **options):
    summary = summarize(q, k, **{"top_k": 2, "pool": (2, 3), **options})
    return sum(getattr(summary, name).sin().sum() for name in RESULTS)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_equal_those_of_the_definition(options):
    q, k = qk(grad=True)
    tensors = [q, k] + [t.requires_grad_() for t in options.values() if isinstance(t, torch.Tensor)]
    got = torch.autograd.grad(loss(q, k, **options), tensors)
    want = torch.autograd.grad(loss(q, k, **options, backend="reference"), tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("name", ["plain", "causal", "alibi"])
def test_gradcheck(name):
    torch.autograd.gradcheck(partial(loss, **OPTIONS[name]), qk(grad=True))


@pytest.mark.parametrize("name", ["causal", "blocks", "alibi"])
def test_compiles_in_one_graph(name):
    options = OPTIONS[name]
    q, k = qk(grad=True)
    compiled = torch.compile(partial(loss, **options), fullgraph=True, backend="aot_eager")
    got, want = compiled(q, k), loss(q, k, **options)
    torch.testing.assert_close(got, want, **EXACT)
    for a, b in zip(torch.autograd.grad(got, [q, k]), torch.autograd.grad(want, [q, k]), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_compiled_functions_return_summaries():
    q, k = qk()
    compiled = torch.compile(lambda q, k: summarize(q * 2, k, top_k=2), fullgraph=True, backend="aot_eager")
    want = summarize(q * 2, k, top_k=2)
    for name, tensor in compiled(q, k).tensors().items():
        torch.testing.assert_close(tensor, want.tensors()[name], **EXACT)


def op_arguments(q, k, lse=None, top_k=2, pool=(2, 3), pool_mode="mean", **options):
    operands, params = lower(Call("attention", q, k, k[..., :0], **options))
    return "cpu", q, k, lse, *operands, *_flat(params), top_k, *pool, pool_mode


@pytest.mark.parametrize("name", ["causal", "padding", "blocks", "bias", "alibi"])
def test_opcheck(name):
    options = OPTIONS[name]
    q, k = qk()
    if name != "bias":  # [batch, length, heads, head_dim] in memory
        q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
    arguments = op_arguments(q.requires_grad_(), k.requires_grad_(), **options)
    torch.library.opcheck(torch.ops.fastattn.attention_summary, arguments)


def test_opcheck_without_extras_and_of_backward():
    q, k = qk()
    torch.library.opcheck(torch.ops.fastattn.attention_summary, op_arguments(q, k, None, 0, (0, 0)))
    lse = summarize(q, k, mask=causal()).lse
    torch.library.opcheck(torch.ops.fastattn.attention_summary, op_arguments(q, k, lse, mask=causal()))
    rest = op_arguments(q, k, mask=causal(), sinks=randn(4), bias=randn(4, 5, 7))[4:-4]
    grads = randn(2, 4, 5), None, None, randn(2, 4, 5), randn(2, 4, 2, 3)
    arguments = "cpu", q, k, lse, *grads, *rest, "mean", [True] * (2 + fused.LOGITS)
    torch.library.opcheck(torch.ops.fastattn.attention_summary_backward, arguments)


@pytest.mark.parametrize("name", ["causal", "blocks", "bias", "alibi"])
def test_torch_func(name):
    options = OPTIONS[name]
    q, k = qk()
    queries = torch.stack([q, q.flip(2), q * 0.5])
    many = torch.func.vmap(partial(loss, **options), (0, None))(queries, k)
    gradients = torch.func.vmap(torch.func.grad(partial(loss, **options), (0, 1)), (0, None))(queries, k)
    for n, one in enumerate(queries):
        torch.testing.assert_close(many[n], loss(one, k, **options), **EXACT)
        want = torch.func.grad(partial(loss, **options, backend="reference"), (0, 1))(one, k)
        for a, b in zip(gradients, want, strict=True):
            torch.testing.assert_close(a[n], b, **EXACT)


def test_what_the_kernels_do_not_have_is_said():
    q, k = qk(grad=True)
    gradient = torch.autograd.grad(loss(q, k), q, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no double backward"):
        torch.autograd.grad(gradient.sum(), q)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: summarize(q, k.detach()).entropy, (q.detach(),), (q.detach(),))


SHORT = {"no mask": None, "band": causal(), "bool": torch.arange(140).view(1, 4, 5, 7) % 3 > 0}


@pytest.mark.parametrize("mask", SHORT.values(), ids=SHORT)
@pytest.mark.parametrize("lse_given", [False, True])
def test_the_short_way_to_the_kernels_gives_the_same_bits(mask, lse_given):
    q, k, _ = qkv(2, 4, 2, 5, 7)
    options = {"mask": mask, "top_k": 3, "pool": (2, 3)}
    if lse_given:  # no gradient flows into it, or out of it
        options["lse"] = summarize(q, k, mask=mask).lse.requires_grad_()
    short, full = summarize(q, k, **options), summarize(q, k, backend="cpu", **options)
    for name, tensor in full.tensors().items():
        torch.testing.assert_close(short.tensors()[name], tensor, rtol=0, atol=0, equal_nan=True)
        assert not short.tensors()[name].requires_grad


def test_checkpointing():
    q, k = qk(grad=True)
    checkpointed = torch.utils.checkpoint.checkpoint(loss, q, k, use_reentrant=False)
    want = torch.autograd.grad(loss(q, k), [q, k])
    for a, b in zip(torch.autograd.grad(checkpointed, [q, k]), want, strict=True):
        assert torch.equal(a, b)

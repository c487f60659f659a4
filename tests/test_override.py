"""override_sdpa: which calls it reaches, when, and what it leaves behind."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from patch_support import compile_and_watch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as imported_by_name
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.integrations.torch import override_sdpa


def qkv(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 5, 8, generator=generator) for _ in range(3)]


class Net(nn.Module):
    """A model that knows nothing of fastattn."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.proj, self.dropout = nn.Linear(16, 48), nn.Linear(16, 16), dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout)
        return self.proj(y.transpose(1, 2).flatten(2))


def inputs(length: int = 6) -> Tensor:
    return torch.randn(2, length, 16, generator=torch.Generator().manual_seed(1))


def is_active() -> bool:
    """Whether the override holds here: ours refuses a mask with is_causal, in words of its own."""
    mask = torch.zeros(5, 5)
    try:
        F.scaled_dot_product_attention(*qkv(), attn_mask=mask, is_causal=True)
    except ValueError:
        return True
    except RuntimeError:
        pass
    return False


# Which calls


def test_under_any_name(calls):
    q, k, v = qkv()
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with override_sdpa():
        for function in (F.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention):
            torch.testing.assert_close(function(q, k, v, is_causal=True), want)
        torch.testing.assert_close(imported_by_name(query=q, key=k, value=v, is_causal=True), want)
    assert len(calls) == 3


def test_every_argument_arrives():
    q, k, v = qkv()
    mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(1)) > 0.3
    for arguments in (
        {"attn_mask": mask},
        {"attn_mask": mask.float()},
        {"is_causal": True, "scale": 0.3},
        {"attn_mask": causal_lower_right(5, 5)},
    ):
        with override_sdpa():
            got = F.scaled_dot_product_attention(q, k, v, **arguments)
        assert torch.equal(got, fastattn.scaled_dot_product_attention(q, k, v, **arguments))
        torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, **arguments))
    with override_sdpa():
        got = F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], mask, 0.0, False, enable_gqa=True)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], mask))


def test_model_and_its_gradients(calls):
    net, x = Net(), inputs()
    results = []
    for context in (warnings.catch_warnings, override_sdpa):
        with context():
            loss = net(x).square().sum()
        net.zero_grad()
        loss.backward()
        results.append([loss, *(p.grad for p in net.parameters())])
    assert len(calls) == 1
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_dropout_is_ours():
    torch.manual_seed(0)
    want = fastattn.scaled_dot_product_attention(*qkv(), dropout_p=0.5)
    torch.manual_seed(0)
    with override_sdpa():
        got = F.scaled_dot_product_attention(*qkv(), dropout_p=0.5)
    assert torch.equal(got, want)


@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention_and_encoder_layers(calls, training):
    torch.manual_seed(0)
    for module, arguments in (
        (
            nn.MultiheadAttention(16, 2, batch_first=True),
            {"key": inputs(), "value": inputs(), "need_weights": False},
        ),
        (nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), {}),
        (nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True), {"memory": inputs()}),
    ):
        module.train(training)
        with torch.no_grad():
            want = module(inputs(), **arguments)
            before = len(calls)
            with override_sdpa():
                got = module(inputs(), **arguments)
        assert len(calls) > before
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("how", ["tensor", "autograd.backward", "autograd.grad"])
def test_checkpointing_with_backward_inside(calls, how, use_reentrant):
    if use_reentrant and how == "autograd.grad":
        pytest.skip("torch's reentrant checkpoints refuse autograd.grad")
    net, x = Net(), inputs().requires_grad_()
    (want,) = torch.autograd.grad(net(x).sum(), x)
    with override_sdpa():
        loss = checkpoint(net, x, use_reentrant=use_reentrant).sum()
        if how == "autograd.grad":
            (x.grad,) = torch.autograd.grad(loss, x)
        elif how == "autograd.backward":
            torch.autograd.backward(loss)
        else:
            loss.backward()
        assert len(calls) == 2
        assert is_active()
    torch.testing.assert_close(x.grad, want)


def test_autocast(calls):
    with override_sdpa(), torch.autocast("cpu", torch.bfloat16):
        out = F.scaled_dot_product_attention(*qkv())
    assert out.dtype == torch.bfloat16
    assert len(calls) == 1


def test_under_functorch_transforms():
    q, k, v = qkv()
    want = F.scaled_dot_product_attention(q, k, v)
    with override_sdpa():
        got = torch.func.vmap(F.scaled_dot_product_attention)(q, k, v)
        grad = torch.func.grad(lambda q: F.scaled_dot_product_attention(q, k, v).sum())(q)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        grad, torch.func.grad(lambda q: F.scaled_dot_product_attention(q, k, v).sum())(q)
    )


# When


def test_undone_afterwards_and_after_an_exception():
    torchs_own = F.scaled_dot_product_attention
    with override_sdpa():
        assert is_active()
        assert F.scaled_dot_product_attention is torchs_own
    assert not is_active()
    with pytest.raises(KeyError), override_sdpa():
        raise KeyError
    assert not is_active()
    with pytest.raises(ValueError, match="attn_mask must be None"), override_sdpa():
        F.scaled_dot_product_attention(*qkv(), attn_mask=torch.zeros(5, 5), is_causal=True)
    assert not is_active()


def test_one_object_again_and_inside_itself():
    override = override_sdpa()
    for _ in range(2):
        with override:
            with override:
                assert is_active()
            assert is_active()
        assert not is_active()


def test_the_innermost_backend_counts(calls):
    q, k, v = qkv()
    want = F.scaled_dot_product_attention(q, k, v)
    for outer, inner in ((None, "reference"), ("reference", None), ("cpu", "torch"), ("torch", "torch")):
        calls.clear()
        with override_sdpa(outer), override_sdpa(inner):
            got = F.scaled_dot_product_attention(q, k, v)
        assert calls[0]["backend"] == inner
        assert torch.equal(got, fastattn.scaled_dot_product_attention(q, k, v, backend=inner))
        torch.testing.assert_close(got, want)


def test_our_own_torch_backend_is_not_sent_round_again(calls):
    q, k, v = qkv()
    with override_sdpa("reference"):
        got = fastattn.attention(q, k, v, backend="torch")
    assert calls == []
    assert torch.equal(got, F.scaled_dot_product_attention(q, k, v))


def test_other_modes_outside_and_inside():
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch(), override_sdpa():
        F.scaled_dot_product_attention(*qkv())
    assert fastattn.scaled_dot_product_attention in seen
    assert F.scaled_dot_product_attention not in seen
    seen.clear()
    with override_sdpa(), Watch():
        F.scaled_dot_product_attention(*qkv())
        assert is_active()
    assert F.scaled_dot_product_attention in seen


def test_default_device():
    with torch.device("cpu"), override_sdpa(), torch.device("cpu"):
        assert is_active()


def test_threads():
    """It holds in threads that enter it, with one object for all, and in no others."""
    override, barrier, found = override_sdpa(), threading.Barrier(4, timeout=30), {}

    def work(index: int) -> None:
        found[index] = [is_active()]
        if index % 2:
            with override:
                barrier.wait()
                found[index].append(is_active())
                torch.testing.assert_close(net(x), want)
                barrier.wait()
        else:
            barrier.wait()
            found[index].append(is_active())
            barrier.wait()
        found[index].append(is_active())

    net, x = Net(), inputs()
    want = net(x)
    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    with override:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert is_active()
    assert found == {index: [False, bool(index % 2), False] for index in range(4)}


# What it does not take


def test_bad_backend():
    with pytest.raises(
        ValueError, match="backend must be one of cuda, triton, cpu, torch, reference, got 'fast'"
    ):
        override_sdpa("fast")
    with pytest.raises(TypeError, match="backend must be a string or None, got int"):
        override_sdpa(3)
    assert not is_active()
    with override_sdpa("cpu") as override:
        assert repr(override) == "override_sdpa(backend='cpu')"


class Own(Tensor):
    """A subclass that handles functions itself."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return "handled"
        return super().__torch_function__(func, types, args, kwargs)


class Plain(Tensor):
    """A subclass that adds nothing."""


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: torch.empty(1, 2, 4, 8, device="meta"),
            "no kernel for meta .*cpu: it runs on cpu tensors, not meta",
        ),
        (
            lambda: torch.empty(1, 2, 4, 8).as_subclass(Own),
            "query is a Own, which has a behaviour of its own",
        ),
        (lambda: torch.nested.nested_tensor([torch.ones(2, 4, 8)] * 2), "query is a nested tensor"),
    ],
    ids=["meta", "subclass", "nested"],
)
def test_what_no_kernel_takes_goes_to_torch_with_one_warning(calls, make, reason):
    q = make()
    with override_sdpa():
        with pytest.warns(UserWarning, match=f"leaves a call to PyTorch's .*: {reason}"):
            first = F.scaled_dot_product_attention(q, q, q)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            F.scaled_dot_product_attention(q, q, q)
    assert calls == []
    assert type(first) is type(F.scaled_dot_product_attention(q, q, q))


def test_multihead_attention_of_subclasses_goes_to_torch_with_a_warning(calls):
    x = inputs().as_subclass(Own)
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    with override_sdpa(), pytest.warns(UserWarning, match="multi_head_attention_forward has a Own"):
        attention(x, x, x)
    assert calls == []


def test_a_dtype_without_kernels_goes_to_torch(calls):
    q = torch.ones(1, 1, 2, 2, dtype=torch.complex64)
    with override_sdpa(), pytest.warns(UserWarning, match="query has dtype complex64"):
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(q, q, q)
    with override_sdpa("cpu"), pytest.raises(TypeError, match=r"query must be one of .*, got complex64"):
        F.scaled_dot_product_attention(q, q, q)


def test_a_forced_backend_does_not_fall_through():
    q = torch.empty(1, 2, 4, 8, device="meta")
    with override_sdpa("cpu"), pytest.raises(NotImplementedError, match="it runs on cpu tensors, not meta"):
        F.scaled_dot_product_attention(q, q, q)


def test_subclasses_that_add_nothing_are_taken(calls):
    q, k, v = qkv()
    want = F.scaled_dot_product_attention(q, k, v)
    with override_sdpa():
        for wrap in (nn.Parameter, nn.Buffer, lambda t: t.as_subclass(Plain)):
            got = F.scaled_dot_product_attention(wrap(q), wrap(k), wrap(v))
            torch.testing.assert_close(got.detach().as_subclass(Tensor), want)
        assert type(F.scaled_dot_product_attention(q.as_subclass(Plain), k, v)) is Plain
    assert len(calls) == 4


def test_wrong_arguments_raise_our_errors():
    q, k, v = qkv()
    with override_sdpa():
        with pytest.raises(ValueError, match="head_dim 8, got 4"):
            F.scaled_dot_product_attention(q, k[..., :4], v)
        with pytest.raises(TypeError, match="attn_mask must be one of bool, float32, got int64"):
            F.scaled_dot_product_attention(q, k, v, torch.ones(5, 5, dtype=torch.int64))
        with pytest.raises(TypeError):
            F.scaled_dot_product_attention(q, k)


# Under torch.compile


def test_compiled_model_inside_and_outside():
    """One graph for each side; entering and leaving picks between them."""
    net, x = Net(), inputs()
    want = net(x)
    compiled, found = compile_and_watch(net, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), want)
        with override_sdpa():
            torch.testing.assert_close(compiled(x), want)
    assert len(found) == 2
    outside, inside = found
    assert "_nn.scaled_dot_product_attention" in outside
    assert "fastattn.attention_forward" in inside
    assert "_nn.scaled_dot_product_attention" not in inside


def test_compiled_encoder_layer():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    want = layer(inputs())
    compiled, found = compile_and_watch(layer, fullgraph=True)
    with override_sdpa():
        torch.testing.assert_close(compiled(inputs()), want)
    assert "fastattn.attention_forward" in found[0]
    assert "_nn.scaled_dot_product_attention" not in found[0]


def test_entered_in_compiled_code():
    net = Net()

    class Inside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with override_sdpa():
                return net(x)

    compiled, found = compile_and_watch(Inside())
    torch.testing.assert_close(compiled(inputs()), net(inputs()))
    assert not is_active()
    assert not any("_nn.scaled_dot_product_attention" in code for code in found)


def test_gradients_of_a_compiled_model():
    net, x = Net(), inputs()
    net(x).square().sum().backward()
    want = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with override_sdpa():
        loss = compiled(x).square().sum()
    loss.backward()
    for parameter, grad in zip(net.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-5)

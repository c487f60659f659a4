"""replace_modules: equal to the originals, on our kernels throughout."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from patch_support import compile_and_watch, rand
from replace_modules_support import SIZES, B, E, L, S, new_model, padding
from torch import Tensor, nn

from fastattn.backends import cpu
from fastattn.integrations.torch import override_sdpa, replace_modules

pytestmark = [
    pytest.mark.usefixtures("native", "one_thread"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]


@pytest.fixture
def kernels(native, monkeypatch) -> list[str]:
    """The attention kernels that run, by name."""
    seen: list[str] = []

    def watched(name: str) -> Callable:
        def call(*args):
            seen.append(name)
            return getattr(native, name)(*args)

        return call

    names = [name for name in dir(native) if name.startswith("attention")]
    others = {name: getattr(native, name) for name in dir(native) if not name.startswith("_")}
    monkeypatch.setattr(cpu, "_C", SimpleNamespace(**{**others, **{name: watched(name) for name in names}}))
    return seen


def as_float(blocked: Tensor) -> Tensor:
    return torch.zeros(blocked.shape).masked_fill(blocked, -torch.inf)


def blocked_after(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


# (module of the options batch_first and norm_first, arguments beside the sequences, attention calls)
LAYER = nn.TransformerEncoderLayer
MODELS: dict[str, tuple[Callable[..., nn.Module], int, dict]] = {
    "layer": (lambda **o: LAYER(**SIZES, **o), 1, {}),
    "layer_causal": (
        lambda **o: LAYER(**SIZES, **o),
        1,
        {"src_mask": blocked_after(L), "is_causal": True},
    ),
    "layer_bool": (
        lambda **o: LAYER(**SIZES, **o),
        1,
        {"src_mask": blocked_after(L), "src_key_padding_mask": padding(B, L, 2)},
    ),
    "encoder_padding": (
        lambda **o: nn.TransformerEncoder(LAYER(**SIZES, **o), 2),
        2,
        {"src_key_padding_mask": padding(B, L, 2)},
    ),
    "encoder_float_padding": (
        lambda **o: nn.TransformerEncoder(LAYER(**SIZES, **o), 2),
        2,
        {"mask": as_float(blocked_after(L)), "src_key_padding_mask": as_float(padding(B, L, 2))},
    ),
    "decoder": (
        lambda **o: nn.TransformerDecoder(nn.TransformerDecoderLayer(**SIZES, **o), 2),
        4,
        {"tgt_mask": as_float(blocked_after(L)), "memory_key_padding_mask": padding(B, S, 2)},
    ),
    "transformer": (
        lambda **o: nn.Transformer(**SIZES, **o, num_encoder_layers=1, num_decoder_layers=2),
        5,
        {
            "src_key_padding_mask": padding(B, L, 2),
            "memory_key_padding_mask": padding(B, L, 2),
            "tgt_mask": blocked_after(S),
            "tgt_is_causal": True,
        },
    ),
}


def sequences(name: str, batch_first: bool) -> tuple[Tensor, ...]:
    x, y = rand(B, L, E, seed=1), rand(B, S, E, seed=2)
    found = (x, y) if name in ("decoder", "transformer") else (x,)
    return tuple(t if batch_first else t.transpose(0, 1).contiguous() for t in found)


def outcome(model: nn.Module, inputs: tuple[Tensor, ...], arguments: dict, grad: bool) -> list[Tensor]:
    """The output, and the gradients of the inputs and parameters."""
    inputs = tuple(t.clone().requires_grad_(grad) for t in inputs)
    with torch.set_grad_enabled(grad):
        out = model(*inputs, **arguments)
    if not grad:
        return [out]
    leaves = [*inputs, *model.parameters()]
    return [out.detach(), *torch.autograd.grad((out * rand(*out.shape, seed=4)).sum(), leaves)]


@pytest.mark.parametrize("mode", ["train", "eval", "eval_no_grad"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_the_original(kernels, name, norm_first, batch_first, mode):
    """Forward and gradients, on our kernels throughout; afterwards PyTorch's again, to the bit."""
    make, attentions, arguments = MODELS[name]
    torch.manual_seed(0)
    model = make(batch_first=batch_first, norm_first=norm_first).train(mode == "train")
    inputs, grad = sequences(name, batch_first), mode != "eval_no_grad"
    want = outcome(model, inputs, arguments, grad)
    assert kernels == []
    with replace_modules(model) as report:
        got = outcome(model, inputs, arguments, grad)
    assert len(report.replaced) == attentions
    assert kernels == ["attention_fwd"] * attentions + ["attention_bwd"] * (attentions if grad else 0)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    after = outcome(model, inputs, arguments, grad)
    assert len(kernels) == attentions * (2 if grad else 1)
    assert all(torch.equal(a, b) for a, b in zip(after, want, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_finite_masks_are_added(training):
    """Also in eval, where PyTorch's fast path takes every number but 0 for blocked."""
    torch.manual_seed(0)
    model = LAYER(**SIZES, batch_first=True).train(training)
    x, mask = rand(B, L, E), rand(L, L, seed=3)
    with torch.no_grad():
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            want = model(x, src_mask=mask)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        replace_modules(model)
        torch.testing.assert_close(model(x, src_mask=mask), want)


def test_dropout_and_autocast(kernels):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(E, 2, 24, dropout=0.5, batch_first=True)
    replace_modules(model)
    x = rand(B, L, E)
    torch.manual_seed(1)
    first = model(x)
    assert not torch.equal(model(x), first)
    torch.manual_seed(1)
    assert torch.equal(model(x), first)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().sum().backward()
    assert model.self_attn.in_proj_weight.grad.isfinite().all()
    assert kernels.count("attention_fwd") == 4


# With the rest


def test_compiled_before_and_after():
    """Compiled code notices the change, both ways."""
    model, x = nn.TransformerEncoderLayer(**SIZES, batch_first=True), rand(B, L, E)
    compiled, graphs = compile_and_watch(model, fullgraph=True)
    want = compiled(x)
    with replace_modules(model):
        torch.testing.assert_close(compiled(x), want)
    torch.testing.assert_close(compiled(x), want)
    assert ["fastattn" in graph for graph in graphs[:2]] == [False, True]
    torch._dynamo.reset()


def test_under_override_sdpa(kernels):
    """Both at once: each attention runs once, on our kernels."""
    model, x, y = new_model().eval(), rand(B, L, E), rand(B, S, E)
    with torch.no_grad():
        want = model(x, y)
        with replace_modules(model), override_sdpa():
            torch.testing.assert_close(model(x, y), want)
            F.scaled_dot_product_attention(x, x, x)
    assert kernels == ["attention_fwd"] * 4

"""fastattn.patch: the right route for each module, and one report."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from patch_models import (
    HEADS,
    Base,
    Calls,
    CallsAScript,
    E,
    HasAScriptedSoftmax,
    HasAScriptInBetween,
    HasItsOwnGradient,
    LinearAttention,
    ReturnsWeights,
    X,
    assert_same,
    new_model,
    outcome,
    scripted_scale,
)
from torch import Tensor, nn

import fastattn
import fastattn.nn
from fastattn.integrations.handwritten.swap import is_swapped, notes_of
from fastattn.integrations.routes import OPAQUE

pytestmark = pytest.mark.usefixtures("native", "one_thread")


REPORT = """replaced 5, left 0 as they were
  1 MultiheadAttention: became fastattn.nn.MultiheadAttention
    0.self_attn
  1 Calls: its scaled_dot_product_attention is fastattn's
    1
  1 CallsByAFunction: its scaled_dot_product_attention is fastattn's
    2
  1 WritesOut: its product, softmax and product are one call of fastattn
    3
  1 Mixes: {}
    4"""
FUSES = "its product, softmax and product are one call of fastattn"
DOES_NOT = "computed as written so far, for its weights went into add, flip"


def test_every_route_at_once(calls):
    """Forward and backward equal to stock; the report says what runs, and what was found not to fuse."""
    model = new_model()
    want = outcome(model, X)
    report = fastattn.patch(model)
    assert str(report) == REPORT.format(FUSES)
    assert list(report.replaced) == ["0.self_attn", "1", "2", "3", "4"]
    assert_same(outcome(model, X), want)
    assert len(calls) == 2
    assert [notes_of(model[i]).fused for i in (3, 4)] == [1, 0]
    assert str(report) == REPORT.format(DOES_NOT)
    report.undo()
    assert all(torch.equal(a, b) for a, b in zip(outcome(model, X), want, strict=True))
    assert len(calls) == 2
    assert not any(is_swapped(module) for module in model.modules())


def test_what_is_left_and_why():
    replaced_forward = Calls()
    replaced_forward.forward = lambda x: x
    model = nn.ModuleDict(
        {
            "calls": Calls(),
            "linear": LinearAttention(),
            "own": HasItsOwnGradient(),
            "replaced": replaced_forward,
            "scripted": torch.jit.script(nn.MultiheadAttention(E, HEADS)),
            "ours": fastattn.nn.MultiheadAttention(E, HEADS),
        }
    )
    report = fastattn.patch(model)
    assert list(report.replaced) == ["calls"]
    assert dict(report.left) == {
        "linear": "no attention found in its code: neither a call of F.scaled_dot_product_attention nor a "
        "product, a softmax and a product",
        "own": OPAQUE,
        "replaced": "its forward was replaced",
        "scripted": "it is compiled by TorchScript",
        "ours": "it is fastattn's already",
    }
    assert torch.equal(replaced_forward(X), X)


@pytest.mark.parametrize("kind", [CallsAScript, HasAScriptedSoftmax, HasAScriptInBetween])
def test_functions_of_torchscript(kind):
    """What they compute is computed as it was, and the report says so."""
    model = kind()
    want = outcome(model, X)
    report = fastattn.patch(model)
    attends = "it attends in a function that is compiled by TorchScript"
    assert report.left == {"": OPAQUE if kind is HasAScriptInBetween else attends}
    assert all(torch.equal(a, b) for a, b in zip(outcome(model, X), want, strict=True))


class HasAHiddenScript(Base):
    """Its code does not show it."""

    def __init__(self, scale: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(self.scale(q @ k.mT).softmax(-1) @ v)


def test_hidden_functions_of_torchscript():
    """They get the values where no gradient would be lost, and are told of where one would."""
    model = HasAHiddenScript(scripted_scale)
    want = model(X)
    report = fastattn.patch(model)
    with torch.no_grad():
        assert torch.equal(model(X), want)
    with pytest.raises(RuntimeError, match=r"(?s)autograd would not see that: leave this module .* skip="):
        model(X)
    report.undo()
    assert torch.equal(model(X), want)


class ForScript(nn.Module):
    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.qkv, self.calls = nn.Linear(E, 3 * E), calls

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.calls:
            return F.scaled_dot_product_attention(q, k, v)
        return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


def test_scripted_models():
    """By what they compute, whatever they are called."""
    model = torch.jit.script(nn.Sequential(ForScript(True), ForScript(False), nn.Linear(E, E)))
    want = model(X)
    report = fastattn.patch(model)
    assert not report.replaced
    assert set(report.left.values()) == {"it is compiled by TorchScript"}
    assert list(report.left) == ["0", "1"]
    assert torch.equal(model(X), want)
    assert list(fastattn.patch(nn.Sequential(model, Calls())).replaced) == ["1"]


def test_weights_come_with_the_output():
    model = ReturnsWeights()
    want, want_weights = model(X)
    with fastattn.patch(model):
        got, weights = model(X)
    assert type(weights) is Tensor
    assert_same([got, weights], [want, want_weights])
    assert_same(
        [*torch.autograd.grad(weights.square().sum(), model.qkv.weight)],
        [*torch.autograd.grad(want_weights.square().sum(), model.qkv.weight)],
    )


@pytest.mark.parametrize(
    ("skip", "left"),
    [(["1"], ["1"]), (["0", "3"], ["0.self_attn", "3"]), (["*"], ["0.self_attn", "1", "2", "3", "4"])],
    ids=str,
)
def test_skip(skip, left):
    report = fastattn.patch(new_model(), skip=skip)
    assert list(report.left) == left
    assert len(report.replaced) == 5 - len(left)
    assert report.left[left[0]] == f"skip has {skip[0]!r}"


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got type"):
        fastattn.patch(nn.Linear)
    with pytest.raises(TypeError, match=r"skip must be a collection of names, got the one string '1'"):
        fastattn.patch(new_model(), skip="1")
    with pytest.raises(TypeError, match=r"skip must be a collection of names, got a NoneType"):
        fastattn.patch(new_model(), skip=None)
    with pytest.raises(TypeError, match=r"skip must hold names, got 3"):
        fastattn.patch(new_model(), skip=["1", 3])
    with pytest.raises(ValueError, match=r"skip must hold names of modules .* got 'layer.\*'"):
        fastattn.patch(new_model(), skip=["layer.*"])

"""fastattn.patch: the right route for each module, one report, undone in any order, saved and loaded."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from patch_support import rand
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fastattn
import fastattn.nn
from fastattn.integrations.handwritten.swap import is_swapped, notes_of
from fastattn.integrations.routes import OPAQUE
from fastattn.integrations.torch import override_sdpa, replace_modules

pytestmark = pytest.mark.usefixtures("native", "one_thread")

E, HEADS = 16, 2


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def merge(self, x: Tensor) -> Tensor:
        return self.out(x.transpose(1, 2).flatten(2))


class Calls(Base):
    """Attention by PyTorch's function."""

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(F.scaled_dot_product_attention(*self.heads(x), is_causal=True))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class CallsByAFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.merge(attend(*self.heads(x)))


class WritesOut(Base):
    """Attention as many repositories have it."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(self.attend(q @ k.transpose(-1, -2) * (E // HEADS) ** -0.5) @ v)


class ReturnsWeights(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.heads(x)
        weights = torch.matmul(q, k.mT).softmax(-1)
        return self.merge(torch.matmul(weights, v)), weights


class Mixes(Base):
    """No call of attention has these weights."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = (q @ k.mT).softmax(-1)
        return self.merge((weights + weights.flip(1)) @ v)


class LinearAttention(Base):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(F.elu(q) * (F.elu(k) * v).cumsum(-2))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class HasItsOwnGradient(Base):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(Double.apply(q @ k.mT).softmax(-1) @ v)


@torch.jit.script
def scripted_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@torch.jit.script
def scripted_softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores * 0.5, -1)


@torch.jit.script
def scripted_scale(scores: Tensor) -> Tensor:
    return scores * 0.5


class CallsAScript(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.merge(scripted_attention(*self.heads(x)))


class HasAScriptedSoftmax(Base):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(scripted_softmax(q @ k.mT) @ v)


class HasAScriptInBetween(Base):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(scripted_scale(q @ k.mT).softmax(-1) @ v)


def new_model() -> nn.Sequential:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(E, HEADS, 2 * E, dropout=0.0, batch_first=True)
    return nn.Sequential(encoder, Calls(), CallsByAFunction(), WritesOut(), Mixes())


def outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    return [out, *torch.autograd.grad((out * rand(*out.shape, seed=1)).sum(), [x, *model.parameters()])]


X = rand(2, 6, E)


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


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


# Undoing


def test_twice_and_out_of_order():
    model = new_model()
    first = fastattn.patch(model)
    second = fastattn.patch(model)
    assert set(second.left.values()) == {"it is fastattn's already"}
    assert (list(second.replaced), list(second.left)) == ([], list(first.replaced))
    second.undo()
    assert is_swapped(model[1])
    first.undo()
    third = fastattn.patch(model)
    assert third.replaced == first.replaced
    first.undo()
    second.undo()
    assert is_swapped(model[1])
    assert type(model[0].self_attn) is fastattn.nn.MultiheadAttention
    third.undo()
    assert not is_swapped(model[1])
    assert type(model[0].self_attn) is nn.MultiheadAttention


def test_parts_first():
    """A patch of a part keeps what it took from one of the whole, in either order of undoing."""
    model = new_model()
    part = fastattn.patch(model[1])
    whole = fastattn.patch(model)
    assert list(part.replaced) == [""]
    assert whole.left == {"1": "it is fastattn's already"}
    whole.undo()
    assert [is_swapped(module) for module in model] == [False, True, False, False, False]
    part.undo()
    assert not is_swapped(model[1])


def test_undone_where_the_block_ends():
    model = new_model()
    with pytest.raises(KeyError), fastattn.patch(model) as report:
        assert is_swapped(model[1])
        assert report.replaced
        raise KeyError
    assert not is_swapped(model[1])
    report.undo()


def test_after_another_change_of_class():
    model = nn.Sequential(Calls(), nn.MultiheadAttention(E, HEADS))
    report = fastattn.patch(model)
    for module, name in ((model[0].qkv, "weight"), (model[0], "note"), (model[1], "in_proj_weight")):
        if name == "note":
            module.note = nn.Parameter(torch.ones(1))
        parametrize.register_parametrization(module, name, nn.Identity())
    with pytest.warns(UserWarning, match="has become a Parametrized.* since and is left so"):
        report.undo()
    for module, name in ((model[0], "note"), (model[1], "in_proj_weight")):
        parametrize.remove_parametrizations(module, name)
    report.undo()
    assert [type(module) for module in model] == [Calls, nn.MultiheadAttention]


def test_after_replace_modules():
    """Each gives back its own."""
    model = new_model()
    inner = replace_modules(model)
    report = fastattn.patch(model)
    assert report.left == {"0.self_attn": "it is fastattn's already"}
    inner.undo()
    report.undo()
    assert type(model[0].self_attn) is nn.MultiheadAttention
    assert not is_swapped(model[1])


def test_modules_with_two_names():
    shared = Calls()
    model = nn.ModuleDict({"a": shared, "b": shared})
    report = fastattn.patch(model)
    assert list(report.replaced) == ["a", "b"]
    report.undo()
    assert not is_swapped(shared)


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
    with pytest.raises(ValueError, match=r"skip must hold names of modules .* got 'layer.\*'"):
        fastattn.patch(new_model(), skip=["layer.*"])


# Everything else stays


def test_objects_stay():
    """Parameters, names, hooks, class names and isinstance."""
    model, seen = new_model(), []
    model[1].register_forward_hook(lambda *args: seen.append("forward"))
    model[3].register_full_backward_hook(lambda *args: seen.append("backward"))
    parameters, names = dict(model.named_parameters()), [type(m).__name__ for m in model.modules()]
    text = str(model[1:])
    fastattn.patch(model)
    assert list(model.named_parameters()) == list(parameters.items())
    assert [type(m).__name__ for m in model.modules()] == names
    assert str(model[1:]) == text
    assert isinstance(model[1], Calls)
    outcome(model, X)
    assert seen == ["forward", "backward"]


def test_state_dicts_both_ways():
    ours, theirs = new_model(), new_model()
    fastattn.patch(ours)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same([ours(X)], [theirs(X)])
    ours.load_state_dict(theirs.state_dict(), strict=True)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_stay_patched(how):
    """And are their own: undoing the original leaves them."""
    model = new_model()
    want = model(X)
    report = fastattn.patch(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    report.undo()
    assert [is_swapped(module) for module in other] == [False, True, True, True, True]
    assert type(other[0].self_attn) is fastattn.nn.MultiheadAttention
    assert_same([other(X)], [want])
    assert notes_of(other[3]).fused == 1
    assert fastattn.patch(other).left["1"] == "it is fastattn's already"


def test_in_other_threads():
    model, found = new_model(), []
    want = model(X)
    fastattn.patch(model)
    threads = [threading.Thread(target=lambda: found.append(model(X).detach())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(found, [want] * 4)


def test_checkpointing_runs_ours_again(calls):
    """In backward, outside of every block of ours, the forward is run once more by the same kernels."""
    model = new_model()
    want = outcome(model, X)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.model, x, use_reentrant=False)

    fastattn.patch(model)
    assert_same(outcome(Checkpointed(), X), want)
    assert len(calls) == 4


def test_dropout_and_autocast():
    class Drops(WritesOut):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            weights = F.dropout(self.attend(q @ k.mT), 0.5, self.training)
            return self.merge(weights @ v)

    model = Drops()
    fastattn.patch(model)
    torch.manual_seed(1)
    first = model(X)
    assert not torch.equal(model(X), first)
    torch.manual_seed(1)
    assert torch.equal(model(X), first)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(X)
    assert out.dtype == torch.bfloat16
    assert notes_of(model).fused == 4


def test_compiled():
    """Calls are ours in the graph; what is written out is left to the compiler; undoing is noticed."""
    found = []

    def backend(graph, example_inputs):
        found.append("fastattn" in graph.code)
        return graph

    torch._dynamo.reset()
    model = nn.Sequential(Calls(), WritesOut())
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    want = model(X)
    with fastattn.patch(model):
        assert_same([compiled(X)], [want])
    assert_same([compiled(X)], [want])
    assert found == [True, False]
    torch._dynamo.reset()


def test_under_torch_func():
    model = WritesOut()
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    want = torch.func.grad(loss)(parameters, X)
    fastattn.patch(model)
    assert_same(list(torch.func.grad(loss)(parameters, X).values()), list(want.values()))


def test_under_override_sdpa(calls):
    model = new_model()
    want = outcome(model, X)
    with fastattn.patch(model), override_sdpa():
        assert_same(outcome(model, X), want)
    assert len(calls) == 2


def test_import_stays_quick():
    """Neither fastattn nor patch bring a library in that the program does not use."""
    code = (
        "import sys, torch, fastattn; fastattn.patch(torch.nn.Linear(1, 1)); "
        "print({'transformers', 'diffusers', 'timm', 'triton', 'matplotlib'} & set(sys.modules))"
    )
    root = Path(fastattn.__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=root)
    assert out.stdout.strip() == "set()"

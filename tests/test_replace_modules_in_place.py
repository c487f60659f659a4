"""replace_modules: objects stay, what has a behaviour of its own is left, nested tensors are taken."""

from __future__ import annotations

import pytest
import torch
from patch_support import rand
from replace_modules_support import OURS, TORCHS, B, Doubled, E, L, S, new_model, types
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastattn.nn
from fastattn.backends import cpu
from fastattn.integrations.torch import replace_modules

pytestmark = [
    pytest.mark.usefixtures("native", "one_thread"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]


def test_everything_else_stays():
    """Objects, parameters, their order, flags, hooks, attributes; undone, not a trace is left."""
    model = new_model().eval()
    attention = model.encoder.layers[0].self_attn
    attention.train()
    attention.in_proj_bias.requires_grad_(False)
    attention.note = "mine"
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    report = replace_modules(model)
    assert types(model) == OURS
    assert dict(model.named_modules()) == modules
    assert list(model.named_parameters()) == list(parameters.items())
    assert attention.training
    assert attention.note == "mine"
    assert isinstance(attention, nn.MultiheadAttention)
    report.undo()
    assert types(model) == TORCHS
    assert {name: module.__dict__ for name, module in model.named_modules()} == before


def test_hooks_go_on():
    model, seen = new_model(), []
    attention = model.encoder.layers[0].self_attn
    attention.register_forward_pre_hook(lambda *a: seen.append("pre"))
    attention.register_forward_hook(lambda *a: seen.append("forward"))
    attention.register_full_backward_hook(lambda *a: seen.append("backward"))
    attention.register_state_dict_post_hook(lambda *a: seen.append("state_dict"))
    replace_modules(model)
    model(rand(B, L, E).requires_grad_(), rand(B, S, E)).sum().backward()
    model.state_dict()
    assert seen == ["pre", "forward", "backward", "state_dict"]


def test_optimizer_goes_on():
    results = []
    for swap in (False, True):
        model = new_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for step in range(4):
            if swap and step == 2:
                replace_modules(model)
            optimizer.zero_grad()
            (model(rand(B, L, E), rand(B, S, E)) * rand(B, S, E, seed=5)).sum().backward()
            optimizer.step()
        results.append(model(rand(B, L, E), rand(B, S, E)))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_state_dicts_both_ways():
    ours, theirs = new_model(), new_model()
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    replace_modules(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, y = rand(B, L, E), rand(B, S, E)
    torch.testing.assert_close(ours(x, y), theirs(x, y), rtol=1e-4, atol=1e-4)


def test_shared_modules_stay_shared():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(E, 2), "b": nn.ModuleList([nn.Linear(1, 1)])})
    model["b"].append(model["a"])
    report = replace_modules(model)
    assert report.replaced == ("a", "b.1")
    assert model["a"] is model["b"][1]
    assert type(model["a"]) is fastattn.nn.MultiheadAttention
    report.undo()
    assert type(model["a"]) is nn.MultiheadAttention


def test_a_model_that_is_one_itself():
    model = nn.MultiheadAttention(E, 2, batch_first=True)
    x = rand(B, L, E)
    want = model(x, x, x)
    report = replace_modules(model)
    assert report.replaced == ("",)
    assert str(report) == "replaced 1, left 0 as they were\n  (the model itself)"
    assert type(model) is fastattn.nn.MultiheadAttention
    torch.testing.assert_close(model(x, x, x), want)


@pytest.mark.parametrize(
    "options",
    [
        {"kdim": 4, "vdim": 12},
        {"bias": False},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_every_kind_of_attention(options):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(E, 2, batch_first=True, **options)
    dtype = options.get("dtype", torch.float32)
    query, key, value = (
        rand(B, L, size).to(dtype) for size in (E, options.get("kdim", E), options.get("vdim", E))
    )
    want = model(query, key, value)
    assert replace_modules(model).replaced == ("",)
    torch.testing.assert_close(model(query, key, value), want)


# What is left


class Mine(nn.MultiheadAttention):
    """A subclass."""


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_what_is_left_and_why():
    scripted = torch.jit.script(nn.MultiheadAttention(E, 2))
    parametrized = nn.MultiheadAttention(E, 2)
    parametrize.register_parametrization(parametrized, "in_proj_weight", Doubled())
    patched = nn.MultiheadAttention(E, 2)
    patched.forward = lambda *args, **kwargs: None
    wrapped = nn.MultiheadAttention(E, 2)
    wrapped.out_proj = nn.Sequential(nn.Linear(E, E))
    complex_one = nn.MultiheadAttention(E, 2).to(torch.complex64)
    model = nn.ModuleDict(
        {
            "first": nn.MultiheadAttention(E, 2),
            "fastattn": fastattn.nn.MultiheadAttention(E, 4, num_kv_heads=2),
            "subclass": Mine(E, 2),
            "quantizable": torch.ao.nn.quantizable.MultiheadAttention(E, 2),
            "parametrized": parametrized,
            "scripted": scripted,
            "patched": patched,
            "wrapped": wrapped,
            "complex": complex_one,
            "other": nn.Linear(E, E),
            "last": nn.MultiheadAttention(E, 2),
        }
    )
    before = {name: type(module) for name, module in model.named_children()}
    report = replace_modules(model)
    assert report.replaced == ("first", "last")
    assert dict(report.left) == {
        "fastattn": "it is fastattn's already",
        "subclass": f"it is a {__name__}.Mine, which may do more than its base class",
        "quantizable": "it is a torch.ao.nn.quantizable.modules.activation.MultiheadAttention, which may do "
        "more than its base class",
        "parametrized": "its in_proj_weight is parametrized",
        "scripted": "it is compiled by TorchScript",
        "patched": "its forward was replaced",
        "wrapped": "its out_proj is a Sequential, which has no weight to read",
        "complex": "its in_proj_weight has dtype complex64",
    }
    assert str(report).splitlines()[0] == "replaced 2, left 8 as they were"
    assert "  patched: left, its forward was replaced" in str(report).splitlines()
    report.undo()
    assert {name: type(module) for name, module in model.named_children()} == before
    assert model["fastattn"].num_kv_heads == 2


def test_parameters_with_a_behaviour_of_their_own_are_left():
    class Own(nn.Parameter):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return super().__torch_function__(func, types, args, kwargs or {})

    model = nn.MultiheadAttention(E, 2)
    model.in_proj_weight = Own(model.in_proj_weight.detach())
    assert replace_modules(model).left == {
        "": f"its in_proj_weight is a {Own.__qualname__}, which has a behaviour of its own"
    }


def test_devices_without_kernels(monkeypatch):
    """PyTorch's own code is the better choice there; a model on meta has yet to get its device."""
    model = nn.MultiheadAttention(E, 2, device="meta")
    assert replace_modules(model).replaced == ("",)
    monkeypatch.setattr(cpu, "_missing", "it is not built")
    left = replace_modules(nn.MultiheadAttention(E, 2)).left[""]
    assert left.startswith("no kernel for cpu (")
    assert "cpu: it is not built" in left


def test_parametrized_out_proj_is_taken():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(E, 2, batch_first=True)
    parametrizations.weight_norm(model.out_proj)
    x = rand(B, L, E)
    want = model(x, x, x)
    assert replace_modules(model).replaced == ("",)
    torch.testing.assert_close(model(x, x, x), want)


def test_an_adapter_over_the_output_layer_is_taken():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["self_attn"], r=2, init_lora_weights=False)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 2, 16, 0.0, batch_first=True), 1)
    encoder.enable_nested_tensor = False
    model = peft.get_peft_model(encoder, config)
    x = rand(B, L, E)

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        out = model(x)
        out.square().sum().backward()
        return [out] + [p.grad for p in model.parameters() if p.requires_grad]

    want = run()
    assert len(replace_modules(model).replaced) == 1
    torch.testing.assert_close(run(), want)
    torch.testing.assert_close(model.merge_and_unload()(x), want[0])


def test_bad_argument():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        replace_modules(3)


# Nested tensors, which nn.TransformerEncoder makes in eval


@pytest.mark.parametrize("need_weights", [True, False])
def test_nested_self_attention(need_weights):
    torch.manual_seed(0)
    model = fastattn.nn.MultiheadAttention(E, 2, batch_first=True)
    sequences = [rand(length, E, seed=length).requires_grad_() for length in (5, 2, 7)]
    nested = torch.nested.as_nested_tensor(sequences)
    out, weights = model(nested, nested, nested, need_weights=need_weights)
    assert out.is_nested
    for index, (sequence, got) in enumerate(zip(sequences, out.unbind(), strict=True)):
        want, want_weights = model(sequence)
        torch.testing.assert_close(got, want)
        (want_grad,) = torch.autograd.grad(want.sum(), sequence)
        (got_grad,) = torch.autograd.grad(got.sum(), sequence, retain_graph=True)
        torch.testing.assert_close(got_grad, want_grad)
        if need_weights:
            length = len(sequence)
            torch.testing.assert_close(weights[index, :length, :length], want_weights)
            assert weights[index].sum().item() == pytest.approx(length, abs=1e-4)
    assert (weights is None) == (not need_weights)


def test_nested_with_masks_is_refused():
    model = fastattn.nn.MultiheadAttention(E, 2, batch_first=True)
    nested = torch.nested.as_nested_tensor([rand(5, E), rand(2, E)])
    other = torch.nested.as_nested_tensor([rand(5, E), rand(2, E)])
    for arguments in (
        {"valid_lens": torch.tensor([5, 2])},
        {"is_causal": True},
        {"key": other, "value": other},
        {"attn_mask": torch.zeros(5, 5)},
    ):
        with pytest.raises(NotImplementedError, match=r"must be a dense tensor .* got a nested one"):
            model(nested, **arguments)

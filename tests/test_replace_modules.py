"""replace_modules: equal to the originals, in place, reported and undone."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import threading
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastattn.nn
from fastattn.backends import cpu
from fastattn.integrations.torch import override_sdpa, replace_modules

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]


@pytest.fixture(autouse=True)
def one_thread(use_threads):
    """On models this small, threads only wait for one another."""
    use_threads(1)


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


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padding(batch: int, length: int, hidden: int) -> Tensor:
    """The last `hidden` keys of the first sequence are blocked."""
    blocked = torch.zeros(batch, length, dtype=torch.bool)
    blocked[0, length - hidden :] = True
    return blocked


def as_float(blocked: Tensor) -> Tensor:
    return torch.zeros(blocked.shape).masked_fill(blocked, -torch.inf)


def blocked_after(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


B, L, S, E = 2, 6, 5, 16
SIZES = {"d_model": E, "nhead": 2, "dim_feedforward": 24, "dropout": 0.0}

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


# In place


def new_model() -> nn.Transformer:
    torch.manual_seed(0)
    return nn.Transformer(**SIZES, num_encoder_layers=1, num_decoder_layers=1, batch_first=True)


NAMES = (
    "encoder.layers.0.self_attn",
    "decoder.layers.0.self_attn",
    "decoder.layers.0.multihead_attn",
)


def types(model: nn.Module) -> list[type]:
    return [type(model.get_submodule(name)) for name in NAMES]


OURS, TORCHS = [fastattn.nn.MultiheadAttention] * 3, [nn.MultiheadAttention] * 3


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


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


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
        "wrapped": "its out_proj is a Sequential, not a Linear",
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


def test_bad_argument():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        replace_modules(3)


# The report, and undo


def test_report_is_frozen():
    report = replace_modules(new_model())
    assert report.replaced == NAMES
    with pytest.raises(FrozenInstanceError):
        report.replaced = ()
    with pytest.raises(TypeError):
        report.left["x"] = "y"
    assert str(report).splitlines() == ["replaced 3, left 0 as they were", *(f"  {name}" for name in NAMES)]


def test_undo_twice_and_after_another():
    model = new_model()
    first = replace_modules(model)
    first.undo()
    second = replace_modules(model)
    first.undo()
    assert types(model) == OURS
    second.undo()
    assert types(model) == TORCHS


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_nested_reports_undone_in_any_order(order):
    """Each gives back what it took, however they overlap."""
    model = new_model()
    reports = [replace_modules(model.encoder), replace_modules(model), replace_modules(model)]
    assert [len(report.replaced) for report in reports] == [1, 2, 0]
    assert [len(report.left) for report in reports] == [0, 1, 3]
    taken = [{NAMES[0]}, {NAMES[1], NAMES[2]}, set()]
    left = set(NAMES)
    for index in order:
        reports[index].undo()
        left -= taken[index]
        want = [fastattn.nn.MultiheadAttention if n in left else nn.MultiheadAttention for n in NAMES]
        assert types(model) == want
        model.eval()(rand(B, L, E), rand(B, S, E), src_key_padding_mask=padding(B, L, 2))


def test_block_ends_with_an_exception():
    model = new_model()
    with pytest.raises(KeyError), replace_modules(model):
        assert types(model) == OURS
        raise KeyError
    assert types(model) == TORCHS


def test_undo_after_another_change_of_class():
    model = new_model()
    report = replace_modules(model)
    attention = model.encoder.layers[0].self_attn
    parametrize.register_parametrization(attention, "in_proj_weight", Doubled())
    with pytest.warns(UserWarning, match="has become a ParametrizedMultiheadAttention since"):
        report.undo()
    assert types(model)[1:] == TORCHS[1:]
    parametrize.remove_parametrizations(attention, "in_proj_weight")
    report.undo()
    assert types(model) == TORCHS


def test_copies_pickles_and_files(tmp_path):
    """They are ours and work; undoing the original leaves them so."""
    model = new_model()
    report = replace_modules(model)
    torch.save(model, tmp_path / "model.pt")
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ]
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    model.load_state_dict(torch.load(buffer, weights_only=True))
    x, y = rand(B, L, E), rand(B, S, E)
    want = model(x, y)
    report.undo()
    assert types(model) == TORCHS
    for copied in copies:
        assert types(copied) == OURS
        assert torch.equal(copied(x, y), want)


def test_threads_with_models_of_their_own_and_one_shared():
    shared, failures = new_model(), []
    barrier = threading.Barrier(4, timeout=60)

    def work() -> None:
        try:
            model, x, y = new_model(), rand(B, L, E), rand(B, S, E)
            barrier.wait()
            for _ in range(20):
                with replace_modules(model):
                    assert types(model) == OURS
                    model(x, y)
                assert types(model) == TORCHS
                with replace_modules(shared):
                    pass
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert types(shared) == TORCHS


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


# With the rest


def test_compiled_before_and_after():
    """Compiled code notices the change, both ways."""
    found = []

    def backend(graph, example_inputs):
        found.append("fastattn" in graph.code)
        return graph

    torch._dynamo.reset()
    model = nn.TransformerEncoderLayer(**SIZES, batch_first=True)
    compiled, x = torch.compile(model, backend=backend, fullgraph=True), rand(B, L, E)
    want = compiled(x)
    with replace_modules(model):
        torch.testing.assert_close(compiled(x), want)
    torch.testing.assert_close(compiled(x), want)
    assert found[:2] == [False, True]
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

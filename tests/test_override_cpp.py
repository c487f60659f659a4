"""override_sdpa and the calls that PyTorch makes from C++."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn.integrations.torch import override_sdpa

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.usefixtures("native"),
]


@pytest.fixture(scope="module")
def scripted():
    """The function as TorchScript calls it."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    return torch.jit.script(attend)


def qkv(*shape: int, seed: int = 0, **options) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*(shape or (2, 3, 5, 8)), generator=generator, **options) for _ in range(3)]


MASK = torch.rand(5, 5, generator=torch.Generator().manual_seed(1)) > 0.3

# PyTorch runs some of these on its fused CPU kernel and others step by step.
ARGUMENTS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "bool_mask": {"attn_mask": MASK},
    "float_mask": {"attn_mask": MASK.float()},
    "three_dimensions": {"shape": (3, 5, 8)},
    "five_dimensions": {"shape": (2, 1, 3, 5, 8)},
}


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("route", ["script", "packet", "overload"])
def test_reached_with_gradients(calls, scripted, route, name):
    """By TorchScript and by PyTorch's operators: the bits of our function, forward and backward."""
    arguments = dict(ARGUMENTS[name])
    function = {
        "script": scripted,
        "packet": torch.ops.aten.scaled_dot_product_attention,
        "overload": torch.ops.aten.scaled_dot_product_attention.default,
    }[route]
    q, k, v = (t.requires_grad_() for t in qkv(*arguments.pop("shape", ())))
    outside = function(q, k, v, **arguments)
    assert calls == []
    with override_sdpa():
        got = function(q, k, v, **arguments)
    assert len(calls) == 1
    want = fastattn.scaled_dot_product_attention(q, k, v, **arguments)
    assert torch.equal(got, want)
    torch.testing.assert_close(got, outside)
    grads = [torch.autograd.grad(out.sum(), (q, k, v)) for out in (got, want, outside)]
    for ours, direct, torchs in zip(*grads, strict=True):
        assert torch.equal(ours, direct)
        torch.testing.assert_close(ours, torchs, atol=1e-5, rtol=1e-5)


def test_dropout_and_mask_gradient_are_ours(calls, scripted):
    q, k, v = qkv()
    torch.manual_seed(0)
    want = fastattn.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(0)
    with override_sdpa():
        got = scripted(q, k, v, dropout_p=0.5)
    assert torch.equal(got, want)
    grads = []
    for override in (False, True):
        bias = torch.linspace(-1, 1, 25).reshape(5, 5).requires_grad_()
        if override:
            with override_sdpa():
                out = scripted(q, k, v, bias)
        else:
            out = scripted(q, k, v, bias)
        out.square().sum().backward()
        grads.append(bias.grad)
    torch.testing.assert_close(*grads)
    assert len(calls) == 2


def test_gradients_belong_to_the_forward_call(calls, scripted):
    """Backward on the other side of the block, in either direction, and with rows that see no key."""
    mask = MASK.clone()
    mask[2] = False

    def forward() -> tuple[Tensor, list[Tensor]]:
        inputs = [t.requires_grad_() for t in qkv()]
        return scripted(*inputs, mask), inputs

    with override_sdpa():
        ours, our_inputs = forward()
    theirs, their_inputs = forward()
    assert "Attention" in type(ours.grad_fn).__name__
    assert "Attention" in type(theirs.grad_fn).__name__
    assert type(ours.grad_fn) is not type(theirs.grad_fn)
    ours.sum().backward()
    with override_sdpa():
        theirs.sum().backward()
    assert len(calls) == 1
    for got, want in zip(our_inputs, their_inputs, strict=True):
        assert got.grad.isfinite().all()
        torch.testing.assert_close(got.grad, want.grad, atol=1e-5, rtol=1e-5)


def test_the_innermost_backend_counts_and_none_goes_round_again(calls, scripted):
    q, k, v = qkv()
    torchs_own = scripted(q, k, v)
    for outer in (None, "torch", "reference"):
        for inner in (None, "torch", "reference", "cpu"):
            for function in (scripted, torch.ops.aten.scaled_dot_product_attention):
                calls.clear()
                with override_sdpa(outer), override_sdpa(inner):
                    got = function(q, k, v)
                assert [call["backend"] for call in calls] == [inner]
                assert torch.equal(got, fastattn.scaled_dot_product_attention(q, k, v, backend=inner))
                torch.testing.assert_close(got, torchs_own)
    calls.clear()
    with override_sdpa("reference"):
        assert torch.equal(fastattn.attention(q, k, v, backend="torch"), torchs_own)
    assert calls == []


def test_what_no_kernel_takes_goes_to_torch(calls, scripted):
    q = torch.ones(1, 1, 2, 2, dtype=torch.complex64)
    with override_sdpa(), pytest.warns(UserWarning, match="query has dtype complex64"):
        with pytest.raises(RuntimeError):
            scripted(q, q, q)
    assert calls == []
    with override_sdpa(), torch._C.DisableTorchFunction():
        scripted(*qkv())
    assert calls == []


def test_autocast_and_inference_mode(calls, scripted):
    q, k, v = qkv()
    with override_sdpa(), torch.autocast("cpu", torch.bfloat16):
        assert scripted(q, k, v).dtype == torch.bfloat16
    want = scripted(q, k, v)
    with override_sdpa(), torch.inference_mode():
        q, k, v = qkv()
        torch.testing.assert_close(scripted(q, k, v).clone(), want)
    assert len(calls) == 2


def test_operators_of_other_libraries(calls):
    """An operator is called with modes off; what it calls is reached all the same."""
    with torch.library._scoped_library("fastattn_test", "DEF") as library:
        library.define("attend(Tensor q) -> Tensor")
        library.impl("attend", lambda q: F.scaled_dot_product_attention(q, q, q), "CompositeImplicitAutograd")
        q = qkv()[0]
        want = torch.ops.fastattn_test.attend(q)
        with override_sdpa():
            got = torch.ops.fastattn_test.attend(q)
            torch.testing.assert_close(got, want)
        assert len(calls) == 1


def test_below_autograd(calls):
    """In an operator's kernel for the CPU autograd is the operator's own business: no graph comes out."""
    with torch.library._scoped_library("fastattn_test", "DEF") as library:
        library.define("attend(Tensor q) -> Tensor")
        library.impl("attend", lambda q: torch.ops.aten.scaled_dot_product_attention(q, q, q), "CPU")
        q = qkv()[0].requires_grad_()
        with torch._C._AutoDispatchBelowAutograd():
            want = torch.ops.fastattn_test.attend(q)
            with override_sdpa():
                got = torch.ops.fastattn_test.attend(q)
        torch.testing.assert_close(got, want)
        assert not got.requires_grad
        assert not want.requires_grad
    assert len(calls) == 1


def test_watchers_see_pytorchs_operators(calls, scripted):
    """Traces, transforms and dispatch modes below the function level are left as they are."""
    q, k, v = qkv()
    want = scripted(q, k, v)
    with override_sdpa():
        torch.testing.assert_close(torch.func.vmap(scripted)(q, k, v), want)
        torch.func.grad(lambda q: scripted(q, k, v).sum())(q)
        with torch._subclasses.FakeTensorMode() as mode:
            assert scripted(*(mode.from_tensor(t) for t in (q, k, v))).shape == want.shape
    assert calls == []


def test_threads(calls, scripted):
    """A thread without an override gets PyTorch's own kernels while another has ours."""
    q, k, v = (t.requires_grad_() for t in qkv())
    started, barrier, found = override_sdpa, threading.Barrier(4, timeout=30), {}

    def work(index: int) -> None:
        override = started() if index % 2 else None
        barrier.wait()
        names = {type(scripted(q, k, v).grad_fn).__name__ for _ in range(200)}
        barrier.wait()
        if override is not None:
            override.undo()
        found[index] = (names, type(scripted(q, k, v).grad_fn).__name__)

    torchs = type(scripted(q, k, v).grad_fn).__name__
    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 400
    for index in range(4):
        names, afterwards = found[index]
        assert afterwards == torchs
        assert (names == {torchs}) == (index % 2 == 0)


def test_exported_programs_are_taken_apart_as_before():
    """A kernel of ours at a dispatch key of its own would keep torch.export from decomposing the function."""

    class Model(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q)

    override_sdpa().undo()
    program = torch.export.export(Model(), (qkv()[0],))
    name = "scaled_dot_product_attention"
    assert name in program.graph_module.code
    assert name not in program.run_decompositions().graph_module.code


def test_undone_to_the_bit(scripted):
    q, k, v = (t.requires_grad_() for t in qkv())
    before = scripted(q, k, v, is_causal=True)
    with override_sdpa():
        scripted(q, k, v, is_causal=True)
    after = scripted(q, k, v, is_causal=True)
    assert torch.equal(before, after)
    assert type(before.grad_fn) is type(after.grad_fn)


EXTENSION = """
torch::Tensor attend(torch::Tensor q) {
  pybind11::gil_scoped_release unlocked;
  return at::scaled_dot_product_attention(q, q, q, {}, 0.0, true);
}
"""


@pytest.mark.slow
def test_cpp_extension(calls, tmp_path):
    """A function compiled against libtorch, which calls without the interpreter's lock."""
    from torch.utils import cpp_extension

    if not cpp_extension.is_ninja_available():
        pytest.skip("building a C++ extension needs ninja")
    module = cpp_extension.load_inline(
        "fastattn_test", EXTENSION, functions=["attend"], build_directory=str(tmp_path), use_pch=False
    )
    q = qkv()[0].requires_grad_()
    want = fastattn.scaled_dot_product_attention(q, q, q, is_causal=True)
    with override_sdpa():
        got = module.attend(q)
    assert len(calls) == 1
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(out.sum(), q)[0] for out in (got, want)))
    module.attend(q)
    assert len(calls) == 1


# Encoder layers


def padding() -> Tensor:
    blocked = torch.zeros(2, 6, dtype=torch.bool)
    blocked[0, 4:] = True
    return blocked


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("grad", ["train", "no_grad", "inference_mode"])
def test_scripted_encoder_layer(calls, grad, norm_first):
    """In eval it runs as one operator of C++; in training as many."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    scripted_layer = torch.jit.script(layer.train(grad == "train"))
    x, causal = torch.randn(2, 6, 16), torch.ones(6, 6, dtype=torch.bool).triu(1)
    context = {"train": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with context[grad]():
        for arguments in ({}, {"src_key_padding_mask": padding()}, {"src_mask": causal}):
            want = scripted_layer(x, **arguments)
            calls.clear()
            with override_sdpa():
                got = scripted_layer(x, **arguments)
            assert len(calls) == 1
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mask_type", [None, 0, 1, 2])
def test_native_multihead_attention(calls, mask_type):
    torch.manual_seed(0)
    shape = {None: None, 0: (6, 6), 1: (2, 6), 2: (2, 4, 6, 6)}[mask_type]
    mask = None if shape is None else torch.rand(shape) > 0.7
    if mask is not None:
        mask[..., 0] = False  # a row without keys is NaN there
    x, projection = torch.randn(2, 6, 16), nn.MultiheadAttention(16, 4).requires_grad_(False)
    arguments = (
        *(x, x, x, 16, 4, projection.in_proj_weight, torch.randn(48)),
        *(projection.out_proj.weight, torch.randn(16), mask),
    )
    for need_weights in (False, True):
        want = torch._native_multi_head_attention(*arguments, need_weights, True, mask_type)
        with override_sdpa():
            got = torch._native_multi_head_attention(*arguments, need_weights, True, mask_type)
        torch.testing.assert_close(got[0], want[0])
        assert (got[1] is None) == (not need_weights)
    assert len(calls) == 1  # with weights it is PyTorch's


def test_native_rows_without_keys_see_nothing(calls):
    """As everywhere in fastattn: zero attention, then the projection."""
    torch.manual_seed(0)
    x, projection = torch.randn(1, 3, 8), nn.MultiheadAttention(8, 2).requires_grad_(False)
    bias = torch.randn(8)
    with override_sdpa():
        out, _ = torch._native_multi_head_attention(
            *(x, x, x, 8, 2, projection.in_proj_weight, projection.in_proj_bias, projection.out_proj.weight),
            *(bias, torch.ones(1, 3, dtype=torch.bool), False, True, 1),
        )
    assert torch.equal(out, bias.expand(1, 3, 8))


def test_first_use_says_nothing():
    """Registering our kernels beside PyTorch's is not worth a warning."""
    code = (
        "import torch, torch.nn.functional as F\n"
        "from fastattn.integrations.torch import override_sdpa\n"
        "override_sdpa().undo(); q = torch.ones(1, 1, 2, 4)\n"
        "F.scaled_dot_product_attention(q, q, q)\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")

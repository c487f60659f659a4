"""What kernels must not take at face value: indices that nobody checked, and tensors without plain memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from call_support import EXACT, NATIVE, qkv, randn

import fastattn
from fastattn.biases import ALiBi

pytestmark = pytest.mark.skipif(not NATIVE, reason="the native core is not built")

SETUP = """
import torch
from fastattn import decode_attention, varlen_attention

class Sub(torch.Tensor):
    pass

q = torch.randn(1, 2, 1, 8)
k = torch.randn(1, 2, 16, 8)
far = torch.tensor([50_000_000])
packed = torch.randn(4, 2, 8)
cu = torch.tensor([0, 40_000_000], dtype=torch.int32)
limits = {"max_seqlen_q": 40_000_000, "max_seqlen_k": 40_000_000}
table = torch.tensor([[0, 10_000_000]], dtype=torch.int32)
full = torch.tensor([32])
"""
# Without a check each of these reads far outside its tensors.
ROUTES = {
    "lengths, grad": ("lengths", "torch.func.grad(lambda q: decode_attention(q, k, k, far).sum())(q)"),
    "lengths, vmap": ("lengths", "torch.vmap(lambda q: decode_attention(q, k, k, far))(q[None])"),
    "lengths, vmapped": (
        "lengths",
        "torch.vmap(lambda q, n: decode_attention(q, k, k, n))(q[None], far[None])",
    ),
    "lengths, parameter": (
        "lengths",
        "decode_attention(q, k, k, torch.nn.Parameter(far, requires_grad=False))",
    ),
    "lengths, subclass": ("lengths", "decode_attention(q, k, k, far.as_subclass(Sub))"),
    "lengths, autograd": (
        "lengths",
        "decode_attention(q.requires_grad_(), k, k, far.as_subclass(Sub))",
    ),
    "cu_seqlens, grad": (
        "cu_seqlens_q",
        "torch.func.grad(lambda q: varlen_attention(q, packed, packed, cu, cu, **limits).sum())(packed)",
    ),
    "cu_seqlens, subclass": (
        "cu_seqlens_q",
        "varlen_attention(packed, packed, packed, cu.as_subclass(Sub), cu, **limits)",
    ),
    "block_table, vmap": (
        "block_table",
        "torch.vmap(lambda q: decode_attention(q, k, k, full, block_table=table))(q[None])",
    ),
    "block_table, subclass": (
        "block_table",
        "decode_attention(q, k, k, full, block_table=table.as_subclass(Sub))",
    ),
}


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_indices_are_checked_on_every_route(route):
    name, call = route
    code = SETUP + f"try:\n    {call}\nexcept ValueError as error:\n    print(error)\n"
    # In a process of its own, which may die of it.
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{name} must"), done.stdout


def negated(tensor):
    """The same values, behind a lazy minus sign."""
    lazy = torch._neg_view(-tensor)
    assert lazy.is_neg()
    return lazy


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=["plain", "softcap"])
def test_negated_views(which, options):
    inputs = qkv(2, 4, 2, 5, 7)
    want = fastattn.attention(*inputs, **options)
    inputs[which] = negated(inputs[which])
    torch.testing.assert_close(fastattn.attention(*inputs, **options), want, **EXACT)


def test_negated_options():
    inputs = qkv(2, 4, 2, 5, 7)
    options = {"bias": randn(4, 5, 7), "sinks": randn(4)}
    want = fastattn.attention(*inputs, **options)
    lazy = {name: negated(tensor) for name, tensor in options.items()}
    torch.testing.assert_close(fastattn.attention(*inputs, **lazy), want, **EXACT)
    slopes = randn(4)
    want = fastattn.attention(*inputs, bias=ALiBi(slopes))
    torch.testing.assert_close(fastattn.attention(*inputs, bias=ALiBi(negated(slopes))), want, **EXACT)


@pytest.mark.parametrize("lazy", [negated, lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype)])
def test_lazy_gradients(lazy):
    inputs = qkv(2, 4, 2, 5, 7, grad=True)
    bias = randn(4, 5, 7, grad=True)
    results = fastattn.attention(*inputs, bias=bias, return_lse=True)
    upstream = [lazy(randn(*r.shape, seed=n)) for n, r in enumerate(results)]
    got = torch.autograd.grad(results, [*inputs, bias], upstream, retain_graph=True)
    plain = [torch.zeros_like(t) + t for t in upstream]
    want = torch.autograd.grad(results, [*inputs, bias], plain)
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("which", range(3))
def test_lazy_zeros(which):
    inputs = qkv(2, 4, 2, 5, 7)
    shape = inputs[which].shape
    inputs[which] = torch.zeros(shape, dtype=torch.float64)
    want = fastattn.attention(*inputs)
    inputs[which] = torch._efficientzerotensor(shape, dtype=torch.float64)
    torch.testing.assert_close(fastattn.attention(*inputs), want, **EXACT)
    torch.testing.assert_close(fastattn.attention(*inputs, softcap=9.0, sinks=randn(4)).shape, want.shape)


Q = "(1 << 20, (1, 1, 1, 8), (8, 8, 8, 1))"
WRONG_CALLS = {
    "no threads": ("copy_bandwidth(4096, 0)", "num_threads must be at least 1, got 0"),
    "no bytes": ("copy_bandwidth(0, 1)", "bytes must be at least 1, got 0"),
    "no tensor": (f"attention_fwd(0, None, {Q}, {Q}, {Q}, None, 1.0, 1, None)", "a view is None"),
    "no address": (
        f"attention_fwd(0, ('q', (1, 1, 1, 8), (8, 8, 8, 1)), {Q}, {Q}, {Q}, None, 1.0, 1, None)",
        "int",
    ),
    "few strides": (
        f"attention_fwd(0, (1 << 20, (1, 1, 1, 8), (8, 8)), {Q}, {Q}, {Q}, None, 1.0, 1, None)",
        "too few dimensions",
    ),
    "band": (
        f"attention_fwd(0, {Q}, {Q}, {Q}, {Q}, None, 1.0, 1, {{'band': 5}})",
        "must be a tuple of 4",
    ),
    "dropout": (
        f"attention_fwd(0, {Q}, {Q}, {Q}, {Q}, None, 1.0, 1, {{'dropout': (0.5,)}})",
        "must be a tuple of 2",
    ),
}


def test_the_native_core_raises_rather_than_crashes():
    lines = ["from fastattn import _C"]
    for call, _ in WRONG_CALLS.values():
        lines += ["try:", f"    _C.{call}", "except (TypeError, ValueError) as error:", "    print(error)"]
    # In a process of its own, which may die of it.
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    for (name, (_, expected)), line in zip(WRONG_CALLS.items(), printed, strict=True):
        assert expected in line, name

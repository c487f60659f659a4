"""The CUDA kernels on a Hopper GPU: the cases' results, repeatability, graphs, and nothing that waits."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn import masks
from fastattn.backends import cuda
from fastattn.bench.gpu.check import FAILED, SKIPPED, check_one
from fastattn.biases import ALiBi
from fastattn.spec import AttentionSpec

_SPEC = AttentionSpec("attention", 1, 1, 1, 128, 128, 64, 64, "bfloat16", "cuda", 0.125)
_REASON = cuda.supports(_SPEC) if torch.cuda.is_available() else "needs a CUDA device"
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

DEVICE = torch.device("cuda")
SAMPLE = (
    "gqa-bfloat16", "dim-64-bfloat16", "dim-64-float16", "many-tiles-bfloat16", "many-tiles-float16",
    "layout-blhd-bfloat16", "causal-long-k-bfloat16", "window-long-q-float16",
    "mask-documents-causal-bfloat16", "mask-padding-per-query-float16", "bool-strided-bfloat16",
    "bias-full-float16", "bias-alibi-bfloat16", "dropout-0.5-bfloat16", "sinks-causal-softcap-float16",
    "varlen-causal-gqa-bfloat16", "decode-causal-float16",
)  # fmt: skip
OPTIONS = {
    "plain": {},
    "causal": {"mask": masks.causal()},
    "padding": {"mask": "padding"},
    "softcap": {"softcap": 20.0},
    "alibi": {"bias": "alibi"},
    "dropout": {"dropout_p": 0.1},
}


def options_of(name: str) -> dict:
    options = dict(OPTIONS[name])
    if options.get("mask") == "padding":
        options["mask"] = masks.padding(torch.tensor([200, 100], device=DEVICE))
    if options.get("bias") == "alibi":
        options["bias"] = ALiBi(torch.ones(4, device=DEVICE))
    if "dropout_p" in options:
        options["dropout_seed"] = torch.tensor([9], device=DEVICE)
    return options


def tensors(length: int = 256, dim: int = 128) -> list[torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    drawn = (torch.randn(2, 4, length, dim, generator=generator, device=DEVICE) for _ in range(3))
    return [x.bfloat16() for x in drawn]


@pytest.mark.parametrize("name", SAMPLE)
def test_case(name: str):
    outcome = check_one(name, DEVICE, "cuda")
    if outcome.state == SKIPPED:
        pytest.skip(str(outcome.reason))
    assert outcome.state != FAILED, outcome.reason


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("length", [1000, 4096])
def test_long_calls_agree_with_triton(dim: int, length: int):
    q, k, v = tensors(length, dim)
    for mask in (None, masks.causal()):
        out, lse = fastattn.attention(q, k, v, mask=mask, backend="cuda", return_lse=True)
        want, want_lse = fastattn.attention(q, k, v, mask=mask, backend="triton", return_lse=True)
        torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", OPTIONS)
def test_repeated_calls_have_the_same_bits(name: str):
    options = options_of(name)
    q, k, v = tensors(1000 if name in ("plain", "causal") else 256)
    first = fastattn.attention(q, k, v, backend="cuda", return_lse=True, **options)
    for _ in range(100):
        again = fastattn.attention(q, k, v, backend="cuda", return_lse=True, **options)
        assert all(torch.equal(*pair) for pair in zip(again, first, strict=True))


@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_waits_and_a_graph_replays(name: str):
    options = options_of(name)
    q, k, v = tensors()
    want = fastattn.attention(q, k, v, backend="cuda", **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fastattn.attention(q, k, v, backend="cuda", **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fastattn.attention(q, k, v, backend="cuda", **options)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want)


@pytest.mark.parametrize("seqlen_q", [1, 5, 100])
def test_few_rows_whose_keys_are_divided(seqlen_q: int):
    q, k, v = tensors(8192)
    q = q[:, :, :seqlen_q]
    call = {"mask": masks.causal(align="bottom_right"), "return_lse": True}
    first = fastattn.attention(q, k, v, backend="cuda", **call)
    for got, want in zip(first, fastattn.attention(q, k, v, backend="triton", **call), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-3)
    for _ in range(100):
        again = fastattn.attention(q, k, v, backend="cuda", **call)
        assert all(torch.equal(*pair) for pair in zip(again, first, strict=True))


def test_gradients_through_triton():
    leaves = [x.requires_grad_() for x in tensors()]
    grads = []
    for backend in ("cuda", "triton"):
        out = fastattn.attention(*leaves, mask=masks.causal(), backend=backend)
        grads.append(torch.autograd.grad(out.float().square().sum(), leaves))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2)


def test_another_stream():
    q, k, v = tensors()
    want = fastattn.attention(q, k, v, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = fastattn.attention(q, k, v, backend="cuda")
    stream.synchronize()
    assert torch.equal(out, want)

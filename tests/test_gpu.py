"""What only a GPU can show: CUDA graphs, streams, devices, waiting, memory, and the cases' results there.

`python -m fastattn bench --gpu check` runs every case; here is a sample.
"""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn import masks
from fastattn.bench.gpu.check import FAILED, SKIPPED, check_one
from fastattn.biases import ALiBi

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = torch.device("cuda")
SAMPLE = (
    "primes", "gqa", "dim-100", "dim-256", "many-tiles-bfloat16", "layout-sliced",
    "causal-long-k", "mask-documents-causal", "bool-strided", "bias-full-float16", "bias-alibi", "all-band",
    "all-dense-bfloat16", "all-block-float16", "varlen-causal-gqa", "decode-causal", "paged-odd",
)  # fmt: skip


def tensors(
    length: int = 256, heads: int = 4, dim: int = 64, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> list[torch.Tensor]:
    """q, k, v [2, heads, length, dim] that require gradients."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    drawn = (torch.randn(2, heads, length, dim, generator=generator, device=DEVICE) for _ in range(3))
    return [x.to(dtype).requires_grad_() for x in drawn]


def both_passes(leaves: list, more: tuple = (), **options) -> list[torch.Tensor]:
    """out and the gradients of its sum of squares."""
    out = fastattn.attention(*leaves, backend="triton", **options)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), (*leaves, *more))]


@pytest.mark.parametrize("name", SAMPLE)
def test_case(name: str):
    outcome = check_one(name, DEVICE)
    if outcome.state == SKIPPED:
        pytest.skip(str(outcome.reason))
    assert outcome.state != FAILED, outcome.reason


def test_repeated_calls_read_the_tensors_they_are_given():
    for seed in range(3):
        leaves = tensors(seed=seed)
        wide = [x.detach().float().requires_grad_() for x in leaves]
        out = fastattn.attention(*wide, mask=masks.causal(), backend="reference")
        want = [out.detach(), *torch.autograd.grad(out.square().sum(), wide)]
        for got, exact in zip(both_passes(leaves, mask=masks.causal()), want, strict=True):
            torch.testing.assert_close(got.float(), exact, rtol=5e-2, atol=5e-2)


def test_decoding_divides_the_keys():
    """In enough parts for the device; where torch wants determinism, in as many whatever the batch."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, length, 128, generator=generator, device=DEVICE).bfloat16()
        for heads, length in ((8, 1), (2, 8192), (2, 8192))
    )
    lengths = torch.tensor([8192, 700], device=DEVICE, dtype=torch.int32)
    got = fastattn.decode_attention(q, k, v, lengths, backend="triton")
    want = fastattn.decode_attention(q.float(), k.float(), v.float(), lengths, backend="reference")
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-3)
    torch.use_deterministic_algorithms(True)
    try:
        whole, alone = (
            fastattn.decode_attention(q[:n], k[:n], v[:n], lengths[:n], backend="triton")[0] for n in (2, 1)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(whole, alone)


def test_it_is_the_default():
    q, k, v = tensors()
    choice = fastattn.explain(q, k, v, mask=masks.causal())
    assert choice.backend == "triton"
    assert "triton     runs" in str(choice)


def test_what_it_cannot_do_it_says_before_any_launch():
    q, k, v = (x.detach().double() for x in tensors())
    assert "it has no float64" in str(fastattn.explain(q, k, v).reasons["triton"])
    with pytest.raises(NotImplementedError, match="it has no float64"):
        fastattn.attention(q, k, v, backend="triton")
    assert fastattn.attention(q, k, v).dtype == torch.float64  # on another backend
    wide = torch.randn(1, 1, 4, 300, device=DEVICE)
    with pytest.raises(NotImplementedError, match="go up to 256, not 300"):
        fastattn.attention(wide, wide, wide, backend="triton")
    q, k, v = tensors()
    with pytest.raises(ValueError, match="k must be on q's device cuda:0, got cpu"):
        fastattn.attention(q, k.cpu(), v)
    with pytest.raises(ValueError, match="device"):
        fastattn.attention(q, k, v, mask=masks.padding(torch.tensor([3, 4])))
    torch.cuda.synchronize()


def option_calls() -> dict[str, dict]:
    return {
        "plain": {},
        "causal": {"mask": masks.causal()},
        "padding": {"mask": masks.padding(torch.tensor([200, 100], device=DEVICE))},
        "documents": {"mask": masks.documents(torch.arange(256, device=DEVICE) // 50)},
        "bool": {"mask": torch.ones(256, 256, dtype=torch.bool, device=DEVICE).tril()},
        "bias": {"bias": torch.zeros(4, 256, 256, device=DEVICE, dtype=torch.bfloat16)},
        "alibi": {"bias": ALiBi(torch.ones(4, device=DEVICE))},
        "softcap": {"softcap": 20.0},
        "dropout": {"dropout_p": 0.1},
    }


@pytest.mark.parametrize("name", list(option_calls()) if torch.cuda.is_available() else ["plain"])
def test_nothing_waits_for_the_device(name: str):
    """The first call may: it compiles, and block lists are built and kept."""
    leaves, options = tensors(), option_calls()[name]
    both_passes(leaves, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both_passes(leaves, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_packed_sequences_do_not_wait_either():
    q, k, v = (x.detach().transpose(1, 2).reshape(512, 4, 64).requires_grad_() for x in tensors())
    starts = torch.tensor([0, 100, 512], device=DEVICE, dtype=torch.int32)

    def call():
        out = fastattn.varlen_attention(
            q, k, v, starts, starts, max_seqlen_q=412, max_seqlen_k=412, mask=masks.causal(), backend="triton"
        )
        torch.autograd.grad(out.sum(), (q, k, v))

    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(function):
    """A CUDA graph of a call, and what it writes to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("name", ["plain", "causal", "alibi"])
def test_a_graph_replays_both_passes(name: str):
    leaves, options = tensors(), option_calls()[name]
    wanted = both_passes(leaves, **options)
    graph, results = captured(lambda: both_passes(leaves, **options))
    for result in results:
        result.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(got, want) for got, want in zip(results, wanted, strict=True))


def test_dropout_is_drawn_anew_at_each_replay():
    """Rows of ones: the output is the share of kept weights, 1 on average."""
    q, k, v = (x.detach() for x in tensors())
    v.fill_(1)
    graph, out = captured(lambda: fastattn.attention(q, k, v, dropout_p=0.5, backend="triton"))
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append(out.clone())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    for each in seen:
        assert abs(each.float().mean().item() - 1) < 0.02


def test_compiled_with_gradients():
    def function(q, k, v):
        return fastattn.attention(q.sin(), k, v, mask=masks.causal(), backend="triton").cos()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    leaves = tensors(dtype=torch.float32)
    results = [
        (out.detach(), *torch.autograd.grad(out.square().sum(), leaves))
        for out in (compiled(*leaves), function(*leaves))
    ]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_streams_do_not_disturb_one_another():
    inputs = [tensors(seed=number) for number in range(4)]
    wanted = [both_passes(leaves, mask=masks.causal()) for leaves in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    got = []
    for _ in range(10):
        for stream, leaves in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                got.append(both_passes(leaves, mask=masks.causal()))
    torch.cuda.synchronize()
    for number, results in enumerate(got):
        pairs = zip(results, wanted[number % len(inputs)], strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    leaves = tensors()
    wanted = both_passes(leaves)
    there = [x.detach().to("cuda:1").requires_grad_() for x in leaves]
    assert torch.cuda.current_device() == 0
    for got, want in zip(both_passes(there), wanted, strict=True):
        assert got.device.index == 1
        torch.testing.assert_close(got.cpu(), want.cpu())


@pytest.mark.parametrize("name", ["plain", "causal", "documents", "softcap"])
def test_the_bits_are_the_same_from_run_to_run(name: str):
    leaves, options = tensors(length=1000 if name != "documents" else 256), option_calls()[name]
    first = both_passes(leaves, **options)
    for _ in range(5):
        assert all(torch.equal(*pair) for pair in zip(both_passes(leaves, **options), first, strict=True))


def test_gradients_of_biases_have_the_same_bits_too():
    leaves = tensors()
    for parameter in (torch.randn(4, 256, 256, device=DEVICE), torch.rand(4, device=DEVICE)):
        parameter.requires_grad_()
        bias = ALiBi(parameter) if parameter.dim() == 1 else parameter
        first, again = (both_passes(leaves, (parameter,), bias=bias)[-1] for _ in range(2))
        assert torch.equal(first, again)


def test_memory_grows_with_the_length():
    def added(length: int) -> int:
        leaves = tensors(length, heads=1)
        both_passes(leaves, mask=masks.causal())
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both_passes(leaves, mask=masks.causal())
        return torch.cuda.max_memory_allocated() - before

    short, long = added(4096), added(16384)
    assert long < 4.5 * short
    assert long < 32 * (2 * 16384 * 64 * 2)  # tensors of the size of q; the scores would be 1 GB


def test_tensors_of_more_than_2_31_elements():
    """A window over 2^24 + 64 rows of 128: the last rows are those of a call with them alone."""
    length, dim, left = 2**24 + 64, 128, 63
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free device memory")
    q, k, v, dout = (torch.randn(1, 1, length, dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(4))
    mask = masks.window(left, 0)

    def results(q, k, v, dout):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = fastattn.attention(*leaves, mask=mask, backend="triton")
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    rows = left + 1  # which see the last 2 * rows keys, and alone see the last rows of them
    whole = [x[:, :, -rows:].clone() for x in results(q, k, v, dout)]
    tail = results(q[:, :, -rows:], k[:, :, -2 * rows :], v[:, :, -2 * rows :], dout[:, :, -rows:])
    for got, want in zip(whole, tail, strict=True):
        torch.testing.assert_close(got, want[:, :, -rows:], rtol=2e-2, atol=2e-2)

"""Keys divided among blocks of the emulated device, as for decoding: results, whatever a part sees."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_support import check_emulated, half, on_emulated_device
from split_support import few_rows, options, small_parts
from test_cuda_emulation import BY_NAME, FORWARD, random_half

import fastattn
from fastattn import masks
from fastattn.backends import cuda
from fastattn.testing import Case

SAMPLE = (
    "decode-causal",
    "decode-mqa",
    "gqa",
    "varlen-causal-gqa",
    "varlen-block",
    "all-block",
    "sinks-masked-rows",
)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return small_parts(monkeypatch, cuda)


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name: str, counts: list[int], monkeypatch: pytest.MonkeyPatch):
    check_emulated(half(BY_NAME[name]), monkeypatch, seed=SAMPLE.index(name), blocks=32)
    assert max(counts) > 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", FORWARD, ids=lambda case: case.name)
def test_every_case(case: Case, dtype: torch.dtype, counts: list[int], monkeypatch: pytest.MonkeyPatch):
    check_emulated(half(case, dtype), monkeypatch, seed=1, blocks=48)


@pytest.mark.parametrize("example", range(6))
def test_random_cases(example: int, counts: list[int], monkeypatch: pytest.MonkeyPatch):
    check_emulated(random_half(example), monkeypatch, seed=example, blocks=32)


@pytest.mark.slow
@pytest.mark.parametrize("example", range(100, 300))
def test_more_random_cases(example: int, counts: list[int], monkeypatch: pytest.MonkeyPatch):
    check_emulated(random_half(example), monkeypatch, seed=example, blocks=32)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("option", [{}, {"softcap": 20.0}], ids=["range", "general"])
def test_each_kernel(head_dim: int, option: dict, counts: list[int], monkeypatch: pytest.MonkeyPatch):
    """A few rows that share a tile with those of other heads; five parts of at most three tiles of keys."""
    case = Case("parts", 1, 4, 1, 3, 330, head_dim, **option, dtype=torch.bfloat16, grads=False)
    causal = replace(case, mask=lambda c, g: masks.causal(align="bottom_right"))
    check_emulated(causal, monkeypatch, seed=head_dim, blocks=5)
    assert counts == [5]


def tensors(seqlen_q: int = 2, seqlen_k: int = 400, batch: int = 2) -> list[torch.Tensor]:
    return [t.half() for t in few_rows(seqlen_q, seqlen_k, 64, batch)]


OPTIONS = options(400) | {"blocks": {"mask": masks.prefix(torch.tensor([300, 4])) | masks.causal()}}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, counts: list[int], monkeypatch: pytest.MonkeyPatch):
    results = []
    for backend in ("cuda", "reference"):
        with on_emulated_device(monkeypatch, blocks=24):
            results.append(fastattn.attention(*tensors(), **OPTIONS[name], return_lse=True, backend=backend))
    (out, lse), (want, want_lse) = results
    torch.testing.assert_close(out, want, rtol=0, atol=3e-3)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-3)
    assert counts[0] >= 3


@pytest.mark.parametrize("option", [{}, {"softcap": 5.0}], ids=["range", "general"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_with_the_rows_that_see_it(
    value: float, option: dict, counts: list[int], monkeypatch: pytest.MonkeyPatch
):
    q, k, v = tensors()
    v[:, :, 399] = value
    k[:, 0, 390] = value  # both rows see it
    call: dict[str, Any] = {"mask": masks.causal(align="bottom_right"), **option}
    with on_emulated_device(monkeypatch, blocks=16):
        out = fastattn.attention(q, k, v, backend="cuda", **call)
    want = fastattn.attention(q, k, v, backend="reference", **call)
    assert torch.equal(out.isfinite(), want.isfinite())
    assert not out[:, 2:, 1].isfinite().any() and out[:, 2:, 0].isfinite().all()
    torch.testing.assert_close(out[:, 2:, 0], want[:, 2:, 0], rtol=0, atol=3e-3)
    assert counts == [4]


def test_the_same_bits_in_any_order_of_events(counts: list[int], monkeypatch: pytest.MonkeyPatch):
    """Thirteen parts of four tiles of keys: nine of them have none."""
    results = []
    for seed in range(4):
        with on_emulated_device(monkeypatch, seed=seed, blocks=13 * 4):
            results.append(fastattn.attention(*tensors(), backend="cuda", return_lse=True))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])
    assert counts == [13] * 4


def test_a_call_without_rows(monkeypatch: pytest.MonkeyPatch):
    """Nothing is asked for room, or divided."""
    q, k, v = tensors()
    with on_emulated_device(monkeypatch):
        assert fastattn.attention(q[:, :, :0], k, v, backend="cuda").shape == (2, 4, 0, 64)


def test_with_deterministic_algorithms_the_batch_does_not_count(
    counts: list[int], monkeypatch: pytest.MonkeyPatch
):
    q, k, v = tensors()

    def both() -> list[torch.Tensor]:
        with on_emulated_device(monkeypatch, blocks=16):
            return [fastattn.attention(q[:n], k[:n], v[:n], backend="cuda")[:1] for n in (2, 1)]

    both()
    assert counts == [4, 8]
    torch.use_deterministic_algorithms(True)
    try:
        whole, alone = both()
        many = [t[:1] for t in tensors(65)]
        with on_emulated_device(monkeypatch, blocks=16):
            fastattn.attention(*many, backend="cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(whole, alone) and counts[2:] == [16, 16, 1]

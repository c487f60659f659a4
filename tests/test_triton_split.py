"""Keys divided among programs, as for decoding: results within the same bounds, whatever a part sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from split_support import few_rows, options, small_parts
from test_cases import BY_NAME, prepared
from triton_support import needs_triton

import fastattn
from fastattn import masks
from fastattn.backends import common
from fastattn.backends import triton as backend
from fastattn.testing import CASES, Case, make_inputs
from fastattn.testing.checking import check_case, refusal

pytestmark = [needs_triton, pytest.mark.skipif(not backend.is_interpreted(), reason="needs the interpreter")]

SAMPLE = ("decode-causal", "decode-bfloat16", "paged-odd", "paged-causal-float16", "one")


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from fastattn.backends.triton import host

    return small_parts(monkeypatch, host)


def check(case: Case) -> None:
    if (reason := refusal("triton", make_inputs(case))) is not None:
        pytest.skip(f"triton: {reason}")
    check_case("triton", *prepared(case))


@pytest.mark.parametrize("name", SAMPLE)
def test_case(name: str, counts: list[int]):
    check(BY_NAME[name])
    assert counts and (name == "one" or max(counts) > 1)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case(case: Case, counts: list[int]):
    check(case)


def tensors(seqlen_q: int = 2, seqlen_k: int = 300, dim: int = 16) -> list[torch.Tensor]:
    return [t.requires_grad_() for t in few_rows(seqlen_q, seqlen_k, dim)]


OPTIONS = options(300) | {"causal": {"mask": masks.causal()}}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, counts: list[int]):
    """Values, lse and gradients, which are made from them."""
    results = []
    for backend_name in ("triton", "reference"):
        leaves = tensors()
        out, lse = fastattn.attention(*leaves, **OPTIONS[name], return_lse=True, backend=backend_name)
        seen = torch.where(lse.isfinite(), lse, 0.0)
        results.append((out, lse, *torch.autograd.grad(out.sin().sum() + seen.sum(), leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)
    assert counts == [18]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_the_rows_that_see_it(value: float, counts: list[int]):
    q, k, v = (t.detach() for t in tensors())
    v[:, :, 299] = value
    mask = masks.causal(align="bottom_right")
    out = fastattn.attention(q, k, v, mask=mask, backend="triton")
    want = fastattn.attention(q, k, v, mask=mask, backend="reference")
    assert not out[:, :, 1].isfinite().any()
    torch.testing.assert_close(out[:, :, 0], want[:, :, 0])
    assert counts == [18]


def test_packed_sequences(counts: list[int]):
    q, k, v = (t.detach() for t in tensors())
    packed = [q[0].transpose(0, 1).repeat(3, 1, 1)[:5], *(t[0].transpose(0, 1) for t in (k, v))]
    offsets_q, offsets_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 2, 5], [0, 120, 200, 300]))
    results = [
        fastattn.varlen_attention(
            *packed, offsets_q, offsets_k, mask=masks.causal(), return_lse=True, backend=name
        )
        for name in ("triton", "reference")
    ]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert counts == [7]


def test_a_plan_has_room_for_the_parts(counts: list[int], stand_in):
    for factor in (1.0, 0.5):
        q, k, v = (t.detach() * factor for t in tensors())
        got = fastattn.attention(q, k, v, backend="triton")
        torch.testing.assert_close(
            got, fastattn.attention(q, k, v, backend="reference"), rtol=1e-4, atol=1e-5
        )
    assert stand_in.runs == 2 and counts == [18]


def test_with_deterministic_algorithms_the_batch_does_not_count(counts: list[int], monkeypatch):
    """Where it does count: with few processors a batch of two is divided into fewer parts than one entry."""
    from fastattn.backends.triton import host

    monkeypatch.setattr(host, "multiprocessors", lambda device: 16)
    q, k, v = (t.detach() for t in tensors())

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        whole, alone = (fastattn.attention(*(t[:n] for t in (q, k, v)), backend="triton")[:1] for n in (2, 1))
        return whole, alone

    both()
    assert counts == [4, 8]
    torch.use_deterministic_algorithms(True)
    try:
        whole, alone = both()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(whole, alone) and counts[2:] == [18, 18]


@pytest.mark.parametrize(
    ("tiles", "seqlen_k", "want"),
    [
        (8, 32768, 33),  # fill the device
        (264, 32768, 1),  # it is full
        (133, 32768, 1),  # two parts would not all run at once
        (1, 1000, 3),  # no shorter parts
        (1, 255, 1),
        (0, 0, 1),
    ],
)
def test_the_number_of_parts(tiles: int, seqlen_k: int, want: int):
    assert common.parts_of(tiles, 1, seqlen_k, 264) == want


def test_what_is_not_divided(counts: list[int]) -> None:
    """Many rows, and block masks, whose lists name their tiles."""
    q, k, v = (t.detach() for t in tensors(seqlen_q=65))
    options: Any = ({}, {"mask": masks.causal() | masks.prefix(torch.tensor([40, 4]))})
    for queries, option in zip((q, q[:, :, :2]), options, strict=True):
        fastattn.attention(queries, k, v, **option, backend="triton")
    assert not counts

"""Plans of the triton backend: launches by address give the bits of the long way, and only where they may."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from stand_in_support import StandIn
from test_cases import BY_NAME
from triton_support import needs_triton

import fastattn
from fastattn import masks, repeated
from fastattn.backends import triton as backend
from fastattn.testing import CASES, Case, Inputs, make_inputs, run
from fastattn.testing.checking import refusal

pytestmark = [
    needs_triton,
    pytest.mark.skipif(not backend.is_interpreted(), reason="compiled kernels need no stand-in"),
]

# For each form of what kernels are given; those that take long under the interpreter are below, smaller.
FORMS = ("gqa", "layout-blhd", "paged-odd", "mask-padding-per-query", "bool-transposed")


def others(inputs: Inputs) -> Inputs:
    """Inputs of the same form, other numbers, and in other memory."""
    leaves = {}
    for name, leaf in inputs.leaves.items():  # by their memory, since elements may share it
        memory = torch.empty(0, dtype=leaf.dtype).set_(leaf.untyped_storage()).clone().mul_(0.5)
        leaves[name] = memory.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset())
    return replace(inputs, leaves=leaves)


def check(case: Case, stand_in: type[StandIn]) -> None:
    inputs = make_inputs(case)
    if (reason := refusal("triton", inputs)) is not None:
        pytest.skip(f"triton: {reason}")
    want = run(fastattn, others(inputs), backend="triton")  # leaves the plan
    before = stand_in.runs
    run(fastattn, inputs, backend="triton")
    got = run(fastattn, others(inputs), backend="triton")
    for name in want:
        assert torch.equal(got[name].nan_to_num(7.0), want[name].nan_to_num(7.0)), name
    is_planned = case.score == "dot" and inputs.leaves["q"].stride(-1) == 1
    assert not is_planned or stand_in.runs > before


@pytest.mark.parametrize("name", FORMS)
def test_a_plan_gives_the_same_bits(name: str, stand_in):
    check(BY_NAME[name], stand_in)
    assert stand_in.runs > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_by_a_plan(case: Case, stand_in):
    check(case, stand_in)


def tensors(*shape: int, count: int = 3, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def attend(*args: torch.Tensor, **options: Any) -> torch.Tensor:
    return fastattn.attention(*args, backend="triton", **options)


@pytest.mark.parametrize("repeated_offsets", [True, False])
def test_packed_sequences_by_a_plan(repeated_offsets: bool, stand_in):
    """Offsets and block lists are read where they lie, not where those of the first call lay."""
    for ends in ((3, 9), (5, 9)):
        leaves = [t.requires_grad_() for t in tensors(9, 1, 16)]
        offsets = torch.tensor([0, *ends], dtype=torch.int32)
        others = offsets if repeated_offsets else offsets.clone()
        results = []
        for name in ("triton", "reference"):
            mask = masks.causal() | masks.prefix(torch.tensor([ends[0], 1]))
            out = fastattn.varlen_attention(
                *leaves, offsets, others, max_seqlen_q=9, max_seqlen_k=9, mask=mask, backend=name
            )
            results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert stand_in.runs == 4


def test_what_is_the_same_tensor_once_may_be_another_later(stand_in):
    q, k, v = tensors(1, 1, 8, 16)
    attend(q, q, q)
    got = attend(q, k, v)
    assert stand_in.runs == 1
    torch.testing.assert_close(got, fastattn.attention(q, k, v, backend="reference"))


def test_other_calls_go_the_long_way(stand_in):
    """Each change of what a kernel is given: length, stride, dtype, number, mask, alignment, lse."""
    q, k, v = tensors(1, 2, 8, 16)
    attend(q, k, v)
    shifted = torch.empty(q.numel() + 1)[1:].view(q.shape).copy_(q)
    assert shifted.data_ptr() % 16
    attend(q[:, :, :4], k, v)
    attend(q, k.transpose(1, 2).contiguous().transpose(1, 2), v)
    attend(*(t.half() for t in (q, k, v)))
    attend(q, k, v, scale=0.5)
    attend(q, k, v, mask=masks.causal())
    attend(q, k, v, return_lse=True)
    attend(shifted, k, v)
    assert stand_in.runs == 0
    attend(q.clone(), k.clone(), v.clone())
    assert stand_in.runs == 1


def test_what_must_be_copied_first_has_no_plan(stand_in):
    """A last dimension that is not dense, and a view that holds the negated values."""
    q, k, v = tensors(1, 1, 8, 16)
    want = attend(q, k, v)
    strided = torch.stack((k, k), -1)[..., 0]
    negated = torch.view_as_complex(torch.stack((q, -q), -1)).conj().imag
    assert negated.is_neg()
    for _ in range(2):
        assert torch.equal(attend(q, strided, v), want)
    before = stand_in.runs
    planned = torch.view_as_complex(torch.stack((q, q), -1)).imag
    for _ in range(2):
        torch.testing.assert_close(attend(negated, k, v), attend(planned, k, v))
    assert stand_in.runs == before


def test_results_have_the_layout_of_q(stand_in):
    viewed = [t.transpose(1, 2) for t in tensors(2, 8, 3, 16)]
    first, second = attend(*viewed), attend(*viewed)
    assert stand_in.runs == 1
    assert second.stride() == first.stride() and torch.equal(first, second)


def test_plans_are_bounded(stand_in, monkeypatch: pytest.MonkeyPatch):
    from fastattn.backends.triton import plans

    monkeypatch.setattr(plans, "LIMIT", 3)
    monkeypatch.setattr(repeated, "LIMIT", 3)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    for length in range(1, 9):
        attend(*tensors(1, 1, length, 16))
    assert len(plans.FORWARD._plans) <= 3 and len(repeated._known) <= 3


@pytest.fixture
def on_gpu(stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors say that they are on a GPU, for `repeated` to look at them."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mask", [None, masks.causal(), masks.window(3, 1, align="top_left")], ids=str)
def test_a_repeated_call_is_the_call(mask: Any, grad: bool, on_gpu, stand_in):
    options = {"mask": mask, "softcap": 2.0, "dropout_p": 0.25, "dropout_seed": torch.tensor([5])}
    for scale in (1.0, 0.5):  # other numbers in memory, the same kind of call
        leaves = [(t * scale).requires_grad_(grad) for t in tensors(1, 2, 9, 16)]
        results = []
        for name in ("triton", "reference"):
            out, lse = fastattn.attention(*leaves, **options, return_lse=True, backend=name)
            grads = torch.autograd.grad(out.sin().sum() + lse.sum(), leaves) if grad else ()
            results.append((out, lse, *grads))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    # The reference has no kernels: that, too, is known of its calls.
    assert [known is None for known in repeated._known.values()] == [False, True] and stand_in.runs > 0


def test_a_repeated_call_draws_a_seed_each_time(on_gpu):
    q, k, v = tensors(1, 1, 8, 16)
    torch.manual_seed(0)
    first, second = (attend(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(attend(q, k, v, dropout_p=0.5), first)


def test_errors_of_a_repeated_call_are_the_same(on_gpu):
    q, k, v = tensors(1, 1, 8, 16)
    attend(q, k, v, dropout_p=0.5)
    for change, message in (
        ({"dropout_seed": torch.tensor([1.0])}, "dropout_seed must be an int64 tensor"),
        ({"dropout_p": 1.5}, "dropout_p must be between 0 and 1, got 1.5"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"mask": "causal"}, "mask must be"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            attend(q, k, v, **{"dropout_p": 0.5, **change})
    with pytest.raises(ValueError, match="k must have q's head_dim 16, got 8"):
        attend(q, k[..., :8], v)
    with pytest.raises(TypeError, match="q must be a dense strided tensor"):
        attend(q.to_sparse(), k, v)
    with pytest.raises(TypeError, match="backend must be a string"):
        fastattn.attention(q, k, v, backend=["triton"])


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for the driver that is pretended")
@pytest.mark.parametrize("calls", ["^plain", pytest.param("", marks=pytest.mark.slow)])
def test_host_time(calls: str):
    """Of the whole call up to the driver, launcher included: a repeated one costs less than half."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastattn.bench.gpu.host_time", "--rounds", "5", "--filter", calls]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {line[:22].strip(): line[22:].split() for line in done.stdout.splitlines()[1:]}
    assert rows["plain"][4] == "1"
    for row in rows.values():
        _, planned, _, long_way, _ = map(float, row)
        assert planned < long_way / 2, done.stdout

"""Non-finite values reach only what sees them; empty rows and empty tensors give zeros."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from triton_support import INSTALLED, needs_triton

import fastattn
from fastattn import masks
from fastattn.backends import cpu
from fastattn.testing import CASES, Inputs, check, make_inputs, oracle, run
from fastattn.testing.inputs import poisoned_memory
from fastattn.testing.running import Oracle
from fastattn.testing.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR

BY_NAME = {case.name: case for case in CASES}
BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(not cpu.available(), reason="the native core is not built")),
    pytest.param("triton", marks=needs_triton),
    "reference",
]
NAMES = (
    "causal-long-k", "window-long-q", "padding-left-like", "mask-padding-per-query", "mask-documents-causal",
    "mask-blocks", "bool-rows", "bool-transposed", "bool-sparse", "bias-holes", "alibi-rows", "all-band",
    "all-dense", "all-block", "dropout-masked-rows", "varlen-causal-gqa", "varlen-empty", "many-tiles-causal",
    "mask-documents-causal-bfloat16", "bool-rows-float16", "bias-holes-float64", "window-long-q-bfloat16",
)  # fmt: skip
EXTRA = {
    "padding-left-like": replace(BY_NAME["mask-padding-left"], name="padding-left-like"),
    "many-tiles-causal": replace(
        BY_NAME["many-tiles"], name="many-tiles-causal", mask=lambda c, g: masks.causal(), head_dim=32
    ),
}


def poison(inputs: Inputs, targets: tuple[str, ...], value: float) -> Inputs:
    """Put `value` into single elements and whole rows of some of the tensors q, k, v and dout."""
    generator = torch.Generator().manual_seed(5)
    tensors = {**inputs.leaves, "dout": inputs.dout}
    for name in targets:
        x = tensors[name] = tensors[name].clone()
        rows = x.view(-1, x.shape[-1]) if x.is_contiguous() else x.reshape(-1, x.shape[-1])
        if rows.numel() == 0:
            continue
        for row in torch.randint(len(rows), (3,), generator=generator).tolist():
            rows[row, int(torch.randint(x.shape[-1], (), generator=generator))] = value
        rows[int(torch.randint(len(rows), (), generator=generator))] = value
        tensors[name] = rows.view(x.shape)
    dout = tensors.pop("dout")
    return replace(inputs, leaves=tensors, dout=dout)


@lru_cache(maxsize=4)
def reached_by_nan(name: str, targets: tuple[str, ...]) -> tuple[Inputs, Oracle]:
    case = EXTRA.get(name) or BY_NAME[name]
    clean = make_inputs(case)
    return clean, oracle(poison(clean, targets, math.nan))


ALL = ("k", "v", "q", "dout")
POISON = [
    ("cpu", math.nan, ("k",)),
    ("cpu", math.nan, ("v",)),
    ("cpu", math.nan, ("q",)),
    ("cpu", math.nan, ("dout",)),
    ("cpu", math.nan, ALL),
    ("cpu", math.inf, ALL),
    ("cpu", -math.inf, ALL),
    ("cpu", math.inf, ("v",)),
    ("triton", math.nan, ALL),
    ("triton", math.inf, ALL),
    ("reference", math.nan, ALL),
]


def skip_without_triton(name: str) -> None:
    if not INSTALLED:
        pytest.skip("triton: not installed")
    if name.endswith("float64"):
        pytest.skip("triton: it has no float64")


def describe(x) -> str:
    return "+".join(x) if isinstance(x, tuple) else str(x)


def poisoned() -> Iterator[Any]:
    """Every case with every poison, most of them slow under Triton's interpreter, which takes minutes."""
    for name, poison in itertools.product(NAMES, POISON):
        backend, value, _ = poison
        slow = backend == "triton" and (value == math.inf or name in ("all-band", "all-dense"))
        marks = [pytest.mark.slow] if slow else []
        yield pytest.param(name, *poison, marks=marks, id="-".join(map(describe, (name, *poison))))


@pytest.mark.parametrize(("name", "backend", "value", "targets"), poisoned())
def test_poison_reaches_what_sees_it_and_nothing_else(name, backend, value, targets):
    """NaN must arrive exactly where the definition takes it. An infinity must stay within the same places
    (there a product such as 0 * inf or exp(-inf) decides what it becomes), and every other result must be
    what it is without the poison's neighbours: within the bound."""
    if backend == "cpu" and not cpu.available():
        pytest.skip("cpu: the native core is not built")
    if backend == "triton":
        skip_without_triton(name)
    clean, expected = reached_by_nan(name, targets)
    case = clean.case
    with poisoned_memory():
        got = run(fastattn, poison(clean, targets, value), backend=backend)
    for result, exact in expected.ref64.items():
        if exact is None:
            continue
        reached = exact.isnan()
        actual = got[result]
        if math.isinf(value):
            actual = actual.masked_fill(reached, math.nan)
        factor = FORWARD_FACTOR if result in ("out", "lse") else GRADIENT_FACTOR
        dtype = None if result == "lse" else case.dtype
        check(result, actual, exact, expected.native[result], factor, dtype)
    if targets == ("v",) and math.isinf(value) and case.dropout_p == 0:
        assert not got["out"][expected.ref64["out"].isnan()].isfinite().any(), "a visible infinity was lost"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hidden_key_changes_no_bit_of_anything(backend: str):
    """A key that no row sees may hold anything: finite results, gradients of 0 for itself."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 70, 16, generator=generator) for _ in range(3))
    mask = torch.ones(70, 70, dtype=torch.bool)
    mask[:, [0, 33, 69]] = False
    for bad in (math.nan, math.inf):
        k[:, :, [0, 33]], v[:, :, [33, 69]] = bad, bad
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = fastattn.attention(*leaves, mask=mask, backend=backend)
        gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert out.isfinite().all()
        assert all(g.isfinite().all() for g in gradients)
        assert all(g[:, :, [0, 33, 69]].count_nonzero() == 0 for g in gradients[1:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seqlen_q", [1, 4, 70])
@pytest.mark.parametrize("level", [0.0, 100.0, -100.0])
def test_a_bias_hides_nan_whatever_its_level(level: float, seqlen_q: int, backend: str):
    """Where |lse| is large, the backward pass adds up the scores again: hidden keys stay out there too."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 16, generator=generator) for n in (seqlen_q, 90, 90))
    bias = torch.full((seqlen_q, 90), level)
    bias[:, [0, 40, 89]] = -math.inf

    def call() -> tuple[torch.Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v, bias)]
        out = fastattn.attention(*leaves[:3], bias=leaves[3], backend=backend)
        return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))

    clean = call()
    for bad in (math.nan, math.inf):
        k[:, :, [0, 89]], v[:, :, [40, 89]] = bad, bad
        for name, got, want in zip(("out", "dq", "dk", "dv", "dbias"), call(), clean, strict=True):
            torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.skipif(not cpu.available(), reason="the native core is not built")
@pytest.mark.parametrize("seqlen_q", [1, 3, 150])
def test_padding_is_not_even_multiplied_by_0(seqlen_q: int):
    """The same bits whatever it holds: nothing had to be computed a second time, by the slow path."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 24, generator=generator) for n in (seqlen_q, 400, 400))
    starts, ends = torch.tensor([3, 41]), torch.tensor([390, 333])
    mask = masks.padding(ends, starts)

    def call() -> tuple[torch.Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = fastattn.attention(*leaves, mask=mask, return_lse=True, backend="cpu")
        return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))

    clean = call()
    for b in range(2):
        for x in (k, v):
            x[b, :, : starts[b]] = x[b, :, ends[b] :] = math.nan
    for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), call(), clean, strict=True):
        assert torch.equal(got, want), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_visible_nan_is_seen_by_hand(backend: str):
    """Causal 3 x 3, NaN in the value of key 1: rows 1 and 2 see it, row 0 does not."""
    q = torch.ones(1, 1, 3, 2, requires_grad=True)
    k = torch.ones(1, 1, 3, 2, requires_grad=True)
    v = torch.tensor([[[[1.0, 2.0], [math.nan, 3.0], [5.0, 6.0]]]], requires_grad=True)
    out = fastattn.attention(q, k, v, mask=masks.causal(), backend=backend)
    assert out.isnan().tolist() == [[[[False, False], [True, False], [True, False]]]]
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert dq.isnan().all(-1).tolist() == [[[False, True, True]]]
    assert dk.isnan().all(-1).tolist() == [[[True, True, True]]]  # rows 1 and 2 see keys 0, 1 and 2
    assert dv.isfinite().all()  # dv = p dO, in which v has no part


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_never_reads_beyond_a_length(backend: str):
    inputs = make_inputs(BY_NAME["decode-causal"])
    clean = run(fastattn, inputs, backend=backend)
    for name in ("k", "v"):
        for b, length in enumerate(inputs.case.lengths_k):
            inputs.leaves[name][b, :, length:] = math.nan
    dirty = run(fastattn, inputs, backend=backend)
    assert torch.equal(clean["out"], dirty["out"])
    assert torch.equal(clean["lse"], dirty["lse"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_paged_caches_never_read_unused_pages_or_the_end_of_a_page(backend: str):
    inputs = make_inputs(BY_NAME["paged-causal"])
    clean = run(fastattn, inputs, backend=backend)
    table, page = inputs.options["block_table"], inputs.case.page_size
    used = torch.zeros(inputs.leaves["k"].shape[0], page, dtype=torch.bool)
    for b, length in enumerate(inputs.case.lengths_k):
        for n in range(length):
            used[table[b, n // page], n % page] = True
    for name in ("k", "v"):
        inputs.leaves[name].transpose(1, 2)[~used] = math.nan
    dirty = run(fastattn, inputs, backend=backend)
    assert torch.equal(clean["out"], dirty["out"])
    assert torch.equal(clean["lse"], dirty["lse"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -2.0])], ids=["plain", "sinks"])
@pytest.mark.parametrize(
    "hidden",
    [
        {"mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool)},
        {"mask": masks.padding(torch.tensor([0, 0]))},
        {"mask": masks.window(2, 2) & ~masks.window(3, 3)},
        {"mask": masks.documents(torch.zeros(2, 40).long(), torch.ones(2, 50).long())},
        {"bias": torch.full((50,), -math.inf)},
    ],
    ids=["bool", "padding", "contradiction", "documents", "bias"],
)
def test_rows_that_see_nothing(hidden: dict, sinks: torch.Tensor | None, backend: str):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 8, generator=generator).requires_grad_() for n in (40, 50, 50))
    leaves = [q, k, v]
    if sinks is not None:
        leaves.append(sinks := sinks.clone().requires_grad_())
    with poisoned_memory():
        out, lse = fastattn.attention(q, k, v, **hidden, sinks=sinks, return_lse=True, backend=backend)
        gradients = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
    assert out.count_nonzero() == 0
    assert all(g.count_nonzero() == 0 for g in gradients[:3])
    if sinks is None:
        assert (lse == -math.inf).all()
    else:
        assert torch.equal(lse, sinks.detach().view(1, 2, 1).expand_as(lse))
        assert torch.equal(
            gradients[3], torch.tensor([80.0, 80.0])
        )  # each of 2 x 40 rows has d lse / d sink = 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_finfo_min_is_uniform_not_empty(backend: str):
    q, k, v = (torch.randn(1, 1, 5, 4, requires_grad=True) for _ in range(3))
    bias = torch.full((5, 5), torch.finfo(torch.float32).min)
    out = fastattn.attention(q, k, v, bias=bias, backend=backend)
    torch.testing.assert_close(out, v.mean(-2, keepdim=True).expand_as(out))
    (dv,) = torch.autograd.grad(out, v, torch.ones_like(out))
    torch.testing.assert_close(dv, torch.ones_like(dv))


EMPTY = {"batch": (0, 3, 4), "q": (2, 0, 4), "k": (2, 3, 0), "q and k": (2, 0, 0)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY.keys())
@pytest.mark.parametrize("mask", [None, masks.causal(), masks.causal() | masks.window(0, 1)], ids=repr)
def test_empty_tensors(mask, shape: tuple[int, int, int], dtype: torch.dtype, backend: str):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("triton: it has no float64")
    batch, lq, lk = shape
    q, k, v = (torch.randn(batch, 2, n, 8, dtype=dtype, requires_grad=True) for n in (lq, lk, lk))
    out, lse = fastattn.attention(q, k, v, mask=mask, return_lse=True, backend=backend)
    assert out.shape == (batch, 2, lq, 8) and lse.shape == (batch, 2, lq)
    assert out.count_nonzero() == 0 and (lse == -math.inf).all()
    gradients = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    for x, gradient in zip((q, k, v), gradients, strict=True):
        assert gradient.shape == x.shape and gradient.count_nonzero() == 0

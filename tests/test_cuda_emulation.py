"""The CUDA kernels' own source on the emulated device: results, waits, schedules, faults that it finds."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from random import Random

import pytest
import torch
from cuda_support import (
    LOST_ARRIVAL,
    NO_FAULT,
    SKIPPED_WAIT,
    UNFINISHED_PRODUCTS,
    WRONG_STRIDE,
    WRONG_SWIZZLE,
    check_emulated,
    emulated,
    half,
    on_emulated_device,
)

import fastattn
from fastattn import masks
from fastattn.testing import CASES, Case, dropout_mask
from fastattn.testing.random_cases import random_case

BY_NAME = {case.name: case for case in CASES}
FORWARD = tuple(case for case in CASES if case.dtype is torch.float32 and case.page_size is None)

# A case for each path through the kernels.
SAMPLE = (
    "gqa", "dv-larger", "many-tiles", "empty-k-sinks", "dim-96", "dim-160", "dim-256", "layout-padded_rows",
    "layout-expanded_kv", "scale--0.5", "scale-0", "softcap-0.5", "sinks-masked-rows", "dropout-0.5",
    "dropout-causal-gqa", "causal-long-k", "window-long-q", "both-aligns-long-q", "mask-padding-per-query",
    "mask-documents-causal", "mask-links", "bool-transposed", "bool-nothing", "bias-full", "bias-floor",
    "bias-relative", "alibi-gqa-causal", "all-band", "all-dense", "all-block", "all-padding",
    "varlen-causal-gqa", "varlen-block", "varlen-empty", "varlen-dropout", "decode-causal", "decode-mqa",
)  # fmt: skip


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name: str, monkeypatch: pytest.MonkeyPatch):
    dtype = (torch.bfloat16, torch.float16)[SAMPLE.index(name) % 2]
    check_emulated(half(BY_NAME[name], dtype), monkeypatch, seed=SAMPLE.index(name))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", FORWARD, ids=lambda case: case.name)
def test_every_case(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    for seed in range(4):
        check_emulated(half(case, dtype), monkeypatch, seed=seed)


def random_half(example: int) -> Case:
    case = replace(random_case(example), score="dot", page_size=None)
    return half(case, (torch.bfloat16, torch.float16)[example % 2])


@pytest.mark.parametrize("example", range(12))
def test_random_cases(example: int, monkeypatch: pytest.MonkeyPatch):
    check_emulated(random_half(example), monkeypatch, seed=example, blocks=1 + example % 4)


@pytest.mark.slow
@pytest.mark.parametrize("example", range(100, 500))
def test_more_random_cases(example: int, monkeypatch: pytest.MonkeyPatch):
    check_emulated(random_half(example), monkeypatch, seed=example, blocks=1 + example % 4)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("option", [{}, {"softcap": 20.0}], ids=["range", "general"])
def test_many_tiles_of_each_kernel(head_dim: int, option: dict, monkeypatch: pytest.MonkeyPatch):
    """More row tiles than blocks, and more key tiles than stages."""
    sizes = {"batch": 1, "heads": 2, "seqlen_q": 210, "seqlen_k": 330, "head_dim": head_dim}
    case = Case(
        "tiles", **sizes, **option, mask=lambda c, g: masks.causal(), dtype=torch.bfloat16, grads=False
    )
    check_emulated(case, monkeypatch, seed=head_dim, blocks=2)


@pytest.mark.parametrize(
    ("seqlen_k", "options", "keys"),
    [
        (510, {}, 176),
        (510, {"sinks": True}, 176),
        (640, {}, 128),  # four wide tiles would reach 64 keys too far
        (510, {"mask": lambda c, g: masks.causal()}, 128),
        (510, {"mask": lambda c, g: masks.padding(torch.tensor([300]))}, 128),
        (510, {"softcap": 20.0}, 64),
    ],
)
def test_wide_tiles_where_every_row_sees_all(
    seqlen_k: int, options: dict, keys: int, monkeypatch: pytest.MonkeyPatch
):
    case = Case("tiles", 1, 2, 1, 150, seqlen_k, 128, **options, dtype=torch.bfloat16, grads=False)
    check_emulated(case, monkeypatch, seed=keys, blocks=2)
    assert emulated().launched_keys() == keys


@pytest.mark.parametrize("heads", [2, 3, 5, 8, 64, 100])
@pytest.mark.parametrize("seqlen_q", [1, 7])
def test_heads_of_a_group_share_a_tile(heads: int, seqlen_q: int, monkeypatch: pytest.MonkeyPatch):
    case = Case("packed", 1, heads, 1, seqlen_q, 150, 64, dtype=torch.bfloat16, grads=False)
    causal = replace(case, mask=lambda c, g: masks.causal(), sinks=True)
    for each in (case, causal):
        check_emulated(each, monkeypatch, seed=heads)


@pytest.mark.parametrize("layout", ["blhd", "sliced", "padded_rows", "expanded_batch", "reversed", "stepped"])
def test_layouts(layout: str, monkeypatch: pytest.MonkeyPatch):
    check_emulated(half(replace(BY_NAME["gqa"], layout=layout, name=layout)), monkeypatch)


def test_an_address_that_is_not_aligned(monkeypatch: pytest.MonkeyPatch):
    flat = torch.randn(3 * 2 * 40 * 64 + 1).bfloat16()[1:]
    q, k, v = flat.view(3, 1, 2, 40, 64).unbind()
    with on_emulated_device(monkeypatch):
        got = fastattn.attention(q, k, v, backend="cuda")
    torch.testing.assert_close(got, fastattn.attention(q, k, v, backend="reference"), rtol=0, atol=0.02)


def test_dropout_keeps_the_elements_of_every_backend(monkeypatch: pytest.MonkeyPatch):
    seed = torch.tensor([77])
    q, k = torch.zeros(1, 2, 70, 64).half(), torch.zeros(1, 2, 128, 64).half()
    v = torch.eye(128).half().expand(1, 2, 128, 128)
    with on_emulated_device(monkeypatch):
        out = fastattn.attention(q, k, v, dropout_p=0.4, dropout_seed=seed, backend="cuda")
    assert torch.equal(out > 0, dropout_mask(seed, 1, 2, 70, 128, 0.4, "cpu"))


@pytest.mark.parametrize("option", [{}, {"softcap": 5.0}], ids=["range", "general"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_reaches_only_rows_that_see_it(
    value: float, option: dict, monkeypatch: pytest.MonkeyPatch
):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, 150, 64, generator=generator).bfloat16() for _ in range(3))
    k[0, 0, 100, 3], v[0, 1, 100, 5] = value, value
    with on_emulated_device(monkeypatch):
        out, lse = fastattn.attention(q, k, v, mask=masks.causal(), backend="cuda", return_lse=True, **option)
    want, want_lse = fastattn.attention(
        q, k, v, mask=masks.causal(), backend="reference", return_lse=True, **option
    )
    assert torch.equal(out.isfinite(), want.isfinite())
    assert not out[0, 1, 100:, 5].isfinite().any() and out[0, :, :100].isfinite().all()
    finite = want.isfinite()
    torch.testing.assert_close(out[finite], want[finite], rtol=0, atol=0.03)
    torch.testing.assert_close(lse[0, 1], want_lse[0, 1], rtol=0, atol=1e-3)


def test_the_same_bits_in_any_order_of_events(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 2, 200, 128, generator=generator).bfloat16() for _ in range(3))
    results = []
    for seed in range(6):
        with on_emulated_device(monkeypatch, seed=seed, blocks=1 + seed % 3):
            results.append(fastattn.attention(q, k, v, mask=masks.causal(), backend="cuda", return_lse=True))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("option", [{}, {"softcap": 500.0}], ids=["range", "general"])
@pytest.mark.parametrize("growth", [1.0, 6.0, 30.0])
def test_a_maximum_that_is_kept_for_a_while(growth: float, option: dict, monkeypatch: pytest.MonkeyPatch):
    """Scores grow in the order in which tiles come, by `growth` powers of two for each 100 keys: fewer than
    the softmax lets pass at a time, or more."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 1, n, 64, generator=generator) for n in (70, 700, 700))
    q /= 16
    q[..., 0], k[..., 0] = 1, torch.linspace(7, 0, 700) * growth * math.log(2)
    q, k, v = (t.bfloat16() for t in (q, k, v))
    call = {"scale": 1.0, "return_lse": True, **option}
    with on_emulated_device(monkeypatch):
        out, lse = fastattn.attention(q, k, v, backend="cuda", **call)
    want, want_lse = fastattn.attention(q, k, v, backend="reference", **call)
    torch.testing.assert_close(out, want, rtol=0, atol=0.02)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-3)


KINDS = ("range", "general")


def outcome(monkeypatch: pytest.MonkeyPatch, kind: str, seed: int, fault: int, barrier: int = 0) -> str:
    """What becomes of a call on a device with a fault: "right", "wrong" or the device's message.

    Four tiles of rows with 11 tiles of keys each (7 of the other kind): every stage is the last one once,
    whose v nothing but its own barrier protects.
    """
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, n, 64, generator=generator).bfloat16() for n in (200, 700, 700))
    options = {"softcap": 5.0} if kind == "general" else {}
    with on_emulated_device(monkeypatch, seed=seed, blocks=1, fault=fault, barrier=barrier):
        try:
            got = fastattn.attention(q, k, v, backend="cuda", **options)
        except RuntimeError as error:
            return str(error)
    want = fastattn.attention(q, k, v, backend="reference", **options)
    return "right" if (got - want).abs().max() < 0.02 else "wrong"


def barriers(kind: str) -> range:
    (stages,) = (c["stages"] for c in emulated().configs() if c["head_dim"] == 64 and c["variant"] == kind)
    return range(2 + 4 * stages)


@pytest.mark.parametrize("kind", KINDS)
def test_each_wait_is_needed(kind: str, monkeypatch: pytest.MonkeyPatch):
    assert outcome(monkeypatch, kind, 0, NO_FAULT) == "right"
    for barrier in barriers(kind):
        found = (outcome(monkeypatch, kind, seed, SKIPPED_WAIT, barrier) for seed in range(40))
        assert any(each != "right" for each in found), barrier


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_arrival_stops_the_block(kind: str, monkeypatch: pytest.MonkeyPatch):
    for barrier in barriers(kind):
        message = outcome(monkeypatch, kind, barrier, LOST_ARRIVAL, barrier)
        assert "nothing can go on" in message and "may be overwritten" in message, barrier


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", [UNFINISHED_PRODUCTS, WRONG_SWIZZLE, WRONG_STRIDE])
def test_other_faults_show(kind: str, fault: int, monkeypatch: pytest.MonkeyPatch):
    assert outcome(monkeypatch, kind, 2, fault) != "right"


@pytest.mark.parametrize("example", range(40))
def test_every_tile_is_computed_once(example: int):
    rng = Random(example)
    sizes = tuple(rng.choice([1, 2, 3, 7, 40]) for _ in range(3))
    _, heads, batch = sizes
    section, blocks, parts = (
        rng.randint(1, heads * batch),
        rng.choice([1, 2, 5, 132]),
        rng.choice([1, 1, 2, 5]),
    )
    dealt = emulated().schedule(*sizes, section, parts, blocks)
    seen = Counter(tuple(item) for block in dealt for item in block)
    assert len(seen) == math.prod(sizes) * parts
    assert set(seen.values()) == {1}
    assert all(0 <= at < size for item in seen for at, size in zip(item, (*sizes, parts), strict=True))
    lengths = [len(block) for block in dealt]
    assert max(lengths) - min(lengths) <= 1


def test_a_causal_call_is_dealt_evenly():
    """Row tile t of a causal call costs t + 1; no block gets more than a tile above its share."""
    dealt = emulated().schedule(128, 16, 1, 16, 1, 132)
    work = [sum(tile + 1 for tile, _, _, _ in block) for block in dealt]
    assert max(work) - sum(work) / len(work) < 64

"""The cases that benchmarks time, in groups; shapes give each about 1 to 100 ms on one core.

Masks, biases and inputs are those of the tests' cases (`fastattn.testing.cases`), at sizes worth timing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastattn import masks
from fastattn.testing.case import Case
from fastattn.testing.cases import MaskFactory, alibi, always, document_mask, random_mask, tensor_bias

# What is timed: the forward pass without gradient, the backward pass alone, or both with autograd.
TIMED = ("forward", "backward", "step")

Shape = tuple[int, int, int, int]  # batch, heads, seqlen_q, head_dim

# Heads shrink as the length grows, so that the time does not explode; never one head alone, as PyTorch's
# backward pass is parallel over batch and heads only.
GRID: dict[int, tuple[int, int]] = {64: (8, 8), 128: (4, 8), 512: (1, 8), 1024: (1, 8), 4096: (1, 2)}
GRID_DIMS = (32, 64, 128)


@dataclass(frozen=True)
class BenchCase:
    """One timed problem.

    Args:
        group: what the summary averages over.
        case: the problem; its name is unique among the benchmarks.
        timed: one of TIMED.
        quick: whether it belongs to the short run.
    """

    group: str
    case: Case
    timed: str = "forward"
    quick: bool = False

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def shape(self) -> str:
        """`(1, 8, 1024, 64) float32`, with key length, key-value heads and value width where they differ."""
        case = self.case
        text = f"({case.batch}, {case.heads}, {case.queries}, {case.head_dim})"
        if case.keys != case.queries:
            text += f" {case.keys} keys"
        if case.num_heads_kv != case.heads:
            text += f" {case.num_heads_kv} kv heads"
        if case.dim_v != case.head_dim:
            text += f" dv {case.dim_v}"
        return f"{text} {str(case.dtype).removeprefix('torch.')}"


def grid_shape(length: int, dim: int) -> Shape:
    return (*GRID[length], length, dim)


def bench_case(
    group: str, shape: Shape, timed: str = "forward", *, quick: bool = False, tag: str = "", **options: Any
) -> BenchCase:
    """A case named after its group and shape; `tag` tells it from others of the same group and shape."""
    batch, heads, seqlen_q, head_dim = shape
    name = "-".join([group.replace(" ", "-"), *([tag] if tag else []), str(seqlen_q), str(head_dim)])
    case = Case(name, batch, heads, seqlen_q=seqlen_q, head_dim=head_dim, **options)
    return BenchCase(group, case, timed, quick)


def dense_cases() -> list[BenchCase]:
    """The grid of lengths and head dims, no mask; backward alone on part of it, then both passes together."""
    cases = [
        bench_case("forward", grid_shape(length, dim), quick=dim == 64 or length in (128, 1024))
        for length in GRID
        for dim in GRID_DIMS
    ]
    chosen = [(length, 64) for length in GRID] + [
        (length, dim) for length in (128, 1024) for dim in (32, 128)
    ]
    cases += [
        bench_case("backward", grid_shape(length, dim), "backward", quick=dim == 64 and length < 4096)
        for length, dim in sorted(chosen)
    ]
    cases += [
        bench_case("forward+backward", grid_shape(length, 64), "step", quick=length == 512)
        for length in (128, 512, 1024)
    ]
    return cases


def causal_cases() -> list[BenchCase]:
    mask = always(masks.causal())
    chosen = [(length, 64) for length in GRID] + [
        (length, dim) for length in (512, 1024) for dim in (32, 128)
    ]
    cases = [
        bench_case("causal", grid_shape(length, dim), mask=mask, quick=dim == 64 and 64 < length < 4096)
        for length, dim in sorted(chosen)
    ]
    return cases + [
        bench_case("causal backward", grid_shape(length, 64), "backward", mask=mask, quick=length == 1024)
        for length in (128, 512, 1024, 4096)
    ]


def tensor_mask_cases() -> list[BenchCase]:
    """Bool masks with holes everywhere, so that no tile can be skipped, and additive biases."""

    def holes(*dims: str) -> MaskFactory:
        return random_mask(*dims, p=0.9)

    cases = [
        bench_case("bool mask", (1, 8, 512, 64), tag="rows", mask=holes("q", "k"), quick=True),
        bench_case("bool mask", (1, 8, 1024, 64), tag="rows", mask=holes("q", "k"), quick=True),
        bench_case("bool mask", (1, 8, 1024, 128), tag="rows", mask=holes("q", "k")),
        bench_case("bool mask", (2, 8, 512, 64), tag="batch", mask=holes("b", "q", "k")),
        bench_case("bool mask", (1, 8, 1024, 64), tag="heads", mask=holes("h", "q", "k")),
        bench_case("bool mask", (1, 2, 4096, 64), tag="rows", mask=holes("q", "k")),
        bench_case("bool mask backward", (1, 8, 1024, 64), "backward", mask=holes("q", "k"), quick=True),
    ]
    bias, fixed = tensor_bias("h", "q", "k"), tensor_bias("q", "k")
    return cases + [
        bench_case("float bias", (1, 8, 1024, 64), tag="heads", bias=bias, quick=True),
        bench_case("float bias", (1, 8, 512, 128), tag="rows", bias=fixed),
        bench_case("float bias", (1, 8, 1024, 64), tag="alibi", bias=alibi()),
    ]


def sparse_cases() -> list[BenchCase]:
    """Masks of which whole tiles are hidden: padding, windows, packed documents."""

    def padding(case: Case, generator: torch.Generator) -> Any:
        # Lengths spread evenly from a quarter to the whole.
        return masks.padding(torch.linspace(case.keys / 4, case.keys, case.batch).long())

    causal, window = masks.causal(), always(masks.causal() & masks.window(127, 0))
    return [
        bench_case("padding", (8, 8, 128, 64), mask=padding),
        bench_case("padding", (8, 4, 512, 64), mask=padding, quick=True),
        bench_case("window 128", (1, 2, 4096, 64), mask=window, quick=True),
        bench_case("window 128", (1, 8, 4096, 64), tag="heads", mask=window),
        bench_case("window 128", (1, 2, 4096, 128), mask=window),
        bench_case("window 128", (1, 2, 4096, 64), tag="both", mask=always(masks.window(64, 63))),
        bench_case("window 128 backward", (1, 2, 4096, 64), "backward", mask=window),
        bench_case("documents", (1, 8, 1024, 64), mask=lambda c, g: causal & document_mask(c, g)),
    ]


def dropout_cases() -> list[BenchCase]:
    mask = always(masks.causal())
    return [
        bench_case("dropout 0.1", (1, 8, 128, 64), dropout_p=0.1),
        bench_case("dropout 0.1", (1, 8, 512, 64), dropout_p=0.1, quick=True),
        bench_case("dropout 0.1", (1, 8, 1024, 64), dropout_p=0.1),
        bench_case("dropout 0.1", (1, 8, 1024, 128), dropout_p=0.1),
        bench_case("dropout 0.1", (1, 8, 512, 64), tag="causal", dropout_p=0.1, mask=mask),
        bench_case("dropout 0.1 forward+backward", (1, 8, 128, 64), "step", dropout_p=0.1),
        bench_case("dropout 0.1 forward+backward", (1, 8, 512, 64), "step", dropout_p=0.1, quick=True),
        bench_case("dropout 0.1 forward+backward", (1, 8, 1024, 64), "step", dropout_p=0.1),
    ]


def head_cases() -> list[BenchCase]:
    """Shared key-value heads, and one query over a long cache."""
    shared: dict[str, Any] = {"heads_kv": 8}
    cases = [
        bench_case("gqa", (1, 32, 512, 64), **shared, quick=True),
        bench_case("gqa", (1, 32, 512, 128), **shared, tag="causal", mask=always(masks.causal())),
        bench_case("gqa", (1, 32, 512, 64), "step", tag="step", **shared),
    ]
    keys = 8192
    cache: dict[str, Any] = {"op": "decode", "seqlen_k": keys, "lengths_k": (keys,), "heads_kv": 8}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        label = str(dtype).removeprefix("torch.")
        for heads in (8, 32):
            quick = dtype != torch.float16 and (heads == 8 or dtype == torch.bfloat16)
            shape = (1, heads, 1, 128)
            group = f"decode {label}" + (" gqa" if heads > 8 else "")
            cases.append(bench_case(group, shape, dtype=dtype, quick=quick, **cache))
    return cases


def half_cases() -> list[BenchCase]:
    cases = []
    for dtype in (torch.bfloat16, torch.float16):
        label = str(dtype).removeprefix("torch.")
        brief = dtype == torch.bfloat16
        cases += [
            bench_case(label, (1, 8, 1024, 64), dtype=dtype, quick=brief),
            bench_case(label, (1, 8, 512, 128), dtype=dtype),
            bench_case(label, (1, 8, 512, 64), tag="causal", dtype=dtype, mask=always(masks.causal())),
            bench_case(f"{label} backward", (1, 8, 512, 64), "backward", dtype=dtype),
        ]
    return cases


def small_cases() -> list[BenchCase]:
    """Calls that are mostly overhead, and many short sequences."""
    return [
        bench_case("tiny call", (1, 1, 1, 16), quick=True),
        bench_case("tiny call forward+backward", (1, 1, 1, 16), "step", quick=True),
        bench_case("small", (1, 8, 16, 64), quick=True),
        bench_case("small", (1, 8, 64, 64)),
        bench_case("small forward+backward", (1, 8, 16, 64), "step", quick=True),
        bench_case("short sequences", (64, 4, 16, 32)),
        bench_case("short sequences", (32, 8, 32, 64), quick=True),
        bench_case("short sequences", (8, 8, 64, 32)),
        bench_case("short sequences", (1, 8, 1024, 64), seqlen_k=77, tag="cross"),
    ]


def all_bench_cases() -> list[BenchCase]:
    builders = (
        dense_cases,
        causal_cases,
        tensor_mask_cases,
        sparse_cases,
        dropout_cases,
        head_cases,
        half_cases,
        small_cases,
    )
    return [case for build in builders for case in build()]


BENCH_CASES: tuple[BenchCase, ...] = tuple(all_bench_cases())

"""The cases that benchmarks time, in groups; shapes give most about 0.1 to 200 ms on one core.

They sample the grid B·H in {1, 8, 64}, L in {17, 64, 128, 512, 1024, 4096}, D in {32, 64, 80, 128, 256}.
Masks, biases and inputs are those of the tests' cases (`fastattn.testing.cases`), at sizes worth timing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fastattn import masks
from fastattn.testing.bench_case import BenchCase, Shape, against_one_thread, bench_case, grid_shape
from fastattn.testing.case import Case
from fastattn.testing.cases import (
    HALF,
    MaskFactory,
    alibi,
    always,
    document_mask,
    random_mask,
    relative,
    tensor_bias,
)

# (B·H, D) at each length. All head dims meet all lengths; what is left out is heavy or like its neighbours.
FORWARD = {
    512: ((8, 32), (8, 64), (8, 80), (8, 128), (8, 256), (1, 64), (64, 64)),
    1024: ((8, 32), (8, 64), (8, 80), (8, 128), (8, 256), (1, 128), (64, 32)),
    4096: ((1, 32), (1, 64), (1, 80), (1, 128), (1, 256), (8, 64)),
}
SHORT = {
    17: ((1, 64), (8, 32), (8, 80), (8, 128), (64, 64), (64, 256)),
    64: ((1, 128), (8, 32), (8, 64), (8, 256), (64, 32), (64, 80)),
    128: ((1, 64), (8, 32), (8, 64), (8, 80), (8, 128), (8, 256), (64, 64), (64, 128)),
}
BACKWARD = {
    64: ((8, 64), (64, 32)),
    128: ((8, 32), (8, 64), (8, 128), (64, 64)),
    512: ((1, 64), (8, 64), (8, 80)),
    1024: ((1, 64), (1, 128), (8, 32), (8, 64), (8, 128)),
    4096: ((1, 64), (1, 128)),
}
CAUSAL = {
    64: ((8, 64), (64, 32)),
    128: ((8, 64), (8, 128)),
    512: ((8, 32), (8, 64), (8, 128)),
    1024: ((8, 32), (8, 64), (8, 80), (8, 128), (8, 256)),
    4096: ((1, 32), (1, 64), (1, 128)),
}
CAUSAL_BACKWARD = {
    128: ((8, 64),),
    512: ((8, 64), (8, 128)),
    1024: ((8, 64), (8, 128)),
    4096: ((1, 64),),
}

# Words and punctuation marks of the first 64 sentences of the chapter "Compound statements" of the Python
# 3.11 language reference. Written down, so that every machine measures the same calls.
SENTENCES = (
    24, 24, 19, 37, 10, 40, 15, 12, 40, 18, 47, 20, 57, 21, 52, 24, 24, 18, 10, 32, 10, 26,
    24, 37, 14, 34, 19, 20, 17, 32, 15, 17, 20, 19, 21, 33, 49, 61, 46, 11, 25, 25, 35, 48,
    18, 40, 20, 16, 23, 42, 44, 37, 24, 21, 21, 42, 18, 15, 19, 20, 8, 21, 23, 18,
)  # fmt: skip


# What the short run takes of the grids: (B·H, L, D).
QUICK_FORWARD = {(8, 512, 64), (8, 1024, 64), (8, 1024, 128), (1, 1024, 128)}
QUICK_SHORT = {(8, 17, 32), (64, 64, 32), (8, 128, 64)}
QUICK_BACKWARD = {(8, 128, 64), (8, 512, 64), (8, 1024, 64), (1, 1024, 64)}
QUICK_CAUSAL = {(8, 128, 64), (8, 512, 64), (8, 1024, 64), (1, 4096, 64)}

Grid = dict[int, tuple[tuple[int, int], ...]]
Point = tuple[int, int, int]


def grid_cases(
    group: str, grid: Grid, timed: str = "forward", quick: Iterable[Point] = (), **options: Any
) -> list[BenchCase]:
    """A case for each point; that of a single head is measured against itself on one thread too."""
    cases = []
    for point in ((rows, length, dim) for length, chosen in grid.items() for rows, dim in chosen):
        bench = bench_case(group, grid_shape(*point), timed, quick=point in quick, **options)
        cases.append(against_one_thread(bench) if point[0] == 1 and bench.own is None else bench)
    return cases


CAUSAL_MASK = always(masks.causal())


def dense_cases() -> list[BenchCase]:
    """No mask: forward, backward alone, then both passes together."""
    cases = [
        *grid_cases("forward", FORWARD, quick=QUICK_FORWARD),
        bench_case("forward", (1, 8, 1024, 64), seqlen_k=77, tag="cross"),
        *grid_cases("short sequences", SHORT, quick=QUICK_SHORT),
        *grid_cases("backward", BACKWARD, "backward", QUICK_BACKWARD),
    ]
    return cases + [
        bench_case("forward+backward", (1, 8, length, 64), "step", quick=length == 512)
        for length in (128, 512, 1024)
    ]


def causal_cases() -> list[BenchCase]:
    """The longest are measured against our dense call, of which they compute half."""
    short = {length: chosen for length, chosen in CAUSAL.items() if length < 4096}
    long = {length: chosen for length, chosen in CAUSAL.items() if length >= 4096}
    return [
        *grid_cases("causal", short, quick=QUICK_CAUSAL, mask=CAUSAL_MASK),
        *grid_cases("causal", long, quick=QUICK_CAUSAL, mask=CAUSAL_MASK, own=("dense", {"mask": None})),
        *grid_cases("causal backward", CAUSAL_BACKWARD, "backward", {(8, 1024, 64)}, mask=CAUSAL_MASK),
    ]


def tensor_mask_cases() -> list[BenchCase]:
    """Bool masks with holes everywhere, so that no tile can be skipped, and additive biases."""

    def holes(*dims: str) -> MaskFactory:
        return random_mask(*dims, p=0.9)

    rows = holes("q", "k")
    cases = [
        bench_case("bool mask", (1, 8, 512, 64), tag="rows", mask=rows, quick=True),
        bench_case("bool mask", (1, 8, 1024, 64), tag="rows", mask=rows, quick=True),
        bench_case("bool mask", (1, 8, 512, 32), tag="rows", mask=rows),
        bench_case("bool mask", (1, 8, 1024, 128), tag="rows", mask=rows),
        bench_case("bool mask", (2, 8, 512, 64), tag="batch", mask=holes("b", "q", "k")),
        bench_case("bool mask", (8, 8, 128, 64), tag="batch", mask=holes("b", "q", "k")),
        bench_case("bool mask", (1, 8, 1024, 64), tag="heads", mask=holes("h", "q", "k")),
        bench_case("bool mask", (1, 1, 4096, 64), tag="rows", mask=rows),
        bench_case("bool mask backward", (1, 8, 1024, 64), "backward", mask=rows, quick=True),
    ]
    bias, fixed = tensor_bias("h", "q", "k"), tensor_bias("q", "k")
    return cases + [
        bench_case("float bias", (1, 8, 1024, 64), tag="heads", bias=bias, quick=True),
        bench_case("float bias", (1, 8, 512, 128), tag="rows", bias=fixed),
        bench_case("float bias", (8, 8, 128, 32), tag="batch", bias=tensor_bias("b", "q", "k")),
        bench_case("float bias", (1, 8, 512, 64), tag="keys", bias=tensor_bias("b", "k")),
    ]


def key_lengths(case: Case, generator: torch.Generator) -> Any:
    """Padding of lengths spread evenly from a quarter to the whole."""
    return masks.padding(torch.linspace(case.keys / 4, case.keys, case.batch).long())


def sparse_layout(case: Case, generator: torch.Generator, size: int = 64, density: float = 0.1) -> Any:
    """Blocks on the diagonal, so that no row is empty, and as many others drawn at random, for each head."""
    side = case.queries // size
    scores = torch.rand(case.heads, side, side, generator=generator)
    scores.diagonal(dim1=1, dim2=2).fill_(1.0)
    kept = scores.flatten(1).topk(round(density * side * side)).indices
    layout = torch.zeros(case.heads, side * side, dtype=torch.bool).scatter_(1, kept, True)
    return masks.blocks(layout.view(1, case.heads, side, side), size)


def sparse_cases() -> list[BenchCase]:
    """Masks of which whole tiles are hidden: padding, windows, packed documents, blocks."""
    causal = masks.causal()
    window, wide = always(causal & masks.window(127, 0)), always(causal & masks.window(255, 0))
    blocks: dict[str, Any] = {"mask": sparse_layout, "own": ("dense", {"mask": None})}
    return [
        bench_case("padding", (8, 8, 128, 64), mask=key_lengths),
        bench_case("padding", (8, 4, 512, 64), mask=key_lengths, quick=True),
        bench_case("padding", (4, 4, 1024, 128), mask=key_lengths),
        bench_case("window 128", (1, 2, 4096, 64), mask=window, quick=True),
        bench_case("window 128", (1, 2, 4096, 128), mask=window),
        bench_case("window 128", (1, 2, 4096, 64), tag="both", mask=always(masks.window(64, 63))),
        bench_case("window 128 backward", (1, 2, 4096, 64), "backward", mask=window),
        bench_case("window 256", (1, 1, 16384, 64), mask=wide),
        bench_case("window 256 backward", (1, 1, 16384, 64), "backward", mask=wide),
        bench_case("documents", (1, 8, 1024, 64), mask=lambda c, g: causal & document_mask(c, g)),
        bench_case("block-sparse 10%", (1, 2, 4096, 64), quick=True, **blocks),
        bench_case("block-sparse 10%", (1, 1, 4096, 128), **blocks),
        bench_case("block-sparse 10%", (1, 8, 2048, 64), **blocks),
        bench_case("block-sparse 10% backward", (1, 1, 4096, 64), "backward", **blocks),
    ]


def dropout_cases() -> list[BenchCase]:
    dropout: dict[str, Any] = {"dropout_p": 0.1, "own": ("no dropout", {"dropout_p": 0.0})}
    shapes = [(8, 512, 32), (8, 128, 64), (8, 512, 64), (8, 1024, 64), (8, 512, 128)]
    cases = [
        bench_case(group, grid_shape(*point), timed, quick=point[1] == 512 and point[2] < 128, **dropout)
        for group, timed in (("dropout 0.1", "forward"), ("dropout 0.1 forward+backward", "step"))
        for point in shapes
    ]
    return [*cases, bench_case("dropout 0.1", (1, 8, 512, 64), tag="causal", mask=CAUSAL_MASK, **dropout)]


def head_cases() -> list[BenchCase]:
    """Shared key-value heads, and one query over a long cache."""
    shared: dict[str, Any] = {"heads_kv": 8}
    cases = [
        bench_case("gqa", (1, 32, 512, 64), **shared, quick=True),
        bench_case("gqa", (1, 32, 512, 128), **shared, tag="causal", mask=CAUSAL_MASK),
        bench_case("gqa", (1, 32, 512, 64), "step", tag="step", **shared),
    ]
    keys = 8192
    cache: dict[str, Any] = {"op": "decode", "seqlen_k": keys, "lengths_k": (keys,), "heads_kv": 8}
    for dtype in (torch.float32, *HALF):
        label = str(dtype).removeprefix("torch.")
        for heads in (8, 32):
            quick = dtype == torch.bfloat16 or (dtype == torch.float32 and heads == 8)
            shape = (1, heads, 1, 128)
            group = f"decode {label}" + (" gqa" if heads > 8 else "")
            cases.append(bench_case(group, shape, dtype=dtype, quick=quick, **cache))
    return cases


def half_cases() -> list[BenchCase]:
    cases = []
    for dtype in HALF:
        label = str(dtype).removeprefix("torch.")
        half: dict[str, Any] = {"dtype": dtype, "own": ("float32", {"dtype": torch.float32})}
        cases += [
            bench_case(label, (1, 8, 512, 64), quick=True, **half),
            bench_case(label, (1, 8, 1024, 64), **half),
            bench_case(label, (1, 8, 512, 128), **half),
            bench_case(label, (8, 8, 128, 64), **half),
            bench_case(label, (1, 8, 512, 64), tag="causal", mask=CAUSAL_MASK, **half),
            bench_case(f"{label} backward", (1, 8, 512, 64), "backward", **half),
        ]
    return cases


def option_cases() -> list[BenchCase]:
    """Scores that are capped, have a sink beside them, or a bias of the distance: against the plain call."""
    options: dict[str, tuple[str, Any]] = {
        "softcap": ("softcap", 30.0),
        "sinks": ("sinks", True),
        "alibi": ("bias", alibi()),
        "relative bias": ("bias", relative(32)),
    }
    nothing = {"softcap": None, "sinks": False, "bias": None}
    cases = []
    for group, (field, value) in options.items():
        chosen: dict[str, Any] = {field: value, "own": ("plain", {field: nothing[field]})}
        cases += [
            bench_case(group, (1, 8, 512, 64), quick=True, **chosen),
            bench_case(group, (1, 8, 512, 128), **chosen),
            bench_case(group, (1, 8, 1024, 64), tag="causal", mask=CAUSAL_MASK, **chosen),
        ]
    return cases


def sentence_cases() -> list[BenchCase]:
    """A batch of sentences, each with its own length."""
    packed: dict[str, Any] = {"op": "varlen", "lengths_q": SENTENCES, "lengths_k": SENTENCES}
    many: dict[str, Any] = {"op": "varlen", "lengths_q": 4 * SENTENCES, "lengths_k": 4 * SENTENCES}
    longest = max(SENTENCES)
    return [
        bench_case("sentences", (len(SENTENCES), 8, longest, 64), quick=True, **packed),
        bench_case("sentences", (4 * len(SENTENCES), 4, longest, 32), tag="many", **many),
        bench_case(
            "sentences forward+backward", (len(SENTENCES), 8, longest, 64), "step", **packed, quick=True
        ),
    ]


def small_cases() -> list[BenchCase]:
    """Calls that are mostly overhead."""
    cases = [bench_case("small", (1, 8, 64, 64))]
    for suffix, timed in (("", "forward"), (" with gradient", "recorded"), (" forward+backward", "step")):
        cases += [
            bench_case(f"tiny call{suffix}", shape, timed, quick=True)
            for shape in ((1, 1, 1, 16), (1, 8, 16, 64))
        ]
    return cases


def module_cases() -> list[BenchCase]:
    """Calls as `nn.MultiheadAttention` makes them: q, k and v are [B, L, H, D] in memory."""
    shapes: list[Shape] = [(16, 4, 64, 64), (8, 8, 128, 64), (2, 8, 512, 64), (1, 8, 1024, 64)]
    return [
        bench_case(f"multi-head shaped{suffix}", shape, timed, layout="blhd", quick=shape[2] == 128)
        for suffix, timed in (("", "forward"), (" forward+backward", "step"))
        for shape in shapes
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
        option_cases,
        sentence_cases,
        small_cases,
        module_cases,
    )
    return [case for build in builders for case in build()]


BENCH_CASES: tuple[BenchCase, ...] = tuple(all_bench_cases())

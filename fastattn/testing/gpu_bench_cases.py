"""The cases that `bench --gpu` times: bfloat16, 16k tokens in a call, heads times head_dim 2048."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import torch

from fastattn import masks
from fastattn.testing.bench_case import BenchCase, bench_case
from fastattn.testing.case import Case
from fastattn.testing.cases import MaskFactory, alibi, always, tensor_bias

TOKENS = 16_384
WIDTH = 2048  # heads times head_dim
PASSES = ("forward", "backward")
HEAD_DIMS = (128, 64, 256)
LENGTHS = (512, 1024, 2048, 4096, 8192, TOKENS, 2 * TOKENS)
FEW_LENGTHS = (512, 4096, TOKENS)  # of the head dims that have no goal of their own
# A compiled path takes some ten seconds for each shape; by whether the head dim has goals.
COMPILED_LENGTHS = {True: (4096, TOKENS), False: (TOKENS,)}
DTYPE = torch.bfloat16

DENSE, CAUSAL = "full", "causal"
HOST = "host time"
CAUSAL_MASK = always(masks.causal())
# Fractions of a packed sequence that its documents take, as uneven as texts are.
SHARES = (1, 2, 3, 5, 8, 13, 21, 11, 4, 9, 6, 14, 2, 7, 17, 5)


def all_gpu_bench_cases() -> list[BenchCase]:
    """Those with goals come first: a run that ends early has measured what matters most."""
    builders = (headline_cases, host_cases, option_cases, grid_cases)
    return list({case.name: case for build in builders for case in build()}.values())


def dense(mask: str, timed: str, length: int, dim: int, quick: bool = False) -> BenchCase:
    """A point of the grid: full or causal, one pass, 16k tokens or one longer sequence."""
    shape = (max(1, TOKENS // length), WIDTH // dim, length, dim)
    options: dict[str, Any] = {"mask": CAUSAL_MASK} if mask == CAUSAL else {}
    return bench_case(f"{mask} {timed}", shape, timed, quick=quick, dtype=DTYPE, **options)


def headline_cases() -> Iterator[BenchCase]:
    for dim in HEAD_DIMS:
        for timed in PASSES:
            for mask in (DENSE, CAUSAL):
                yield dense(mask, timed, TOKENS, dim, quick=dim == 128)


def grid_cases() -> Iterator[BenchCase]:
    for dim in HEAD_DIMS:
        for length in LENGTHS if dim == 128 else FEW_LENGTHS:
            for timed in PASSES:
                for mask in (DENSE, CAUSAL):
                    yield dense(mask, timed, length, dim)


def is_compiled(bench: BenchCase) -> bool:
    """Whether a path that must be compiled for each shape takes part: at one or two lengths of the grid."""
    on_grid = bench.group in {f"{mask} {timed}" for mask in (DENSE, CAUSAL) for timed in PASSES}
    lengths = COMPILED_LENGTHS[bench.case.head_dim == 128]
    return not on_grid or bench.case.seqlen_q in lengths


def document_lengths(total: int) -> tuple[int, ...]:
    """`total` in parts of SHARES, without empty ones.

    >>> sum(document_lengths(1000))
    1000
    """
    ends = [total * end // sum(SHARES) for end in accumulate(SHARES)]
    return tuple(end - start for start, end in pairwise([0, *ends]) if end > start)


def causal_documents(case: Case, generator: torch.Generator) -> Any:
    ids = torch.repeat_interleave(torch.tensor(document_lengths(case.keys)))
    return masks.causal() & masks.documents(ids.to(generator.device))


def option_cases() -> Iterator[BenchCase]:
    long, short = (1, 16, TOKENS, 128), (4, 16, 4096, 128)
    window: MaskFactory = always(masks.causal() & masks.window(1023, 0))
    lengths = document_lengths(TOKENS)
    packed: dict[str, Any] = {"op": "varlen", "lengths_q": lengths, "lengths_k": lengths}
    for timed in PASSES:
        common: dict[str, Any] = {"timed": timed, "dtype": DTYPE}
        for length in (4096, TOKENS):
            for mask in (None, CAUSAL_MASK):
                tag = DENSE if mask is None else CAUSAL
                grouped: dict[str, Any] = {
                    "heads_kv": 8,
                    "mask": mask,
                    "quick": length == 4096 and mask is not None,
                }
                yield bench_case(f"gqa {timed}", (1, 64, length, 128), tag=tag, **grouped, **common)
        yield bench_case(f"window 1024 {timed}", long, mask=window, quick=True, **common)
        yield bench_case(f"window 1024 {timed}", short, mask=window, **common)
        yield bench_case(f"documents {timed}", long, mask=causal_documents, quick=True, **common)
        yield bench_case(
            f"varlen {timed}", (len(lengths), 16, max(lengths), 128), quick=True, **packed, **common
        )
        yield bench_case(
            f"bias {timed}", (4, 16, 2048, 64), bias=tensor_bias("h", "q", "k"), quick=True, **common
        )
        yield bench_case(f"alibi {timed}", short, bias=alibi(), mask=CAUSAL_MASK, **common)
        yield bench_case(f"softcap {timed}", short, softcap=30.0, mask=CAUSAL_MASK, **common)
        yield bench_case(f"dropout 0.1 {timed}", short, dropout_p=0.1, mask=CAUSAL_MASK, quick=True, **common)


def host_cases() -> Iterator[BenchCase]:
    """Calls so small that the device waits for the host: what is timed is the host."""
    for timed in ("forward", "recorded", "step"):
        for tag, mask in ((DENSE, None), (CAUSAL, CAUSAL_MASK)):
            yield bench_case(
                HOST, (1, 4, 128, 64), timed, tag=f"{timed}-{tag}", mask=mask, quick=True, dtype=DTYPE
            )


GPU_BENCH_CASES: tuple[BenchCase, ...] = tuple(all_gpu_bench_cases())

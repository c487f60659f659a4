"""BenchCase: one problem that benchmarks time, and what else of ours it is measured against."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fastattn.testing.case import Case

# What is timed: the forward pass without gradient, the forward pass with autograd recording it, the backward
# pass alone, or both passes with autograd.
TIMED = ("forward", "recorded", "backward", "step")

Shape = tuple[int, int, int, int]  # batch, heads, seqlen_q, head_dim
BATCH_AND_HEADS = {1: (1, 1), 2: (1, 2), 8: (1, 8), 64: (8, 8)}


@dataclass(frozen=True)
class Own:
    """Another call of ours, timed in the same rounds: what an option, a dtype or a thread costs or saves.

    Args:
        label: what the other call is: "plain", "float32", "1 thread", ...
        case: its problem, with the same numbers.
        threads: its number of threads; None means the run's. Runs with that very number compare nothing.
    """

    label: str
    case: Case
    threads: int | None = None


@dataclass(frozen=True)
class BenchCase:
    """One timed problem.

    Args:
        group: what the summary averages over.
        case: the problem; its name is unique among the benchmarks.
        timed: one of TIMED.
        quick: whether it belongs to the short run.
        own: our other call that it is measured against besides PyTorch's, or None.
    """

    group: str
    case: Case
    timed: str = "forward"
    quick: bool = False
    own: Own | None = None

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def shape(self) -> str:
        """`(1, 8, 1024, 64) float32`, with key length, key-value heads and value width where they differ."""
        case = self.case
        dtype = str(case.dtype).removeprefix("torch.")
        if case.op == "varlen":
            lengths = f"{len(case.lengths_q)} sequences of {min(case.lengths_q)}-{max(case.lengths_q)}"
            return f"({sum(case.lengths_q)}, {case.heads}, {case.head_dim}) {lengths} {dtype}"
        text = f"({case.batch}, {case.heads}, {case.queries}, {case.head_dim})"
        if case.keys != case.queries:
            text += f" {case.keys} keys"
        if case.num_heads_kv != case.heads:
            text += f" {case.num_heads_kv} kv heads"
        if case.dim_v != case.head_dim:
            text += f" dv {case.dim_v}"
        return f"{text} {dtype}"


def grid_shape(rows: int, length: int, dim: int) -> Shape:
    """The shape of a point of the grid; `rows` is batch times heads."""
    return (*BATCH_AND_HEADS[rows], length, dim)


def bench_case(
    group: str, shape: Shape, timed: str = "forward", *, quick: bool = False, tag: str = "",
    own: tuple[str, dict[str, Any]] | None = None, **options: Any,
) -> BenchCase:  # fmt: skip
    """A case named after its group and shape.

    Args:
        tag: tells it from others of the same group and shape.
        own: the label of our other call, and the case's fields that it changes.
        options: further fields of the case.
    """
    batch, heads, seqlen_q, head_dim = shape
    size = f"{batch * heads}x{seqlen_q}x{head_dim}"
    name = "-".join([group.replace(" ", "-"), *([tag] if tag else []), size])
    case = Case(name, batch, heads, seqlen_q=seqlen_q, head_dim=head_dim, **options)
    other = None if own is None else Own(own[0], replace(case, **own[1]))
    return BenchCase(group, case, timed, quick, other)


def against_one_thread(bench: BenchCase) -> BenchCase:
    """The same case, measured against itself on one thread where the run has more."""
    return replace(bench, own=Own("1 thread", bench.case, threads=1))

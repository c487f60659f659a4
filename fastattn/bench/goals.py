"""What is promised about the cases: against PyTorch, against our own other calls, and of the FMA peak."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fastattn.bench.runner import Result
from fastattn.testing.bench_case import BenchCase

# What a goal is about: PyTorch's time over ours, our other call's time over ours, our share of the FMA peak.
MEASURES = ("torch", "own", "peak")


@dataclass(frozen=True)
class Goal:
    """A promise about the geometric mean over some cases, for each number of threads.

    Args:
        text: what is promised.
        groups: the groups whose cases count.
        want: the number promised: a ratio of times, or a share of the peak.
        measure: one of MEASURES.
        at_most: whether the number is our time over the other's, which may be `want` at most.
        label: for "own", which other call, see `Own`.
        where: which of the groups' cases count.
        isa: the instruction set that the promise is about, or None for every one.
    """

    text: str
    groups: tuple[str, ...]
    want: float
    measure: str = "torch"
    at_most: bool = False
    label: str | None = None
    where: Callable[[BenchCase], bool] = lambda bench: True
    isa: str | None = None

    @property
    def least_ratio(self) -> float:
        """The least ratio of the other's time to ours that keeps the promise; not for "peak"."""
        return 1 / self.want if self.at_most else self.want

    def covers(self, bench: BenchCase) -> bool:
        """Whether the promise is about the case."""
        return bench.group in self.groups and self.where(bench)

    def number(self, result: Result) -> float | None:
        """What the promise is about, or None where the result has no such number."""
        if self.measure == "peak":
            return result.of_fma_peak
        ratio = result.ratio
        if self.measure == "own":
            if result.own is None or result.own.label != self.label:
                return None
            ratio = result.own.ratio
        return 1 / ratio.value if self.at_most else ratio.value

    def is_met(self, got: float) -> bool:
        return got <= self.want if self.at_most else got >= self.want


own, peak = partial(Goal, measure="own"), partial(Goal, measure="peak")


def long(*dims: int) -> Callable[[BenchCase], bool]:
    """Self-attention of 1024 queries and more with one of these head dims, or with any."""
    return lambda bench: (
        bench.case.queries >= 1024
        and bench.case.keys == bench.case.queries
        and (not dims or bench.case.head_dim in dims)
    )


def head_dim(low: int, high: int = 1 << 30) -> Callable[[BenchCase], bool]:
    """Head dims from `low` to `high`."""
    return lambda bench: low <= bench.case.head_dim <= high


def seqlen(low: int) -> Callable[[BenchCase], bool]:
    """`low` queries and more: shorter calls of one head are a few dozen microseconds, not worth splitting."""
    return lambda bench: bench.case.queries >= low


AGAINST_TORCH = (
    Goal("dense forward, float32", ("forward", "short sequences"), 1.3),
    Goal("short sequences, L <= 128", ("short sequences",), 2.0),
    Goal("causal forward", ("causal",), 1.6),
    Goal("backward", ("backward",), 1.3),
    Goal("causal backward", ("causal backward",), 1.7),
    Goal("bool mask", ("bool mask",), 1.6),
    Goal("float bias", ("float bias",), 1.6),
    Goal("padding", ("padding",), 1.6),
    Goal("causal window 256 at L=16384, forward", ("window 256",), 30.0),
    Goal("causal window 256 at L=16384, backward", ("window 256 backward",), 30.0),
    Goal("window 128 at L=4096, forward", ("window 128",), 8.0),
    Goal("dropout 0.1 forward", ("dropout 0.1",), 7.0),
    Goal("dropout 0.1 forward+backward", ("dropout 0.1 forward+backward",), 3.5),
    Goal("bfloat16 forward", ("bfloat16",), 1.3),
    Goal("float16 forward", ("float16",), 1.3),
    Goal("varlen, sentences, forward", ("sentences",), 2.0),
    Goal("varlen, sentences, forward+backward", ("sentences forward+backward",), 2.0),
    Goal("tiny call without gradient", ("tiny call",), 1.0, at_most=True),
    Goal("tiny call with gradient, forward", ("tiny call with gradient",), 2.0, at_most=True),
    Goal("tiny call with gradient, forward+backward", ("tiny call forward+backward",), 1.2, at_most=True),
    Goal("nn.MultiheadAttention-shaped forward", ("multi-head shaped",), 1.3),
    Goal("nn.MultiheadAttention-shaped fwd+backward", ("multi-head shaped forward+backward",), 1.3),
    Goal("bfloat16 decode, 8 heads, 8192 keys", ("decode bfloat16",), 4.0),
)

DROPOUT = ("dropout 0.1", "dropout 0.1 forward+backward")

AGAINST_OURS = (
    own("causal against dense at L=4096", ("causal",), 1.75, label="dense"),
    own("one head, threads against one, forward", ("forward",), 1.7, label="1 thread", where=seqlen(512)),
    own("one head, threads against one, backward", ("backward",), 1.7, label="1 thread", where=seqlen(512)),
    own("block-sparse 10% against dense, forward", ("block-sparse 10%",), 7.0, label="dense"),
    own("block-sparse 10% against dense, backward", ("block-sparse 10% backward",), 7.0, label="dense"),
    *(
        own(f"{group} / without, D {dims}", (group,), want, label="no dropout", at_most=True, where=where)
        for group in DROPOUT
        for dims, want, where in ((">= 64", 1.35, head_dim(64)), ("32", 1.6, head_dim(32, 32)))
    ),
    own("bfloat16 / float32", ("bfloat16",), 1.1, label="float32", at_most=True),
    own("float16 / float32", ("float16",), 1.1, label="float32", at_most=True),
    *(
        own(f"{group} / plain call", (group,), 1.25, label="plain", at_most=True)
        for group in ("softcap", "sinks", "alibi", "relative bias")
    ),
)

OF_FMA_PEAK = (
    peak("dense forward, D=128, L >= 1024", ("forward",), 0.85, where=long(128)),
    peak("dense forward, D=64, L >= 1024", ("forward",), 0.80, where=long(64)),
    peak("backward, L >= 1024", ("backward",), 0.75, where=long()),
    peak("causal backward, L >= 1024", ("causal backward",), 0.75, where=long()),
    peak("AVX2 forward, D 64-128, L >= 1024", ("forward",), 0.75, where=long(64, 80, 128), isa="avx2"),
    peak("AVX2 backward, D 64-128, L >= 1024", ("backward",), 0.75, where=long(64, 80, 128), isa="avx2"),
)

GOALS = AGAINST_TORCH + AGAINST_OURS + OF_FMA_PEAK

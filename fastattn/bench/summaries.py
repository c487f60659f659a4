"""inspect.summarize against the forward pass of attention on the same inputs, and its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import fastattn
from fastattn.bench.contenders import Contender
from fastattn.bench.measure import Ratio, Timing, calls_for, interleave, ratio, rounds_for
from fastattn.bench.report import geometric_mean
from fastattn.bench.runner import thread_count
from fastattn.inspect import summarize
from fastattn.masks import causal

HEADER = f"{'summary':<52}{'thr':>3}{'ms':>10}{'forward ms':>12}  times the forward pass [95%]"
MIN_SAMPLE = 0.004  # seconds, by repeating short calls

SHAPES = ((1, 8, 256, 64), (1, 8, 1024, 32), (1, 8, 1024, 64), (1, 8, 1024, 128), (1, 2, 4096, 64))

# What is asked for, and whether attention's lse is at hand.
WANTED: dict[str, dict[str, Any]] = {
    "lse given": {},
    "lse given, top 8": {"top_k": 8},
    "lse given, 64x64 grid": {"pool": 64},
    "no lse": {},
    "backward of entropy": {},
    "backward of received": {},
}

# At most this many times the forward pass, where the project has such a goal.
GOALS = {"lse given": 0.8, "lse given, top 8": 1.4, "no lse": 1.4}


@dataclass(frozen=True)
class SummaryResult:
    """Times of one call of summarize, or of its backward pass, and of the forward pass beside it."""

    shape: tuple[int, ...]
    is_causal: bool
    what: str
    threads: int
    timing: Timing
    forward: Timing
    ratio: Ratio

    def line(self) -> str:
        shape = f"{self.shape}{' causal' if self.is_causal else ''}"
        ours, forward = (1e3 * timing.median for timing in (self.timing, self.forward))
        return f"{shape + ' ' + self.what:<52}{self.threads:>3}{ours:>10.4g}{forward:>12.4g}  {self.ratio}"

    def row(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "causal": self.is_causal,
            "what": self.what,
            "threads": self.threads,
            "ms": 1e3 * self.timing.median,
            "forward_ms": 1e3 * self.forward.median,
            "ratio": self.ratio.value,
            "ratio_interval": [self.ratio.low, self.ratio.high],
        }


def run(
    threads: tuple[int, ...], seconds: float, on_result: Callable[[SummaryResult], None]
) -> list[SummaryResult]:
    """Time every shape with each number of threads, about `seconds` for each call."""
    results = []
    for shape in SHAPES:
        for is_causal in (False, True):
            for count in threads:
                with thread_count(count):
                    found = _run_case(shape, is_causal, count, seconds)
                for result in found:
                    on_result(result)
                results += found
    return results


def summary(results: list[SummaryResult]) -> Iterator[str]:
    """Geometric means of the ratios, with the goals that there are."""
    for what in WANTED:
        ratios = [result.ratio.value for result in results if result.what == what]
        goal = f", goal at most {GOALS[what]}" if what in GOALS else ""
        yield f"  {what:<24}{geometric_mean(ratios):>6.2f}   ({min(ratios):.2f}-{max(ratios):.2f}{goal})"


def _run_case(shape: tuple[int, ...], is_causal: bool, threads: int, seconds: float) -> list[SummaryResult]:
    pair = _calls(shape, is_causal)
    once = [timing.median for timing in interleave(pair, [1] * len(pair), 2)]
    counts = [calls_for(each, MIN_SAMPLE) for each in once]
    rounds = rounds_for(once, counts, seconds * len(pair), fewest=5, most=60)
    forward, *timings = interleave(pair, counts, rounds)
    return [
        SummaryResult(shape, is_causal, each.name, threads, timing, forward, ratio(timing, forward))
        for each, timing in zip(pair[1:], timings, strict=True)
    ]


def _calls(shape: tuple[int, ...], is_causal: bool) -> list[Contender]:
    """The forward pass, then what WANTED names."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    mask = causal() if is_causal else None
    lse = fastattn.attention(q, k, v, mask=mask, return_lse=True)[1]
    leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
    tracked = summarize(*leaves, mask=mask)

    def call(what: str) -> Callable[[], Any]:
        if what.startswith("backward of "):
            result = getattr(tracked, what.removeprefix("backward of "))
            upstream = torch.randn(result.shape, generator=generator)
            return lambda: torch.autograd.grad(result, leaves, upstream, retain_graph=True)
        given = lse if what.startswith("lse given") else None
        return lambda: summarize(q, k, mask=mask, lse=given, **WANTED[what])

    forward = Contender("forward", lambda: fastattn.attention(q, k, v, mask=mask))
    return [forward, *(Contender(what, call(what)) for what in WANTED)]

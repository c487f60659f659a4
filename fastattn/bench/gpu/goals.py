"""What is promised on an H200, in bfloat16: rates, and ratios to PyTorch's paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastattn.bench.contenders import OURS
from fastattn.bench.gpu.contenders import FLEX
from fastattn.bench.gpu.runner import Result
from fastattn.bench.report import geometric_mean
from fastattn.testing.gpu_bench_cases import CAUSAL, DENSE, HOST, TOKENS


@dataclass(frozen=True)
class Goal:
    """A promise about the geometric mean over some cases.

    Args:
        text: what is promised.
        want: the number promised.
        unit: of the number: "TFLOP/s", "x" (the other's time over ours) or "us".
        number: what the promise is about, or None for a result that does not count.
        at_most: whether `want` is a bound from above.
    """

    text: str
    want: float
    unit: str
    number: Callable[[Result], float | None]
    at_most: bool = False

    def judge(self, results: Sequence[Result]) -> dict[str, Any] | None:
        """The goal as plain values, or None where no result counts."""
        numbers = [number for result in results if (number := self.number(result)) is not None]
        if not numbers:
            return None
        got = geometric_mean(numbers)
        return {
            "goal": self.text,
            "want": self.want,
            "unit": self.unit,
            "at_most": self.at_most,
            "got": got,
            "lowest": min(numbers),
            "highest": max(numbers),
            "cases": len(numbers),
            "met": got <= self.want if self.at_most else got >= self.want,
        }


def rate(mask: str, timed: str) -> Callable[[Result], float | None]:
    """Our TFLOP/s at head dim 128 and a length of 16k."""

    def number(result: Result) -> float | None:
        case = result.bench.case
        wanted = result.bench.group == f"{mask} {timed}" and (case.head_dim, case.seqlen_q) == (128, TOKENS)
        return result.tflops(OURS) if wanted else None

    return number


def against(name: str) -> Callable[[Result], float | None]:
    """Another path's time over ours, where it took the case; not of the host's time."""

    def number(result: Result) -> float | None:
        ratio = result.ratio_to(name) if result.bench.group != HOST else None
        return None if ratio is None else ratio.value

    return number


def host_time(timed: str) -> Callable[[Result], float | None]:
    """Our host time of a call, in microseconds."""

    def number(result: Result) -> float | None:
        ours = result.timings.get(OURS)
        wanted = result.bench.group == HOST and result.bench.timed == timed and ours is not None
        return ours.median * 1e6 if wanted and ours is not None else None

    return number


GOALS = (
    Goal("forward, D=128, L=16384", 480, "TFLOP/s", rate(DENSE, "forward")),
    Goal("causal forward, D=128, L=16384", 440, "TFLOP/s", rate(CAUSAL, "forward")),
    Goal("backward, D=128, L=16384", 330, "TFLOP/s", rate(DENSE, "backward")),
    Goal("causal backward, D=128, L=16384", 330, "TFLOP/s", rate(CAUSAL, "backward")),
    Goal("backward, D=128, L=16384, as a stretch", 400, "TFLOP/s", rate(DENSE, "backward")),
    Goal("causal backward, D=128, L=16384, as a stretch", 400, "TFLOP/s", rate(CAUSAL, "backward")),
    Goal("FlexAttention's time / ours", 1.2, "x", against(FLEX)),
    Goal("time of PyTorch's flash kernel / ours", 1.0, "x", against("sdpa-flash")),
    Goal("host time of a call without gradient", 30, "us", host_time("forward"), at_most=True),
)

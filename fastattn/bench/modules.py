"""nn.MultiheadAttention against PyTorch's module of the same name, whole calls with their projections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.bench.contenders import OURS, Contender
from fastattn.bench.machine import thread_count
from fastattn.bench.measure import Ratio, Timing, calls_for, interleave, ratio, rounds_for
from fastattn.bench.report import geometric_mean
from fastattn.nn import MultiheadAttention

HEADER = f"{'module call':<40}{'thr':>3}{'fastattn ms':>13}{'PyTorch ms':>12}  ratio [95%]"
MIN_SAMPLE = 0.004  # seconds, by repeating short calls


@dataclass(frozen=True)
class ModuleCase:
    """One self-attention call of a batch_first module of 64-wide heads.

    Args:
        batch, seqlen, embed_dim: of the input.
        timed: "train" (forward and backward, every parameter and the input) or "infer" (eval, no gradient).
        need_weights: whether the averaged weights are returned.
        causal: whether attn_mask is the causal mask, with the is_causal hint.
    """

    batch: int
    seqlen: int
    embed_dim: int
    timed: str
    need_weights: bool = False
    causal: bool = False

    @property
    def group(self) -> str:
        return f"{self.timed}{', weights' if self.need_weights else ''}{', causal' if self.causal else ''}"

    @property
    def name(self) -> str:
        return f"({self.batch}, {self.seqlen}, {self.embed_dim}) {self.group}"


SHAPES = (
    (16, 64, 256),
    (8, 64, 512),
    (8, 128, 512),
    (2, 512, 512),
    (1, 1024, 512),
    (1, 2048, 256),
    (1, 4096, 128),
)

CASES = tuple(
    ModuleCase(*shape, timed, need_weights)
    for need_weights in (False, True)
    for timed in ("train", "infer")
    for shape in SHAPES
    if shape[1] >= 512 or not need_weights
) + tuple(ModuleCase(*shape, timed, causal=True) for timed in ("train", "infer") for shape in SHAPES[2:5])


@dataclass(frozen=True)
class ModuleResult:
    """Times of one case with one number of threads."""

    case: ModuleCase
    threads: int
    ours: Timing
    torch: Timing
    ratio: Ratio

    def line(self) -> str:
        ours, theirs = (1e3 * timing.median for timing in (self.ours, self.torch))
        return f"{self.case.name:<40}{self.threads:>3}{ours:>13.4g}{theirs:>12.4g}  {self.ratio}"

    def row(self) -> dict[str, Any]:
        return {
            "case": self.case.name,
            "group": self.case.group,
            "threads": self.threads,
            "ms": 1e3 * self.ours.median,
            "torch_ms": 1e3 * self.torch.median,
            "ratio": self.ratio.value,
            "ratio_interval": [self.ratio.low, self.ratio.high],
        }


def run(
    threads: tuple[int, ...], seconds: float, on_result: Callable[[ModuleResult], None]
) -> list[ModuleResult]:
    """Time every case with each number of threads, each for about that long.

    Raises:
        RuntimeError: the two modules disagree about a result.
    """
    results = []
    for case in CASES:
        for count in threads:
            with thread_count(count):
                results.append(_run_case(case, count, seconds))
            on_result(results[-1])
    return results


def summary(results: list[ModuleResult]) -> Iterator[str]:
    """Geometric means by group, over all without weights, and what is clearly slower."""
    groups = dict.fromkeys(result.case.group for result in results)
    for group in groups:
        ratios = [result.ratio.value for result in results if result.case.group == group]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f} of {len(ratios)}"
        yield f"  {group:<24}{geometric_mean(ratios):>6.2f}x   ({spread})"
    slower = [result for result in results if result.ratio.high < 0.99]
    yield f"clearly slower than PyTorch's module: {len(slower)} of {len(results)}"
    yield from (f"  {result.case.name}, {result.threads} threads: {result.ratio}" for result in slower)


def _run_case(case: ModuleCase, threads: int, seconds: float) -> ModuleResult:
    calls = [_call(kind, case) for kind in (MultiheadAttention, nn.MultiheadAttention)]
    pair = [Contender(name, call) for name, call in zip((OURS, "torch"), calls, strict=True)]
    results = [call() for call in calls]
    for ours, theirs in zip(*results, strict=True):
        difference = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)
        if not difference <= 1e-3:
            raise RuntimeError(f"{case.name}: the modules' results differ by {difference:.3g}")
    once = [timing.median for timing in interleave(pair, [1, 1], 2)]
    counts = [calls_for(each, MIN_SAMPLE) for each in once]
    ours, theirs = interleave(pair, counts, rounds_for(once, counts, seconds, fewest=5, most=60))
    return ModuleResult(case, threads, ours, theirs, ratio(theirs, ours))


def _call(kind: type[nn.MultiheadAttention], case: ModuleCase) -> Callable[[], list[Tensor]]:
    """The timed work, which returns the output, the weights and all gradients that there are."""
    torch.manual_seed(0)
    module = kind(case.embed_dim, case.embed_dim // 64, batch_first=True).train(case.timed == "train")
    x = torch.randn(case.batch, case.seqlen, case.embed_dim)
    options: dict[str, Any] = {"need_weights": case.need_weights}
    if case.causal:
        options["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(case.seqlen)
        options["is_causal"] = True

    def infer() -> list[Tensor]:
        with torch.no_grad():
            return [t for t in module(x, x, x, **options) if t is not None]

    def train() -> list[Tensor]:
        out, weights = module(leaf, leaf, leaf, **options)
        grads = torch.autograd.grad(out, [leaf, *module.parameters()], upstream)
        return [out.detach(), *([] if weights is None else [weights.detach()]), *grads]

    leaf = x.clone().requires_grad_()
    upstream = torch.randn(x.shape)
    return train if case.timed == "train" else infer

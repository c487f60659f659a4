"""Step times of PyTorch's attention and ours, measured in turns."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from fastattn.demo.model import ModelConfig, new_model
from fastattn.demo.text import Tokens, batches
from fastattn.demo.train import Trainer
from fastattn.integrations.torch import override_sdpa

SIDES = ("PyTorch", "fastattn")


def side(name: str) -> contextlib.AbstractContextManager[object]:
    """The context in which attention is that side's."""
    return override_sdpa() if name == "fastattn" else contextlib.nullcontext()


@dataclass(frozen=True)
class Case:
    """One row of the table: sequences of `seqlen` tokens, `batch` of them a step."""

    seqlen: int
    dropout: float
    batch: int

    @property
    def name(self) -> str:
        return f"L = {self.seqlen}, " + (f"dropout {self.dropout:g}" if self.dropout else "no dropout")


CASES = tuple(
    Case(seqlen, dropout, 2048 // seqlen) for seqlen, dropout in itertools.product((256, 1024), (0.0, 0.1))
)


@dataclass(frozen=True)
class Timing:
    """Times of the two sides in seconds; round n of one stands beside round n of the other."""

    times: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def quartiles(self, name: str) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.times[name], n=4, method="inclusive")
        return low, high

    @property
    def ratio(self) -> float:
        """PyTorch's median over ours: above 1, ours is faster."""
        return self.median("PyTorch") / self.median("fastattn")


def in_turns(work: Callable[[], object], seconds: float, fewest: int = 5, most: int = 200) -> Timing:
    """Time `work` on both sides in turns (A B, B A, ...) for about that long, after one round unmeasured."""
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    start = time.perf_counter()
    for number in range(-1, most):
        for name in SIDES if number % 2 else reversed(SIDES):
            with side(name):
                before = time.perf_counter()
                work()
                after = time.perf_counter()
            if number >= 0:
                times[name].append(after - before)
        if number + 1 >= fewest and time.perf_counter() - start > seconds:
            break
    return Timing(times)


def step_times(config: ModelConfig, tokens: Tokens, case: Case, seed: int, seconds: float) -> Timing:
    """Whole training steps: forward, backward, clipping and update."""
    trainer = Trainer(new_model(replace(config, dropout=case.dropout), seed))
    data = batches(tokens.train, case.batch, case.seqlen, seed)
    return in_turns(lambda: trainer.step(next(data)), seconds)


def attention_times(config: ModelConfig, case: Case, seed: int, seconds: float) -> Timing:
    """Forward and backward of the attention call alone, on normal numbers in the model's layout."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, case.batch, case.seqlen, config.num_heads, config.head_dim)
    q, k, v = (t.transpose(1, 2).requires_grad_() for t in torch.randn(shape, generator=generator))
    dout = torch.randn(q.shape, generator=generator)

    def forward_and_backward() -> None:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=case.dropout, is_causal=True)
        torch.autograd.grad(out, (q, k, v), dout)

    return in_turns(forward_and_backward, seconds)

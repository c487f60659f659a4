"""Local attention skips what its windows do not reach: it beats attention over all 8192 keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.bench.contenders import Contender
from fastattn.bench.measure import interleave
from fastattn.nn import LocalAttention

TOKENS, FEATURES, WINDOW, ROUNDS = 8192, 64, 32, 3


def forward(function: Callable[..., Tensor], *tensors: Tensor) -> None:
    with torch.no_grad():
        function(*tensors)


def step(function: Callable[..., Tensor], *tensors: Tensor) -> None:
    function(*tensors).sum().backward()


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fastattn.attention(q[:, None], k[:, None], v[:, None])


# Finding the largest score looks at every key, which alone costs half of attention's forward pass.
@pytest.mark.parametrize(
    ("centre", "goal"), [("monotonic", 10.0), ("predictive", 4.0), ("argmax", 1.0)], ids=str
)
@pytest.mark.parametrize("run", [forward, step], ids=["forward", "forward+backward"])
def test_goal(centre: str, goal: float, run: Callable[..., None]):
    torch.manual_seed(0)
    layer = LocalAttention(WINDOW, centre, FEATURES)
    if centre == "predictive":  # centres all over the sequence, in no order
        torch.nn.init.normal_(layer.v_p.weight)
    tensors = [torch.randn(1, TOKENS, FEATURES).requires_grad_() for _ in range(3)]
    sides = [Contender(name, partial(run, f, *tensors)) for name, f in (("local", layer), ("full", full))]
    best = [min(timing.seconds) for timing in interleave(sides, [1, 1], ROUNDS)]
    ratio = best[1] / best[0]
    print(f"{centre}: {best[0] * 1e3:.1f} ms, all keys {best[1] * 1e3:.1f} ms: {ratio:.1f} times as fast")
    assert ratio >= goal

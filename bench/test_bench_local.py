"""Local attention skips what its windows do not reach: it beats attention over all 8192 keys."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import fastattn
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
    sides = (partial(run, layer), partial(run, full))
    best = [float("inf")] * 2
    for _ in range(ROUNDS):  # interleaved: what changes slowly meets both alike
        for n, side in enumerate(sides):
            started = time.perf_counter()
            side(*tensors)
            best[n] = min(best[n], time.perf_counter() - started)
    ratio = best[1] / best[0]
    print(f"{centre}: {best[0] * 1e3:.1f} ms, all keys {best[1] * 1e3:.1f} ms: {ratio:.1f} times as fast")
    assert ratio >= goal

"""Attention in PyTorch's ordinary operations, as models write what its fused call has no argument for."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastattn.bench.work import additive
from fastattn.testing.inputs import Inputs


def eager(inputs: Inputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Scores, softcap, bias and mask, a sink's column, softmax, product: softmax(s)[:, :Lk] v."""
    case = inputs.case
    scale = 1 / math.sqrt(case.head_dim) if case.scale is None else case.scale
    softcap, hidden = case.softcap, additive(inputs)
    sinks = inputs.leaves.get("sinks")
    column = None if sinks is None else sinks.view(1, -1, 1, 1).expand(case.batch, -1, case.queries, 1)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q * scale) @ k.mT
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if hidden is not None:
            scores = scores + hidden
        if column is None:
            return scores.softmax(-1) @ v
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v

    return call

"""What a case computes and moves, counted over visible pairs only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.biases import Bias
from fastattn.masks import Mask, MaskShape
from fastattn.testing.case import Case
from fastattn.testing.inputs import Inputs

# The backward pass has five products of size Lq x Lk where the forward pass has two.
FLOPS_FACTOR = {"forward": 1.0, "recorded": 1.0, "backward": 2.5, "step": 3.5}
PASSES = {"forward": 1, "recorded": 1, "backward": 2, "step": 3}

# Calls that do fewer operations for a byte than this wait for memory: a core that adds and multiplies 32
# floats a cycle and reads some four bytes in it breaks even near 16.
MEMORY_BOUND_INTENSITY = 8.0
CACHE_BYTES = 4 * 2**20  # less than this stays in a core's caches


@dataclass(frozen=True)
class Work:
    """Sizes of one call.

    Args:
        pairs: visible (query, key) pairs over batch and query heads.
        flops: floating-point operations: 2 (D + Dv) a pair forward, times FLOPS_FACTOR.
        bytes: q, k, v and out, each moved once (backward: and their gradients).
    """

    pairs: int
    flops: float
    bytes: int

    @property
    def is_memory_bound(self) -> bool:
        return self.bytes > CACHE_BYTES and self.flops < MEMORY_BOUND_INTENSITY * self.bytes


def dense_mask(inputs: Inputs) -> Tensor | None:
    """The case's mask as a bool tensor broadcastable to [B, Hq, Lq, Lk], or None."""
    case, mask = inputs.case, inputs.mask
    if isinstance(mask, Mask):
        shape = MaskShape(case.batch, case.heads, case.queries, case.keys)
        return mask.to_dense(shape, inputs.leaves["q"].device)
    return mask


def additive(inputs: Inputs) -> Tensor | None:
    """The case's bias as a tensor, -inf where its mask hides; None where it has neither."""
    case, mask = inputs.case, dense_mask(inputs)
    bias = inputs.arguments()[1].get("bias")
    if isinstance(bias, Bias):
        shape = MaskShape(case.batch, case.heads, case.queries, case.keys)
        bias = bias.to_dense(shape, inputs.leaves["q"].device, case.dtype).contiguous()
    if mask is None:
        return bias
    bias = torch.zeros(mask.shape, dtype=case.dtype, device=mask.device) if bias is None else bias
    return bias.masked_fill(~mask, -math.inf)


def visible_pairs(case: Case, mask: Tensor | None) -> int:
    """Visible pairs over batch and query heads.

    >>> visible_pairs(Case("x", batch=2, heads=3, seqlen_q=4), torch.ones(4, 4).tril().bool())
    60
    """
    shape = (case.batch, case.heads, case.queries, case.keys)
    total = case.batch * case.heads * case.queries * case.keys
    if mask is None:
        return total
    return int(mask.count_nonzero()) * (total // mask.numel()) if mask.numel() else torch.Size(shape).numel()


def work(inputs: Inputs, timed: str) -> Work:
    """The work of a dense case, a varlen case without a mask, or one with a contiguous cache that is full."""
    case = inputs.case
    if case.op == "varlen":
        pairs = case.heads * sum(a * b for a, b in zip(case.lengths_q, case.lengths_k, strict=True))
    else:
        pairs = visible_pairs(case, dense_mask(inputs))
    flops = 2.0 * (case.head_dim + case.dim_v) * pairs * FLOPS_FACTOR[timed]
    moved = sum(inputs.leaves[name].numel() for name in ("q", "k", "v")) + inputs.dout.numel()
    return Work(pairs, flops, PASSES[timed] * moved * case.dtype.itemsize)

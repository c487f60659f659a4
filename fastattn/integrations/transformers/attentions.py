"""Weights for `output_attentions=True`: as large as they look, hence only of short texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.call import Call
from fastattn.head_weights import dropped_weights

try:  # private: without it only the models that tell their layers get weights
    from transformers.utils.output_capturing import _active_collector
except ImportError:
    _active_collector = None


@dataclass
class Limit:
    """The longest text of which weights are returned."""

    tokens: int = 2048


LIMIT = Limit()


def wants_weights(kwargs: dict[str, Any]) -> bool:
    """Whether the model was called for attentions: it says so to its layers, or collects what they return."""
    if kwargs.get("output_attentions"):
        return True
    if torch.compiler.is_compiling() or _active_collector is None:
        return False
    collected = _active_collector.get()
    return bool(collected) and any(name.endswith("attentions") for name in collected)


def returned_weights(call: Call) -> Tensor:
    """The weights after dropout, [B, Hq, Lq, Lk] in q's dtype; draws the call's dropout seed if need be.

    Raises:
        ValueError: too many pairs.
    """
    seqlen_q, seqlen_k = call.seqlens()
    if seqlen_q * seqlen_k > LIMIT.tokens**2:
        raise ValueError(
            f"output_attentions=True returns weights of at most {LIMIT.tokens} x {LIMIT.tokens} pairs, "
            f"got {seqlen_q} x {seqlen_k}: for longer texts call the model without it in a block "
            f"`with fastattn.inspect.record(model) as rec:`, whose summaries stay small, or raise the limit "
            f"with register(max_attentions=...)"
        )
    dispatch.seed(call)
    return dropped_weights(call, call.q, call.k, average=False)

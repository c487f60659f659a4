"""Calls of scaled_dot_product_attention by name, with their gradients: ours, torch's, and eager code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn

NAMES = ("query", "key", "value", "attn_mask")

sdpa = fastattn.scaled_dot_product_attention


class Call:
    """The arguments of one call, by name, with tensors as fresh leaves."""

    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments

    @staticmethod
    def of(sample: Any) -> Call:
        return Call({**dict(zip(NAMES, (sample.input, *sample.args), strict=False)), **sample.kwargs})

    def tensors(self) -> dict[str, Tensor]:
        return {n: t for n, t in self.arguments.items() if isinstance(t, Tensor) and t.is_floating_point()}

    def to(self, dtype: torch.dtype) -> Call:
        return Call({**self.arguments, **{n: t.detach().to(dtype) for n, t in self.tensors().items()}})

    def results(
        self, function: Callable[..., Tensor], shape: tuple[int, ...] | None = None
    ) -> dict[str, Tensor]:
        """The output, and each tensor's gradient for a fixed upstream gradient of that shape (or out's)."""
        leaves = {n: t.detach().clone().requires_grad_() for n, t in self.tensors().items()}
        out = function(**{**self.arguments, **leaves})
        generator = torch.Generator().manual_seed(0)
        dout = torch.randn(shape or out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
        grads = torch.autograd.grad(out, list(leaves.values()), dout.expand(out.shape))
        return {"out": out.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


class KeepLse(torch.autograd.Function):
    """softmax(scores) @ value, whose backward pass recomputes the weights from lse and takes row sums from
    the output: what every attention that keeps no N x N matrix does, here in eager code."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, value: Tensor) -> Tensor:
        lse = scores.logsumexp(-1, keepdim=True)
        out = (scores - lse).exp() @ value
        ctx.save_for_backward(scores, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        scores, value, out, lse = ctx.saved_tensors
        weights = (scores - lse).exp()
        return weights * (dout @ value.mT - (dout * out).sum(-1, keepdim=True)), weights.mT @ dout


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The formula as anyone would write it, in the dtype of the inputs; rows must see some key."""
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return KeepLse.apply(scores, value.expand(*scores.shape[:-2], *value.shape[-2:]))


def torch_math(**arguments: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(**arguments)

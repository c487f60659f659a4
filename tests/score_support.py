"""Calls with any score on the kernels, beside the definition in float64 and in their own dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import execution, reference
from fastattn.call import Call
from fastattn.testing.running import _worse

ISAS = ("baseline", "avx2", "avx512", "generic")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("q", "k", "v", "w")


def leaves_of(
    score: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 0.6
) -> list[Tensor]:
    """q, k, v and, for the additive score, w. Distances are such that compact kernels reach some keys.

    Args:
        shape: (batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v).
        spread: standard deviation of a distance, in widths.
    """
    batch, heads, heads_kv, seqlen_q, seqlen_k, dim, dim_v = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    factor = 1.0 if score == "additive" else spread / (2 * dim) ** 0.5
    q, k = randn(batch, heads, seqlen_q, dim) * factor, randn(batch, heads_kv, seqlen_k, dim) * factor
    tensors = [q, k, randn(batch, heads_kv, seqlen_k, dim_v)]
    if score == "additive":
        tensors.append(randn(dim) * (4 / dim) ** 0.5)
    return [t.to(dtype) for t in tensors]


def call_kernels(score: str, leaves: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) by the route of the public functions."""
    q, k, v, *w = leaves
    call = Call("attention", q, k, v, scale=1.0, score=score, return_lse=True, **options)
    call.score_weights = w[0] if w else None
    return execution.run(call)


def call_definition(score: str, leaves: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) of the reference, in the leaves' dtype."""
    q, k, v, *w = leaves
    w = w[0] if w else None
    return reference.attention(q, k, v, scale=1.0, score=score, score_weights=w, return_lse=True, **options)


def results(
    function: Any, score: str, leaves: list[Tensor], seed: int = 7, **options: Any
) -> dict[str, Tensor]:
    """out, lse and the gradients of a fixed random contraction of both."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    outputs = function(score, leaves, **options)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    gradients = torch.autograd.grad(
        outputs,
        leaves,
        [g.to(leaves[0].dtype).to(o.dtype) for g, o in zip(upstream, outputs, strict=True)],
        allow_unused=True,
    )  # fmt: skip
    found = {"out": outputs[0].detach(), "lse": outputs[1].detach()}
    for name, leaf, gradient in zip(NAMES, leaves, gradients, strict=False):
        found[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def expected(score: str, leaves: list[Tensor], **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(exact, native): the definition in float64, and in the leaves' dtype, the worse of two orders."""
    exact = results(call_definition, score, [t.double() for t in leaves], **options)
    native = results(call_definition, score, leaves, reverse_keys=True, **options)
    if leaves[0].dtype != torch.float64:
        forward = results(call_definition, score, leaves, **options)
        native = {name: _worse(exact[name], native[name], forward[name]) for name in native}
    return exact, native

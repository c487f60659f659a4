"""What the tests of the public calls share: inputs, and comparison with the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn.backends import cpu

NATIVE = cpu.available()
# A few hundred float64 roundings of values of size one; a wrong element differs by far more.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def qkv(
    batch: int = 2,
    heads: int = 4,
    heads_kv: int | None = None,
    seqlen_q: int = 5,
    seqlen_k: int | None = None,
    head_dim: int = 8,
    head_dim_v: int | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    grad: bool = False,
    seed: int = 0,
) -> list[Tensor]:
    """q, k and v with normal entries."""
    generator = torch.Generator().manual_seed(seed)
    heads_kv = heads if heads_kv is None else heads_kv
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    shapes = [
        (batch, heads, seqlen_q, head_dim),
        (batch, heads_kv, seqlen_k, head_dim),
        (batch, heads_kv, seqlen_k, head_dim_v),
    ]
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [value.requires_grad_(grad) for value in values]


def randn(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def f32(*shape: int) -> Tensor:
    return randn(*shape, dtype=torch.float32)


def grads(function: Callable[..., Any], inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Results of function(*inputs), and gradients of a fixed random contraction of them."""
    results = function(*inputs)
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    loss = sum(
        (r * randn(*r.shape, seed=7 + n).to(r.dtype)).nan_to_num().sum() for n, r in enumerate(results)
    )
    return results, list(torch.autograd.grad(loss, inputs))  # type: ignore[arg-type]


def same_as_reference(
    inputs: list[Tensor], call: Callable[..., Any] = fastattn.attention, **options: Any
) -> None:
    """The call and its gradients against backend='reference'; inputs are float64 and want gradients."""
    got, got_grads = grads(lambda *t: call(*t, **options), inputs)
    want, want_grads = grads(lambda *t: call(*t, **options, backend="reference"), inputs)
    for a, b in zip(got + got_grads, want + want_grads, strict=True):
        torch.testing.assert_close(a, b, **EXACT)

"""Memory layouts of results: out has the stride order of q."""

from __future__ import annotations

import torch
from torch import Tensor


def stride_order(q: Tensor) -> list[int]:
    """q's leading dimensions from the widest stride to the narrowest, then the last one."""
    return [*sorted(range(q.dim() - 1), key=q.stride, reverse=True), q.dim() - 1]


def output_like(q: Tensor, head_dim_v: int) -> Tensor:
    """Uninitialised [..., head_dim_v] in q's dtype and stride order, the last dimension contiguous."""
    if q.is_contiguous():
        shape = q.shape
        return torch.empty_like(q) if head_dim_v == shape[-1] else q.new_empty((*shape[:-1], head_dim_v))
    order = stride_order(q)
    out = q.new_empty([q.shape[dim] for dim in order[:-1]] + [head_dim_v])
    return out.permute([order.index(dim) for dim in range(q.dim())])


def in_order_of(q: Tensor, out: Tensor) -> Tensor:
    """`out` in q's stride order, copied where it has another."""
    order = stride_order(q)
    return out.permute(order).contiguous().permute([order.index(dim) for dim in range(q.dim())])


def resolved(tensor: Tensor) -> Tensor:
    """The tensor itself where its memory holds its values, otherwise a copy whose memory does.

    A lazily negated view holds the opposite values, and a lazy zero tensor has no memory at all.
    """
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def dense_last(tensor: Tensor) -> Tensor:
    """The tensor itself, resolved, where its last dimension is contiguous, otherwise a contiguous copy."""
    tensor = resolved(tensor)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()

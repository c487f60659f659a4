"""Calls whose tensors are [..., length, features]: any leading dimensions as batch and heads, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import execution
from fastattn.call import Call
from fastattn.masks import Mask
from fastattn.spec import dtype_name
from fastattn.validation import broadcasts, check_tensor
from fastattn.weights import whole_matrix


def fold(call: Call) -> torch.Size:
    """Bring q, k, v and a tensor mask of `call` to four dimensions, in place.

    One leading dimension is the batch; of two or more the last is the heads and the others together the
    batch. They broadcast as in PyTorch.

    Args:
        call: q [..., Lq, D], k [..., Lk, D], v [..., Lk, Dv]; mask a Mask, or bool broadcastable to
            [..., Lq, Lk].
    Returns:
        The leading dimensions.
    Raises:
        TypeError, ValueError: naming the argument, the rule and the value got.
    """
    lead = leading_dimensions(call)
    if isinstance(call.mask, Tensor):
        call.mask = _fold_mask(call, lead)
    call.q, call.k, call.v = (_to_4d(t.expand(*lead, *t.shape[-2:])) for t in (call.q, call.k, call.v))
    return lead


def leading_dimensions(call: Call) -> torch.Size:
    """What the leading dimensions of q, k and v broadcast to.

    Raises:
        TypeError, ValueError: an argument is no tensor, has too few dimensions, or does not broadcast.
    """
    named = [(call.name(name), getattr(call, name)) for name in ("q", "k", "v")]
    for name, tensor in named:
        check_tensor(name, tensor)
        if tensor.dim() < 2:
            raise ValueError(f"{name} must be [..., length, features], got shape {list(tensor.shape)}")
    _, (name_k, k), (name_v, v) = named
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"{name_v} must have {name_k}'s length {k.shape[-2]}, got shape {list(v.shape)}")
    lead = torch.Size(())
    for name, tensor in named:
        try:
            lead = torch.broadcast_shapes(lead, tensor.shape[:-2])
        except RuntimeError:
            got = f"{list(tensor.shape[:-2])} beside {list(lead)}"
            raise ValueError(
                f"{name}'s leading dimensions must broadcast with the others', got {got}"
            ) from None
    return lead


def run(call: Call) -> Any:
    """`execution.run` on tensors of any number of dimensions: out [..., Lq, Dv] and, if asked, lse."""
    lead = fold(call)
    if not call.return_lse:
        return unfold(execution.run(call), lead)
    out, lse = execution.run(call)
    return unfold(out, lead), lse.reshape(*lead, lse.shape[-1])


def weights(call: Call) -> Tensor:
    """The weights of a call, [..., Lq, Lk], without gradient."""
    lead = fold(call)
    return unfold(whole_matrix(call), lead)


def unfold(tensor: Tensor, lead: torch.Size) -> Tensor:
    """[batch, heads, L, n] as [..., L, n]."""
    return tensor.reshape(*lead, *tensor.shape[-2:])


def _to_4d(tensor: Tensor) -> Tensor:
    if tensor.dim() == 3:
        return tensor.unsqueeze(1)
    if tensor.dim() > 4:
        return tensor.flatten(0, -4)
    return tensor[(None,) * (4 - tensor.dim())]


def _fold_mask(call: Call, lead: torch.Size) -> Mask | Tensor:
    """A bool mask, broadcastable to [..., Lq, Lk], so that it broadcasts to the folded scores."""
    name, mask = call.name("mask"), check_tensor(call.name("mask"), call.mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool (True = attend), got {dtype_name(mask.dtype)}")
    want = [*lead, call.q.shape[-2], call.k.shape[-2]]
    if not broadcasts(mask.shape, want):
        raise ValueError(f"{name} must broadcast to {want}, got {list(mask.shape)}")
    if mask.dim() < 3:
        return mask
    return _to_4d(mask.expand(*lead, *mask.shape[-2:]) if len(lead) > 2 else mask)

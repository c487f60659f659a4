"""A dense call on a GPU like one before it: its checks, its backend and its numbers are known by then.

Kernels run there while Python goes on, so what Python takes per call is what a small one costs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import autograd, dispatch
from fastattn.call import Call
from fastattn.dispatch import forced_by_environment
from fastattn.lowering import NO_OPERANDS, Operands, Params, lower
from fastattn.masks.band import Band
from fastattn.plain import is_eager
from fastattn.validation import check_seed, validate

LIMIT = 1024  # kinds of calls remembered, after which all are forgotten


class Known(NamedTuple):
    """What follows from the shapes, strides, dtypes and numbers of a call."""

    kernels: Any  # the backend, which has kernels of its own
    params: Params


_TENSORS = (Tensor, torch.nn.Parameter)
_NEW: Any = object()  # stands for a key that is not there
_known: dict[tuple[Any, ...], Known | None] = {}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    return_lse: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor | None] | None:
    """(out, lse) of a call without bias and sinks; None sends it down the full path, which may be all that is
    wrong with it.

    Args:
        as fastattn.attention has them.
    Raises:
        as fastattn.attention does.
    """
    if not is_eager():
        return None
    if type(mask) is Band:
        band = mask.lo, mask.hi, mask.align
    elif mask is None:
        band = None
    else:
        return None
    if (
        type(q) not in _TENSORS
        or type(k) not in _TENSORS
        or type(v) not in _TENSORS
        or type(dropout_p) is not float
        or dropout_p == 1
        or (scale is not None and type(scale) is not float)
        or (softcap is not None and type(softcap) is not float)
        or (backend is not None and type(backend) is not str)
    ):
        return None
    try:
        key = (
            q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device,
            v.shape, v.stride(), v.dtype, v.device, autograd.wants_gradient(q, k, v, NO_OPERANDS), band,
            scale, softcap, dropout_p, backend, forced_by_environment(),
        )  # fmt: skip
    except RuntimeError:  # a sparse or nested tensor has no strides
        return None
    known = _known.get(key, _NEW)
    if known is _NEW:
        call = Call("attention", q, k, v, mask, None, scale, softcap, None, dropout_p, backend=backend)
        if len(_known) >= LIMIT:
            _known.clear()
        known = _known[key] = _look(call)
    if known is None:
        return None
    if dropout_seed is not None:
        check_seed("dropout_seed", dropout_seed, q.device)
    elif dropout_p > 0:
        dropout_seed = dispatch.drawn_seed(q.device)
    operands = Operands(seed=dropout_seed) if dropout_p > 0 else NO_OPERANDS
    return autograd.eager(known.kernels, q, k, v, operands, known.params, return_lse)


def _look(call: Call) -> Known | None:
    """What holds for all calls like this one; None where they need the full path."""
    validate(call)
    if 0 in (call.q.shape[-1], call.v.shape[-1]):
        return None
    kernels = dispatch.choose(call)
    if not hasattr(kernels, "forward"):
        return None
    return Known(kernels, lower(call)[1])

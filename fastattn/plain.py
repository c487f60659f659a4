"""The plainest of calls, recognised and run at once, so that a tiny one costs little more than PyTorch's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn import autograd, dispatch
from fastattn.backends import cpu
from fastattn.biases import Bias
from fastattn.call import Call
from fastattn.dispatch import forced_by_environment
from fastattn.execution import run
from fastattn.lowering import lower
from fastattn.masks import Mask
from fastattn.masks.band import Band
from fastattn.validation import validate_options
from fastattn.watch import observers

# Bound once: each lookup through a module costs as much as the call itself.
_is_compiling = torch.compiler.is_compiling
_function_modes = torch._C._is_torch_function_mode_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_trace = torch._C._get_tracing_state
_autocast = torch._C._is_any_autocast_enabled

_FLOAT32_MAX = torch.finfo(torch.float32).max


def is_plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether nothing needs a check about q, k and v: in eager mode, the CPU kernels take them as they are.

    False sends the call down the full path, which validates it: so nothing here needs to raise, and each
    test may refuse more than it must. Ordered so that a tracer leaves at the first test.
    """
    return (
        is_eager()
        and cpu.are_plain(q, k, v)
        and not (q.is_neg() or k.is_neg() or v.is_neg())
        and forced_by_environment() is None
    )


def is_eager() -> bool:
    """Whether nothing but plain autograd watches: no tracer, mode, transform, autocast or observer."""
    return (
        not _is_compiling()
        and not (_function_modes() or _dispatch_modes() or _transforms() or _autocast())
        and forward_ad._current_level < 0
        and _trace() is None
        and not observers()
    )


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None,
    bias: Bias | Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    return_lse: bool,
) -> Any:
    """`attention` where `is_plain` found nothing to check about q, k and v."""
    if (
        bias is None
        and softcap is None
        and sinks is None
        and dropout_seed is None
        and not return_lse
        and type(dropout_p) is float
        and dropout_p == 0.0
    ):
        if scale is None:
            scale = 1.0 / math.sqrt(q.size(3))
        if type(scale) is float and -_FLOAT32_MAX <= scale <= _FLOAT32_MAX:  # finite in every dtype's kernels
            if (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled():
                if mask is None:
                    return autograd.plain(q, k, v, scale)
            else:
                options = None if mask is None else mask_options(mask, q, k)
                if mask is None or options is not None:
                    return cpu.small(q, k, v, scale, options=options)
    call = Call("attention", q, k, v, mask, bias, scale, softcap, sinks, dropout_p, dropout_seed, return_lse)
    validate_options(call)
    if call.dropout_p == 1:
        return run(call)
    dispatch.seed(call)
    operands, params = lower(call)
    out, lse = autograd.eager(cpu, q, k, v, operands, params, return_lse)
    return (out, lse) if return_lse else out


def mask_options(mask: Mask | Tensor, q: Tensor, k: Tensor) -> dict[str, Any] | None:
    """What the CPU kernels need to know of the mask of such a call, where it is a band or a bool tensor.

    None sends the call down the full path, as in `is_plain`.
    """
    if type(mask) is Band:
        lo, hi = mask.lo, mask.hi
        return {"band": (None, None, lo, hi) if mask.align == "bottom_right" else (lo, hi, None, None)}
    if type(mask) is not Tensor or mask.dtype is not torch.bool or not mask.is_cpu or mask.dim() != 4:
        return None
    whole = (*q.shape[:3], k.shape[2])
    strides = []
    for size, full, stride in zip(mask.shape, whole, mask.stride(), strict=True):
        if size not in (1, full):
            return None
        strides.append(0 if size == 1 else stride)
    pointer = mask.data_ptr()
    return {"mask": (pointer, whole, tuple(strides))} if pointer else None

"""The plainest of calls, recognised and run at once, so that a tiny one costs little more than PyTorch's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn import autograd, dispatch
from fastattn.backends import cpu
from fastattn.backends.cpu_views import DTYPE_CODES, Views
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


def plain_views(q: Tensor, k: Tensor, v: Tensor) -> Views | None:
    """What the CPU kernels need to know of q, k and v where eager mode runs them as they are, else None.

    None sends the call down the full path, which validates it: so nothing here needs to raise, and each
    test may refuse more than it must. Ordered so that a tracer leaves at the first test.
    """
    if _is_compiling() or not (type(q) is Tensor and type(k) is Tensor and type(v) is Tensor):
        return None
    dtype = q.dtype
    if not (q.is_cpu and k.is_cpu and v.is_cpu and dtype is k.dtype and dtype is v.dtype):
        return None
    shape, shape_k, shape_v = q.shape, k.shape, v.shape
    if not (len(shape) == 4 and len(shape_k) == 4 and len(shape_v) == 4):
        return None
    batch, heads, seqlen_q, head_dim = shape
    batch_k, heads_kv, seqlen_k, head_dim_k = shape_k
    batch_v, heads_v, seqlen_v, head_dim_v = shape_v
    strides, strides_k, strides_v = q.stride(), k.stride(), v.stride()
    if (
        batch == batch_k == batch_v
        and head_dim == head_dim_k
        and seqlen_k == seqlen_v
        and heads_kv == heads_v
        and strides[3] == strides_k[3] == strides_v[3] == 1
        and (batch and heads and heads_kv and seqlen_q and seqlen_k and head_dim and head_dim_v)
        and (heads == heads_kv or heads % heads_kv == 0)
        and not (q.is_neg() or k.is_neg() or v.is_neg())
        and not (_function_modes() or _dispatch_modes() or _transforms() or _autocast())
        and forward_ad._current_level < 0
        and _trace() is None
        and not observers()
        and forced_by_environment() is None
        and dtype in DTYPE_CODES
        and cpu.available()
    ):
        pointer, pointer_k, pointer_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        if pointer and pointer_k and pointer_v:  # a lazy zero tensor has no memory
            return (
                DTYPE_CODES[dtype],
                (pointer, shape, strides),
                (pointer_k, shape_k, strides_k),
                (pointer_v, shape_v, strides_v),
            )
    return None


def plain_attention(
    views: Views,
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
    """`attention` where `plain_views` found nothing to check about q, k and v."""
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
            scale = 1.0 / math.sqrt(views[1][1][3])
        if type(scale) is float and -_FLOAT32_MAX <= scale <= _FLOAT32_MAX:  # finite in every dtype's kernels
            if (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled():
                if mask is None:
                    return autograd.plain(q, k, v, views, scale)
            else:
                options = None if mask is None else mask_options(mask, views)
                if mask is None or options is not None:
                    return cpu.small(q, views, scale, options=options)
    call = Call("attention", q, k, v, mask, bias, scale, softcap, sinks, dropout_p, dropout_seed, return_lse)
    validate_options(call)
    if call.dropout_p == 1:
        return run(call)
    dispatch.seed(call)
    operands, params = lower(call)
    out, lse = autograd.eager(cpu, q, k, v, operands, params, return_lse)
    return (out, lse) if return_lse else out


def mask_options(mask: Mask | Tensor, views: Views) -> dict[str, Any] | None:
    """What the CPU kernels need to know of the mask of such a call, where it is a band or a bool tensor.

    None sends the call down the full path, as in `plain_views`.
    """
    if type(mask) is Band:
        lo, hi = mask.lo, mask.hi
        return {"band": (None, None, lo, hi) if mask.align == "bottom_right" else (lo, hi, None, None)}
    if type(mask) is not Tensor or mask.dtype is not torch.bool or not mask.is_cpu or mask.dim() != 4:
        return None
    _, (_, shape_q, _), (_, shape_k, _), _ = views
    whole = (shape_q[0], shape_q[1], shape_q[2], shape_k[2])
    strides = []
    for size, full, stride in zip(mask.shape, whole, mask.stride(), strict=True):
        if size not in (1, full):
            return None
        strides.append(0 if size == 1 else stride)
    pointer = mask.data_ptr()
    return {"mask": (pointer, whole, tuple(strides))} if pointer else None

"""PyTorch's own scaled_dot_product_attention, where its semantics agree with ours; any device.

One difference remains that no description of a call can show: PyTorch lets a NaN or an infinity in a masked
key or value reach the rows that mask it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattn.call import Call
from fastattn.lowering import to_4d
from fastattn.masks.band import Band
from fastattn.spec import AttentionSpec, needs_grad

name = "torch"


def supports(spec: AttentionSpec) -> str | None:
    """None, or every reason why PyTorch's call cannot stand for this one."""
    reasons = []
    if spec.op != "attention":
        reasons.append(f"PyTorch has no {spec.op} call")
    if spec.score != "dot":
        reasons.append(f"PyTorch has no {spec.score} score")
    if spec.softcap is not None:
        reasons.append("PyTorch has no softcap")
    if spec.sinks:
        reasons.append("PyTorch has no sinks")
    if spec.dropout_p not in (0.0, 1.0):
        reasons.append("PyTorch drops other elements")
    if spec.return_lse:
        reasons.append("PyTorch does not return lse")
    return "; ".join(reasons) or None


def run(call: Call) -> tuple[Tensor, None]:
    """(out, None) of a validated call."""
    q, k, v = call.q, call.k, call.v
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        # Some of PyTorch's paths divide by a zero length. The sum ties the zeros to the inputs' graph.
        link = q.sum() + k.sum() + v.sum()
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])
        return out + link.masked_fill(torch.ones_like(link, dtype=torch.bool), 0), None
    attn_mask, is_causal = _mask(call)
    options: dict[str, Any] = {
        "is_causal": is_causal,
        "scale": call.scale_value(),
        "enable_gqa": bool(call.num_heads() != call.num_heads_kv()),  # torch.jit.trace compares tensors here
    }
    if attn_mask is not None and attn_mask.dtype != torch.bool and needs_grad(call):
        # The flash path's backward takes exp(s - lse), which loses log(n) beside a lse of, say, finfo.min.
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask, **options), None
    return F.scaled_dot_product_attention(q, k, v, attn_mask, **options), None


def _mask(call: Call) -> tuple[Tensor | None, bool]:
    """(attn_mask, is_causal) that say what mask and bias say together."""
    shape = call.mask_shape()
    device = call.q.device
    bias: Tensor | None = None
    if isinstance(call.bias, Tensor):
        bias = to_4d(call.bias)
    elif call.bias is not None:
        bias = call.bias.to_dense(shape, device, torch.promote_types(call.q.dtype, torch.float32))
    if call.mask is None:
        return (bias, False) if bias is None else (bias.to(_bias_dtype(call)), False)
    if bias is None and _is_plain_causal(call):
        return None, True
    mask = to_4d(call.mask) if isinstance(call.mask, Tensor) else call.mask.to_dense(shape, device)
    if bias is None:
        return mask, False
    return torch.where(mask, bias, -math.inf).to(_bias_dtype(call)), False


def _bias_dtype(call: Call) -> torch.dtype:
    # PyTorch takes a mask of the query's dtype, or float32 with a narrower one.
    return torch.float64 if call.q.dtype == torch.float64 else torch.float32


def _is_plain_causal(call: Call) -> bool:
    mask = call.mask
    seqlen_q, seqlen_k = call.seqlens()
    # With scale <= 0 PyTorch's causal path gives NaN.
    if not isinstance(mask, Band) or seqlen_q != seqlen_k or call.scale_value() <= 0:
        return False
    return mask.lo is None and mask.hi == 0

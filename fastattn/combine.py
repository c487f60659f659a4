"""merge: attention over disjoint key sets, put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.spec import FLOAT_DTYPES, dtype_name
from fastattn.validation import check_tensor

_DTYPES = ", ".join(map(dtype_name, FLOAT_DTYPES))


def merge(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """out = sum_n exp(lse_n - lse) out_n with lse = log(sum_n exp(lse_n)): attention over all parts' keys.

    Exact, where each part is attention of the same queries over keys that no other part has. Sinks belong
    into one part only. Differentiable in outs and lses.

    >>> out, lse = merge([torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)], [torch.zeros(1, 1, 1)] * 2)
    >>> out, lse.exp()
    (tensor([[[[0.5000, 0.5000]]]]), tensor([[[2.]]]))

    Args:
        outs: N tensors [B, Hq, Lq, Dv], or packed ones [total_q, Hq, Dv]; of one shape and dtype.
        lses: N tensors [B, Hq, Lq], or [Hq, total_q]; as the calls return them. -inf marks an empty row.
    Returns:
        out in the outs' dtype and lse in the lses'. A row that is empty in every part has out 0 and lse -inf.
    Raises:
        TypeError, ValueError: no parts, unequal numbers, shapes, dtypes or devices that do not fit.
    """
    outs, lses = _as_list("outs", outs), _as_list("lses", lses)
    _check(outs, lses)
    stacked = torch.stack(lses)
    dtype = torch.promote_types(stacked.dtype, torch.promote_types(outs[0].dtype, torch.float32))
    logits = stacked.to(dtype)
    highest = logits.detach().amax(0)
    highest = highest.masked_fill(highest.isinf(), 0.0)  # whose difference with itself would be NaN
    weights = (logits - highest).exp()
    total = weights.sum(0)
    is_empty = total == 0
    total = total.masked_fill(is_empty, 1.0)
    lse = (highest + total.log()).masked_fill(is_empty, -torch.inf)
    out = torch.zeros((), dtype=dtype, device=outs[0].device)
    for part, weight, logit in zip(outs, weights / total, logits, strict=True):
        weight, absent = _as_factor(weight, part), _as_factor(logit == -torch.inf, part)
        # A part that saw nothing adds nothing, whatever its out holds.
        out = out + (weight * part.to(dtype)).masked_fill(absent, 0.0)
    return out.to(outs[0].dtype), lse.to(stacked.dtype)


def _as_list(name: str, parts: Any) -> list[Tensor]:
    is_scalar = isinstance(parts, Tensor) and parts.dim() == 0
    if is_scalar or not hasattr(parts, "__iter__"):
        got = "a tensor of shape []" if is_scalar else type(parts).__name__
        raise TypeError(f"{name} must be a sequence of tensors or a stacked tensor, got {got}")
    return list(parts)


def _as_factor(per_row: Tensor, out: Tensor) -> Tensor:
    return per_row.unsqueeze(-1) if out.dim() == 4 else per_row.mT.unsqueeze(-1)


def _check(outs: list[Tensor], lses: list[Tensor]) -> None:
    if not outs:
        raise ValueError("outs must have at least one part, got none")
    if len(outs) != len(lses):
        raise ValueError(f"lses must have as many parts as outs, {len(outs)}, got {len(lses)}")
    check_tensor("outs[0]", outs[0])
    for name, parts in (("outs", outs), ("lses", lses)):
        first = parts[0]
        for n, part in enumerate(parts):
            check_tensor(f"{name}[{n}]", part, outs[0].device, "outs[0]")
            if part.dtype not in FLOAT_DTYPES:
                raise TypeError(f"{name}[{n}] must be one of {_DTYPES}, got {dtype_name(part.dtype)}")
            if part.dtype != first.dtype:
                dtype = dtype_name(first.dtype)
                raise TypeError(
                    f"{name}[{n}] must have {name}[0]'s dtype {dtype}, got {dtype_name(part.dtype)}"
                )
            if part.shape != first.shape:
                raise ValueError(
                    f"{name}[{n}] must have {name}[0]'s shape {list(first.shape)}, got {list(part.shape)}"
                )
    out, lse = outs[0], lses[0]
    if out.dim() not in (3, 4):
        raise ValueError(
            "outs must be [batch, heads, length, head_dim_v] or [tokens, heads, head_dim_v], "
            f"got shape {list(out.shape)}"
        )
    want = list(out.shape[:3]) if out.dim() == 4 else [out.shape[1], out.shape[0]]
    if list(lse.shape) != want:
        raise ValueError(f"lses must have shape {want}, got {list(lse.shape)}")

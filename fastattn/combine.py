"""merge: attention over disjoint key sets, put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.spec import FLOAT_DTYPES, dtype_name
from fastattn.validation import check_tensor


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
        TypeError, ValueError: no parts, unequal numbers, shapes or dtypes that do not fit.
    """
    outs, lses = list(outs), list(lses)
    _check(outs, lses)
    stacked = torch.stack(lses)
    dtype = torch.promote_types(stacked.dtype, torch.promote_types(outs[0].dtype, torch.float32))
    logits = stacked.to(dtype)
    highest = logits.detach().amax(0)
    highest = highest.masked_fill(
        highest == -torch.inf, 0.0
    )  # empty everywhere: -inf - 0 instead of -inf + inf
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


def _as_factor(per_row: Tensor, out: Tensor) -> Tensor:
    return per_row.unsqueeze(-1) if out.dim() == 4 else per_row.mT.unsqueeze(-1)


def _check(outs: list[Tensor], lses: list[Tensor]) -> None:
    if not outs:
        raise ValueError("outs must have at least one part, got none")
    if len(outs) != len(lses):
        raise ValueError(f"lses must have as many parts as outs, {len(outs)}, got {len(lses)}")
    for n, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        check_tensor(f"outs[{n}]", out)
        check_tensor(f"lses[{n}]", lse, out.device)
        for name, tensor, first in ((f"outs[{n}]", out, outs[0]), (f"lses[{n}]", lse, lses[0])):
            if tensor.dtype not in FLOAT_DTYPES or tensor.dtype != first.dtype:
                raise TypeError(f"{name} must be {dtype_name(first.dtype)}, got {dtype_name(tensor.dtype)}")
            if tensor.shape != first.shape:
                raise ValueError(f"{name} must have shape {tuple(first.shape)}, got {tuple(tensor.shape)}")
    out, lse = outs[0], lses[0]
    if out.dim() not in (3, 4):
        raise ValueError(
            "outs must be [batch, heads, length, head_dim_v] or [tokens, heads, head_dim_v], "
            f"got {tuple(out.shape)}"
        )
    want = tuple(out.shape[:3]) if out.dim() == 4 else (out.shape[1], out.shape[0])
    if tuple(lse.shape) != want:
        raise ValueError(f"lses must have shape {want}, got {tuple(lse.shape)}")

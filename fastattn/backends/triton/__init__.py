"""Triton kernels on CUDA tensors, one file per kernel; on CPU tensors under Triton's interpreter.

Nothing imports triton before the first call, or the first question whether a call could run.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastattn.backends.common import (
    empty_lse,
    extra_gradients,
    finish_gradients,
    lse_like,
    no_keys,
    prepare,
)
from fastattn.lowering import Operands, Params
from fastattn.spec import AttentionSpec
from fastattn.strides import output_like

name = "triton"

MAX_HEAD_DIM = 256
OLDEST = (8, 0)


def is_interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


@lru_cache(maxsize=None)
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return None


@lru_cache(maxsize=None)
def _capability() -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def supports(spec: AttentionSpec) -> str | None:
    """None, or every reason why this backend cannot run the call."""
    reasons = []
    if (missing := _missing()) is not None:
        reasons.append(missing)
    if spec.device == "cuda":
        capability = _capability()
        if torch.version.hip is None and capability is not None and capability < OLDEST:
            reasons.append(
                f"it needs compute capability {OLDEST[0]}.{OLDEST[1]}, not {capability[0]}.{capability[1]}"
            )
    elif not (spec.device == "cpu" and is_interpreted()):
        reasons.append(f"it runs on cuda tensors, not {spec.device}")
    if spec.dtype == "float64":
        reasons.append("it has no float64")
    if max(spec.head_dim, spec.head_dim_v) > MAX_HEAD_DIM:
        reasons.append(
            f"head_dim and head_dim_v go up to {MAX_HEAD_DIM}, not {max(spec.head_dim, spec.head_dim_v)}"
        )
    if spec.score != "dot" and spec.bias is not None and spec.needs_grad:
        reasons.append(f"it has no gradients of a bias beside the {spec.score} score")
    if spec.score != "dot" and spec.paged:
        reasons.append(f"paged caches have no {spec.score} score")
    if spec.paged and spec.needs_grad:
        reasons.append("paged caches have no backward pass")
    return "; ".join(reasons) or None


def forward(
    q: Tensor, k: Tensor, v: Tensor, operands: Operands, params: Params, need_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """out and lse of a lowered call.

    Args:
        q, k, v: as in fastattn.call.Call.
        operands, params: see fastattn.lowering.
        need_lse: whether lse is wanted.
    Returns:
        out in q's dtype and stride order; lse float32, [B, Hq, Lq] or [Hq, total_q], or None.
    """
    out = output_like(q, v.shape[-1])
    lse = lse_like(q) if need_lse else None
    if 0 in q.shape[:-1]:
        return out, lse
    operands = prepare(q, k, operands, params)
    if no_keys(k, v, operands):
        return out.zero_(), empty_lse(lse, operands)
    _host(params).forward(q, k, v, operands, params, out, lse)
    return out, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    operands: Operands,
    params: Params,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients (dq, dk, dv, dbias, ddiag, dsinks, dscore_weights) of a lowered call; of the last four those
    that are needed.

    Args:
        q, k, v, out, lse: inputs and results of `forward`.
        dout, dlse: gradients of out and lse; dlse may be None.
        needs: seven flags, of which the last four are read: q, k and v always get theirs.
    """
    dout = dout.to(q.dtype)
    grads = [output_like(t, t.shape[-1]) for t in (q, k, v)]
    operands = prepare(q, k, operands, params)
    if 0 in q.shape[:-1] or no_keys(k, v, operands):
        for grad in grads:
            grad.zero_()
        return *grads, *finish_gradients(extra_gradients(operands, needs), operands, dlse)
    extra = _host(params).backward(q, k, v, out, lse, dout, dlse, operands, params, needs[3:], grads)
    return *grads, *finish_gradients(extra, operands, None)


def _host(params: Params) -> Any:
    """What launches the kernels for a score."""
    if params.score == "dot":
        from fastattn.backends.triton import host

        return host
    from fastattn.backends.triton import pair_host

    return pair_host

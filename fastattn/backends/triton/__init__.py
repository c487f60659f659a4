"""Triton kernels on CUDA tensors, one file per kernel; on CPU tensors under Triton's interpreter.

Nothing imports triton before the first call, or the first question whether a call could run.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastattn.backends.common import extra_gradients, filled, finish_gradients, no_keys, prepare
from fastattn.backends.triton import plans
from fastattn.backends.triton.launch import architecture
from fastattn.call import Call
from fastattn.lowering import DIFFERENTIABLE, NO_OPERANDS, Operands, Params
from fastattn.spec import AttentionSpec
from fastattn.strides import output_like

name = "triton"

MAX_HEAD_DIM = 256
NO_EXTRA_GRADIENTS = (None,) * DIFFERENTIABLE
OLDEST = (8, 0)


@cache
def _host(score: str) -> Any:
    """What launches the kernels for a score."""
    from fastattn.backends.triton import host, pair_host

    return host if score == "dot" else pair_host


def is_interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


_INSTALLED = importlib.util.find_spec("triton") is not None


def _unsupported(capability: tuple[int, int]) -> list[str]:
    """What speaks against a compute capability."""
    got = ".".join(map(str, capability))
    if capability < OLDEST:
        return [f"it needs compute capability {'.'.join(map(str, OLDEST))}, not {got}"]
    return []


def supports(spec: AttentionSpec) -> str | None:
    """None, or every reason why this backend cannot run the call."""
    reasons = []
    if not _INSTALLED:
        reasons.append("triton is not installed (pip install triton)")
    if spec.device == "cuda":
        if torch.version.hip is None:
            reasons += _unsupported(torch.cuda.get_device_capability())
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


def takes(call: Call) -> bool:
    """Whether this backend runs a validated call, where that can be told without a spec; each test may refuse
    more than it must."""
    q = call.q
    return (
        _INSTALLED
        and q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and q.shape[-1] <= MAX_HEAD_DIM
        and call.v.shape[-1] <= MAX_HEAD_DIM
        and call.score == "dot"
        and call.block_table is None
        and architecture(q.device) >= 10 * OLDEST[0]
    )


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
    deterministic = torch.are_deterministic_algorithms_enabled()
    asked = plans.describe(q, (k, v), operands, params, need_lse, deterministic)
    if (made := plans.FORWARD.run(asked)) is not None:
        return made[0], made[1]
    q, k, v, *rest = given = asked.distinct()

    def fill(operands: Operands, out: Tensor, lse: Tensor | None) -> None:
        launched, workspace = _host(params.score).forward(q, k, v, operands, params, out, lse)
        plans.FORWARD.learn(asked, given, (out, lse, *workspace), launched)

    return filled(q, k, v, Operands(*rest) if rest else NO_OPERANDS, params, need_lse, fill)


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
    asked = plans.describe(q, (k, v, out, lse, dout, dlse), operands, params)
    if (made := plans.BACKWARD.run(asked)) is not None:
        return *made[:3], *NO_EXTRA_GRADIENTS
    q, k, v, out, lse, dout, dlse, *rest = given = asked.distinct()
    operands = Operands(*rest) if rest else NO_OPERANDS
    grads = [output_like(t, t.shape[-1]) for t in (q, k, v)]
    operands = prepare(q, k, operands, params)
    if 0 in q.shape[:-1] or no_keys(k, v, operands):
        for grad in grads:
            grad.zero_()
        return *grads, *finish_gradients(extra_gradients(operands, needs), operands, dlse)
    made = [*grads, torch.empty_like(lse), torch.empty_like(lse)]
    extra, launched = _host(params.score).backward(
        q, k, v, out, lse, dout, dlse, operands, params, needs[3:], made
    )
    if operands.bias is operands.diag is operands.sinks is None:  # of which gradients are more than launches
        plans.BACKWARD.learn(asked, given, made, launched)
    return *grads, *finish_gradients(extra, operands, None)

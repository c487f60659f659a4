"""The Triton kernels behind `fastattn.inspect.summarize`, by the contract of backends.cpu_summary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.backends import triton as attention
from fastattn.backends.common import empty_lse, extra_gradients, finish_gradients, prepare
from fastattn.backends.cpu_summary import results_like
from fastattn.lowering import Operands, Params
from fastattn.spec import AttentionSpec
from fastattn.strides import output_like
from fastattn.weight_statistics import Results, Wanted

name = attention.name


def supports(spec: AttentionSpec) -> str | None:
    """None, or every reason why these kernels cannot summarize the call."""
    reasons = [reason for reason in (attention.supports(spec),) if reason is not None]
    if spec.bias is not None and spec.needs_grad:
        reasons.append("its summaries have no gradients of a bias")
    return "; ".join(reasons) or None


def forward(
    q: Tensor, k: Tensor, lse: Tensor | None, operands: Operands, params: Params, wanted: Wanted
) -> Results:
    """The statistics of the weights of a lowered dense call.

    Args:
        q: [B, Hq, Lq, D]; k: [B, Hkv, Lk, D].
        lse: not read: the walk over the keys that it would spare finds the statistics too.
        operands, params: see fastattn.lowering.
    """
    results = results_like(q, k, wanted)
    if 0 in q.shape[:-1] or k.numel() == 0:
        for tensor in results:
            tensor.fill_(-1 if tensor.dtype == torch.int64 else 0)
        empty_lse(results.lse, operands)
        return results
    operands = prepare(q, k, operands, params)
    _host().forward(q, k, operands, params, wanted, results)
    return results


def backward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    grads: Sequence[Tensor | None],
    operands: Operands,
    params: Params,
    pool_mode: str,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k and the differentiable operands; of the latter those that are needed.

    Args:
        q, k: inputs of `forward`; lse: its result.
        grads: of the differentiable results, in their order; each may be None.
        needs: a flag for each of them, of which those of q and k are not read.
    """
    dq, dk = output_like(q, q.shape[-1]), output_like(k, k.shape[-1])
    operands = prepare(q, k, operands, params)
    if 0 in q.shape[:-1] or k.numel() == 0:
        extra = extra_gradients(operands, (True, *needs, False))
        return dq.zero_(), dk.zero_(), *finish_gradients(extra, operands, grads[3])[:3]
    dsinks = _host().backward(q, k, lse, grads, operands, params, pool_mode, needs[4], dq, dk)
    return dq, dk, None, None, dsinks


def _host() -> Any:
    from fastattn.backends.triton import summary_host

    return summary_host

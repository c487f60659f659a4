"""The C++ kernels behind `fastattn.inspect.summarize`, on CPU tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.backends import cpu
from fastattn.backends.common import empty_lse, extra_gradients, finish_gradients, lse_like, prepare
from fastattn.backends.cpu_views import DTYPE_CODES, Layout, View, view
from fastattn.lowering import Operands, Params
from fastattn.strides import dense_last, output_like, resolved
from fastattn.weight_statistics import POOL_MODES, Results, Wanted, pairs_per_cell

name = cpu.name

_ABSENT = torch.empty(0)


def results_like(q: Tensor, k: Tensor, wanted: Wanted, absent: Tensor | None = None) -> Results:
    """Uninitialised results.

    `absent` stands for what is not wanted; without it that has tensors of its own, as a library op's must be.
    """
    batch, heads, rows = q.shape[:3]
    # empty_like where it will do: it takes half as long as new_empty, and of small calls that shows.
    lse = lse_like(q)
    if absent is None or wanted.top_k:
        weights = lse.new_empty(batch, heads, rows, wanted.top_k)
        indices = torch.empty_like(weights, dtype=torch.int64)
    else:
        weights = indices = absent
    if absent is None or 0 not in wanted.pool:
        pooled = lse.new_empty(batch, heads, *wanted.pool)
    else:
        pooled = absent
    return Results(
        entropy=torch.empty_like(lse),
        received=lse.new_empty(batch, heads, k.shape[2]),
        distance=torch.empty_like(lse),
        lse=lse,
        pooled=pooled,
        max_weight=torch.empty_like(lse),
        max_index=torch.empty_like(lse, dtype=torch.int64),
        topk_weights=weights,
        topk_indices=indices,
    )


def forward(
    q: Tensor, k: Tensor, lse: Tensor | None, operands: Operands, params: Params, wanted: Wanted
) -> Results:
    """The statistics of the weights of a lowered dense call.

    Args:
        q: [B, Hq, Lq, D]; k: [B, Hkv, Lk, D].
        lse: [B, Hq, Lq] in the accumulate dtype, or None to compute it. The result repeats it, but for rows
            of which it would not do, that get their own.
        operands, params: see fastattn.lowering.
    Raises:
        ValueError: the lse of another call.
    """
    results = results_like(q, k, wanted)
    if 0 in q.shape[:-1] or k.numel() == 0:
        return _without_pairs(results, operands)
    operands = prepare(q, k, operands, params)
    q, k = dense_last(q), dense_last(k)
    layout = Layout(q, k, operands, params)
    options = layout.options(operands, params)
    _run(q.dtype, layout.query(q), layout.key(k), lse, params.scale, options, results, wanted)
    return results


def small(
    q: Tensor, k: Tensor, lse: Tensor | None, scale: float, options: dict[str, Any] | None, wanted: Wanted
) -> Results:
    """`forward` of a call that `cpu.are_plain` takes and of which `options`, those of fastattn._C, say all
    but the scale. What is not wanted has no elements, and no shape."""
    results = results_like(q, k, wanted, _ABSENT)
    _run(q.dtype, q, k, lse, scale, options, results, wanted)
    return results


def _run(
    dtype: torch.dtype,
    q: Tensor | View,
    k: Tensor | View,
    lse: Tensor | None,
    scale: float,
    options: dict[str, Any] | None,
    results: Results,
    wanted: Wanted,
) -> None:
    """Fills the results."""
    outputs = (
        _passed(results.entropy),
        _passed(results.distance),
        _passed(results.max_weight),
        _passed(results.max_index),
        _passed(results.received),
        _passed(results.lse),
    )
    topk = pooled = None
    if wanted.top_k:
        topk = _passed(results.topk_weights), _passed(results.topk_indices)
    if 0 not in wanted.pool:
        pooled = POOL_MODES.index(wanted.pool_mode), _passed(results.pooled)
    lse = None if lse is None else resolved(lse)  # kept by its name, as kernels may get its address alone
    given = None if lse is None else _passed(lse)
    threads = torch.get_num_threads()
    cpu._C.summary_fwd(DTYPE_CODES[dtype], q, k, given, scale, threads, outputs, topk, pooled, options)


def _passed(tensor: Tensor) -> Tensor | View:
    """A tensor as fastattn._C reads it: as it is, where it can."""
    return tensor if cpu.reads_tensors else view(tensor)


def _without_pairs(results: Results, operands: Operands) -> Results:
    """Of rows that see nothing, or of no rows."""
    for tensor in results:
        tensor.fill_(-1 if tensor.dtype == torch.int64 else 0)
    empty_lse(results.lse, operands)
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

    The backward pass of attention, with values of width 0 in whose place the statistics add to dP.

    Args:
        q, k: inputs of `forward`; lse: its result.
        grads: of the differentiable results, in their order; each may be None.
        needs: a flag for each of them, of which those of q and k are not read.
    """
    operands = prepare(q, k, operands, params)
    dq, dk = output_like(q, q.shape[-1]), output_like(k, k.shape[-1])
    extra = extra_gradients(operands, (True, *needs, False))  # a summary's scores are products
    entropy, received, distance, dlse, pooled = (
        resolved(grad).contiguous() if grad is not None and grad.numel() else None for grad in grads
    )
    if 0 in q.shape[:-1] or k.numel() == 0:
        return dq.zero_(), dk.zero_(), *finish_gradients(extra, operands, dlse)[:3]
    q, k, lse = dense_last(q), dense_last(k), resolved(lse)
    layout = Layout(q, k, operands, params)
    options = layout.options(operands, params) or {}
    options.update(layout.gradient_views(extra))
    if pooled is not None and pool_mode == "mean":
        pooled = pooled / pairs_per_cell(q.shape[2], k.shape[2], pooled)
    named = {"dentropy": entropy, "dreceived": received, "ddistance": distance, "dpooled": pooled}
    options.update({key: view(grad) for key, grad in named.items() if grad is not None})
    rows, keys = _of_no_width(layout.query(q)), _of_no_width(layout.key(k))
    cpu._C.attention_bwd(
        DTYPE_CODES[q.dtype],
        layout.query(q),
        layout.key(k),
        keys,
        rows,
        layout.rows(lse),
        rows,
        None if dlse is None else layout.rows(dlse),
        layout.query(dq),
        layout.key(dk),
        keys,
        params.scale,
        torch.get_num_threads(),
        options,
    )
    return dq, dk, *finish_gradients(extra, operands, None)[:3]


def _of_no_width(rows: View) -> View:
    """Rows of no elements, which a kernel may point to but neither reads nor writes."""
    pointer, shape, strides = rows
    return pointer, (*shape[:3], 0), strides

"""attention_weights: the exact weights of chosen queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch, reference, watch
from fastattn.autocast import without_autocast
from fastattn.backends import cpu
from fastattn.biases import Bias
from fastattn.call import Call
from fastattn.checks import check_int
from fastattn.execution import autocast, execute
from fastattn.lowering import lower, to_4d
from fastattn.masks import Mask, as_mask
from fastattn.masks.space import Pairs
from fastattn.spec import accumulate_dtype, dtype_name
from fastattn.validation import check_tensor, validate

# Values as wide as this keep the kernels' tiles small.
COLUMNS_AT_ONCE = 256

Index = Tensor | Sequence[int] | slice | int


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    rows: Index | None = None,
    cols: Index | None = None,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """p_ij = exp(s_ij - lse_i), the weight that `attention` gives key j in query i, for chosen i and j.

    The same arguments mean the same as in `attention`; weights are those before dropout. Differentiable in
    q, k, bias and sinks. Time and memory: chosen rows cost R * Lk each; chosen columns of all rows cost fused
    passes over values of up to 256 columns and Lq * C; all of both cost the whole matrix.

    >>> q = k = torch.eye(2).view(1, 1, 2, 2)
    >>> attention_weights(q, k, rows=[1], mask=torch.tensor([[True, False], [True, True]]), scale=0.0)
    tensor([[[[0.5000, 0.5000]]]])

    Args:
        q: [B, Hq, Lq, D]; k: [B, Hkv, Lk, D].
        rows: the R queries: int tensor [R], sequence of ints, slice, or one int (R = 1); negative ones count
            from the end; None for all.
        cols: the C keys, likewise.
        mask, bias, scale, softcap, sinks: as in `attention`.
        backend: of the fused passes; one that cannot run the call raises whatever is chosen.
    Returns:
        [B, Hq, R, C], float32 (float64 for float64). A row sums to 1 over all keys, to less where there are
        sinks, and to 0 where it has no visible key.
    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule and the value got.
    """
    v = k.new_zeros(*k.shape[:-1], 1) if isinstance(k, Tensor) and k.dim() > 0 else k
    call = Call("attention", q, k, v, mask, bias, scale, softcap, sinks, backend=backend)
    autocast(call)
    validate(call)
    call = watch.changed(call)
    dispatch.choose(call)  # raises where a forced backend is unknown, or cannot run the call
    at_rows = _index("rows", rows, q.shape[2], q.device)
    at_cols = _index("cols", cols, k.shape[2], q.device)
    dtype = accumulate_dtype(call.q.dtype)
    call.q, call.k, call.scale = call.q.to(dtype), call.k.to(dtype), call.scale_value()
    if isinstance(call.bias, Tensor):
        call.bias = call.bias.to(dtype)
    with without_autocast(q.device):  # its casts are made; those within would round the weights
        return _weights(call, at_rows, at_cols)


def _weights(call: Call, at_rows: Tensor | None, at_cols: Tensor | None) -> Tensor:
    if at_rows is None and at_cols is not None:
        return _columns(call, at_cols)
    # Few rows, or the whole matrix: softmax itself is at hand.
    weights = _rows(call, at_rows)
    return weights if at_cols is None else weights.index_select(3, at_cols)


def _columns(call: Call, cols: Tensor) -> Tensor:
    """Weights of all rows for the chosen columns: attention over values that are columns of the identity."""
    parts = []
    for chosen in cols.split(COLUMNS_AT_ONCE) if cols.numel() else [cols]:
        heads_kv, seqlen_k = call.k.shape[1:3]
        values = call.k.new_zeros(seqlen_k, chosen.shape[0])
        values[chosen, torch.arange(chosen.shape[0], device=chosen.device)] = 1
        weights = execute(replace(call, v=values.expand(call.k.shape[0], heads_kv, *values.shape)))
        if call.mask is not None:  # in a row of NaNs 0 times a visible pair's weight is no 0
            weights = weights.masked_fill(~_visible(call, _all_rows(call), chosen), 0)
        parts.append(weights)
    return torch.cat(parts, -1)


def _all_rows(call: Call) -> Tensor:
    return torch.arange(call.q.shape[2], device=call.q.device)


def _visible(call: Call, i: Tensor, j: Tensor) -> Tensor:
    """Whether rows i see columns j: bool, broadcastable to [B, Hq, len(i), len(j)]."""
    shape, device = call.mask_shape(), call.q.device
    if call.mask is None:
        return torch.ones(1, 1, i.shape[0], j.shape[0], dtype=torch.bool, device=device)
    mask = as_mask(call.mask)
    mask._check(shape, device)
    b = torch.arange(shape.batch, device=device).view(-1, 1, 1, 1)
    h = torch.arange(shape.heads, device=device).view(1, -1, 1, 1)
    return mask._visible(Pairs(shape, b, h, i.view(1, 1, -1, 1), j.view(1, 1, 1, -1)))


def _rows(call: Call, rows: Tensor | None) -> Tensor:
    """Weights of the chosen rows for all columns."""
    shape = call.mask_shape()
    i = _all_rows(call) if rows is None else rows
    j = torch.arange(shape.seqlen_k, device=call.q.device)
    visible = _visible(call, i, j)
    bias = call.bias
    if isinstance(bias, Tensor):
        bias = to_4d(bias)
        bias = bias if bias.shape[2] == 1 else bias.index_select(2, i)
    elif bias is not None:
        offset = 0 if bias.align == "top_left" else shape.seqlen_k - shape.seqlen_q
        bias = bias.values(j - i[:, None] - offset, call.q.dtype)
    q = call.q.index_select(2, i)
    return reference._probabilities(q, call.k, visible, bias, call.scale_value(), call.softcap, call.sinks)[
        0
    ].to(q.dtype)


def whole_matrix(call: Call) -> Tensor:
    """The weights of a call before dropout, [B, Hq, Lq, Lk], float32 (float64 for float64), without gradient.

    From the kernels' own pass where they run: no second way of computing them.

    Args:
        call: as `execution.run` takes it; its v is not read.
    """
    with torch.no_grad():
        call = replace(call, v=call.k[..., :1], dropout_p=0.0, dropout_seed=None)
        autocast(call)
        validate(call)
        call = watch.changed(call)
        if call.q.numel() and call.k.numel() and dispatch.choose(call) is cpu:
            weights = cpu.weights_like(call.q, call.k, average=False)
            cpu.forward(call.q, call.k, call.v, *lower(call), need_lse=False, weights=weights)
            return weights
        dtype, shape = accumulate_dtype(call.q.dtype), call.mask_shape()
        q = call.q.to(dtype)
        return reference._probabilities(
            q,
            call.k.to(dtype),
            reference._visible(call.mask, shape, q.device),
            reference._bias(call.bias, shape, q),
            call.scale_value(),
            call.softcap,
            call.sinks,
            call.score,
            call.score_weights,
        )[0]


def _index(name: str, value: Any, size: int, device: torch.device) -> Tensor | None:
    """The chosen positions as int64 [n], counted from the start."""
    if value is None:
        return None
    if isinstance(value, slice):
        for part, least in (("start", None), ("stop", None), ("step", 1)):
            if getattr(value, part) is not None:
                check_int(f"{name}'s {part}", getattr(value, part), least, or_none=True)
        return torch.arange(size, device=device)[value]
    if isinstance(value, Tensor):
        check_tensor(name, value, device)
        if value.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} must be int64 or int32, got {dtype_name(value.dtype)}")
        if value.dim() != 1:
            raise ValueError(f"{name} must be 1-D, got shape {list(value.shape)}")
        index = value.long()
    else:
        try:
            items = [check_int(name, item) for item in (value if hasattr(value, "__iter__") else [value])]
        except TypeError:
            raise TypeError(f"{name} must hold ints, got {value!r}") from None
        index = torch.tensor(items, dtype=torch.int64, device=device)
    if not torch.compiler.is_compiling() and index.is_cpu and type(index) is Tensor and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < -size or high >= size:
            raise ValueError(
                f"{name} must be between {-size} and {size - 1}, got {low if low < -size else high}"
            )
    return torch.where(index < 0, index + size, index)

"""The C++ kernels on CPU tensors: allocate, describe the tensors (see `cpu_views`), call fastattn._C."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.backends.common import empty_lse, extra_gradients, finish_gradients, lse_like, no_keys, prepare
from fastattn.backends.cpu_views import DTYPE_CODES, Layout, view
from fastattn.lowering import Operands, Params
from fastattn.spec import AttentionSpec, accumulate_dtype
from fastattn.strides import dense_last, output_like, resolved

try:
    from fastattn import _C  # type: ignore[attr-defined]

    _missing: str | None = None
except ImportError as error:
    _C = None
    _missing = f"the native core fastattn._C is not there ({error})"

name = "cpu"

# torch >= 2.10 tells C code where a tensor lies; for others every call takes the full path, with views.
_exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
reads_tensors = _C is not None and _exchange is not None and _C.read_tensors_of(torch.Tensor, _exchange)


def are_plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels can run a dense call on these as they are.

    That is, CPU tensors and no subclass, of one dtype, with shapes that fit, not empty, the last dimension
    dense.
    """
    return reads_tensors and available() and _C.are_plain(q, k, v)


def is_lse_of(lse: Any, q: Tensor) -> bool:
    """Whether lse needs no check: a plain CPU tensor of the dtype and shape that a call with q returns."""
    return reads_tensors and _C.is_lse_of(lse, q)


def available() -> bool:
    """Whether the native core is built."""
    return _C is not None


def supports(spec: AttentionSpec) -> str | None:
    """None, or every reason why this backend cannot run the call.

    Raises:
        ValueError: FASTATTN_CPU_ISA names no instruction set, or one that this processor lacks.
    """
    if _C is not None and not torch.compiler.is_compiling():
        _C.info()
    reasons = []
    if _missing is not None:
        reasons.append(_missing)
    if spec.device != "cpu":
        reasons.append(f"it runs on cpu tensors, not {spec.device}")
    if spec.paged and spec.needs_grad:
        reasons.append("paged caches have no backward pass")
    return "; ".join(reasons) or None


def weights_like(q: Tensor, k: Tensor, average: bool) -> Tensor:
    """Uninitialised weights: [B, Hq, Lq, Lk], or [B, 1, Lq, Lk] for their average over the heads."""
    shape = (q.shape[0], 1 if average else q.shape[1], q.shape[2], k.shape[2])
    return q.new_empty(shape, dtype=accumulate_dtype(q.dtype))


def small(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    lse: Tensor | None = None,
    options: dict[str, Any] | None = None,
) -> Tensor:
    """out of a dense call that `are_plain` takes and of which `options`, those of fastattn._C, say all but
    the scale; fills lse."""
    head_dim_v = v.size(3)
    same = head_dim_v == q.size(3) and q.is_contiguous()
    out = torch.empty_like(q) if same else output_like(q, head_dim_v)
    threads = torch.get_num_threads()
    _C.attention_fwd(DTYPE_CODES[q.dtype], q, k, v, out, lse, scale, threads, options)
    return out


def small_backward(
    scale: float, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of a call of `small`."""
    if dout.dtype is not q.dtype:
        dout = dout.to(q.dtype)
    q, k, v, out, dout = (dense_last(t) for t in (q, k, v, out, dout))
    dq, dk, dv = (torch.empty_like(t) if t.is_contiguous() else output_like(t, t.shape[3]) for t in (q, k, v))
    code, threads = DTYPE_CODES[q.dtype], torch.get_num_threads()
    _C.attention_bwd(code, q, k, v, out, lse, dout, None, dq, dk, dv, scale, threads, None)
    return dq, dk, dv


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Operands,
    params: Params,
    need_lse: bool = True,
    weights: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """out and lse of a lowered call.

    Args:
        q, k, v: as in fastattn.call.Call.
        operands, params: see fastattn.lowering.
        need_lse: whether lse is wanted.
        weights: from `weights_like`; receives the weights after dropout.
        out: where to write it, with a dense last dimension; None: into a new tensor.
    Returns:
        out in q's dtype and stride order; lse float32 (float64 for float64), [B, Hq, Lq] or [Hq, total_q],
        or None.
    Raises:
        ValueError: lengths, offsets or pages that point outside their tensors.
    """
    operands = prepare(q, k, operands, params)
    out = output_like(q, v.shape[-1]) if out is None else out
    lse = lse_like(q) if need_lse else None
    if 0 in q.shape[:-1]:
        return out, lse
    if no_keys(k, v, operands):
        if weights is not None:
            weights.zero_()
        return out.zero_(), empty_lse(lse, operands)
    q, k, v = dense_last(q), dense_last(k), dense_last(v)
    seq = Layout(q, k, operands, params)
    options = seq.options(operands, params)
    if weights is not None:
        options = {**(options or {}), "weights": (view(weights), weights.shape[1] < q.shape[1])}
    _C.attention_fwd(
        DTYPE_CODES[q.dtype],
        seq.query(q),
        seq.key(k),
        seq.key(v),
        seq.query(out),
        None if lse is None else seq.rows(lse),
        params.scale,
        torch.get_num_threads(),
        options,
    )
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
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients (dq, dk, dv, dbias, ddiag, dsinks, dscore_weights) of a lowered call; of the last four those
    that are needed.

    Args:
        q, k, v, out, lse: inputs and results of `forward`.
        dout, dlse: gradients of out and lse; dlse may be None.
        needs: seven flags, of which the last four are read: q, k and v always get theirs.
        into: where to write dq, dk and dv: in the shapes of q, k and v, with a dense last dimension.
    Raises:
        ValueError: as `forward`.
    """
    operands = prepare(q, k, operands, params)
    dout = dout.to(q.dtype)  # whatever autocast made of it: the kernels read bare memory
    dlse = None if dlse is None else resolved(dlse)
    dq, dk, dv = (output_like(t, t.shape[-1]) for t in (q, k, v)) if into is None else into
    extra = extra_gradients(operands, needs)
    if 0 in q.shape[:-1] or no_keys(k, v, operands):
        for grad in (dq, dk, dv):
            grad.zero_()
        return dq, dk, dv, *finish_gradients(extra, operands, dlse)
    q, k, v, out, dout = (dense_last(t) for t in (q, k, v, out, dout))
    lse = resolved(lse)
    seq = Layout(q, k, operands, params)
    if operands.seqlens_k is not None:  # no kernel visits the keys beyond an entry's length
        dk.zero_()
        dv.zero_()
    options = seq.options(operands, params) or {}
    options.update(seq.gradient_views(extra))
    _C.attention_bwd(
        DTYPE_CODES[q.dtype],
        seq.query(q),
        seq.key(k),
        seq.key(v),
        seq.query(out),
        seq.rows(lse),
        seq.query(dout),
        None if dlse is None else seq.rows(dlse),
        seq.query(dq),
        seq.key(dk),
        seq.key(dv),
        params.scale,
        torch.get_num_threads(),
        options or None,
    )
    return dq, dk, dv, *finish_gradients(extra, operands, None)


def hard_index(q: Tensor, k: Tensor, operands: Operands, params: Params) -> Tensor:
    """The key that each row of a lowered call attends to, int64 [B, Hq, Lq], -1 where it sees none.

    Args:
        q, k, operands, params: as in `forward`, of a dense call. operands.seed: draw from the softmax with
            it; None: take the largest score.
    """
    seed = None if operands.seed is None else resolved(operands.seed)
    operands = prepare(q, k, operands._replace(seed=None), params)
    q, k = dense_last(q), dense_last(k)
    seq = Layout(q, k, operands, params)
    index = torch.empty(q.shape[:3], dtype=torch.int64)
    options = seq.options(operands, params)
    threads = torch.get_num_threads()
    _C.hard_fwd(
        DTYPE_CODES[q.dtype],
        seq.query(q),
        seq.key(k),
        view(index),
        None if seed is None else view(seed),
        params.scale,
        threads,
        options,
    )
    return index

"""The C++ kernels on CPU tensors: allocate, describe the tensors as views, call fastattn._C."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.lowering import BLOCK_FIELDS, DIFFERENTIABLE, NO_OPERANDS, Operands, Params
from fastattn.spec import SCORES, AttentionSpec
from fastattn.strides import dense_last, output_like, resolved
from fastattn.validation import check_cache_values, check_cu_seqlens_values

try:
    from fastattn import _C  # type: ignore[attr-defined]

    _missing: str | None = None
except ImportError as error:
    _C = None
    _missing = f"the native core fastattn._C is not there ({error})"

name = "cpu"

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

# (data pointer, shape, strides), as fastattn._C reads a tensor
View = tuple[int, Sequence[int], Sequence[int]]
# (dtype code, q, k, v)
Views = tuple[int, View, View, View]


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


def lse_like(q: Tensor) -> Tensor:
    """Uninitialised lse: [B, Hq, Lq], or [Hq, total_q] of a packed q."""
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else q.shape[:3]
    if q.dtype is torch.float32 or q.dtype is torch.float64:
        return q.new_empty(shape)
    return q.new_empty(shape, dtype=torch.float32)


def weights_like(q: Tensor, k: Tensor, average: bool) -> Tensor:
    """Uninitialised weights: [B, Hq, Lq, Lk], or [B, 1, Lq, Lk] for their average over the heads."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((q.shape[0], 1 if average else q.shape[1], q.shape[2], k.shape[2]), dtype=dtype)


def small(
    q: Tensor, views: Views, scale: float, lse: Tensor | None = None, options: dict[str, Any] | None = None
) -> Tensor:
    """out of a dense call that `views` and fastattn._C's `options` say all about but the scale; fills lse."""
    code, view_q, view_k, view_v = views
    _, shape, strides = view_q
    if view_v[1][3] == shape[3] and q.is_contiguous():
        out = torch.empty_like(q)
        view_out = (out.data_ptr(), shape, strides)
    else:
        out = output_like(q, view_v[1][3])
        view_out = (out.data_ptr(), out.shape, out.stride())
    view_lse = None if lse is None else view(lse)
    threads = torch.get_num_threads()
    _C.attention_fwd(code, view_q, view_k, view_v, view_out, view_lse, scale, threads, options)
    return out


def small_backward(
    scale: float, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of a call of `small`."""
    if dout.dtype is not q.dtype:
        dout = dout.to(q.dtype)
    q, k, v, out, dout = (dense_last(t) for t in (q, k, v, out, dout))
    grads = [torch.empty_like(t) if t.is_contiguous() else output_like(t, t.shape[3]) for t in (q, k, v)]
    code, threads = DTYPE_CODES[q.dtype], torch.get_num_threads()
    views = [rows_view(t) for t in (q, k, v, out)]
    views_out = [rows_view(t) for t in grads]
    _C.attention_bwd(code, *views, view(lse), rows_view(dout), None, *views_out, scale, threads, None)
    return grads[0], grads[1], grads[2]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Operands,
    params: Params,
    need_lse: bool = True,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """out and lse of a lowered call.

    Args:
        q, k, v: as in fastattn.call.Call.
        operands, params: see fastattn.lowering.
        need_lse: whether lse is wanted.
        weights: from `weights_like`; receives the weights after dropout.
    Returns:
        out in q's dtype and stride order; lse float32 (float64 for float64), [B, Hq, Lq] or [Hq, total_q],
        or None.
    Raises:
        ValueError: lengths, offsets or pages that point outside their tensors.
    """
    operands = _prepare(q, k, operands, params)
    out = output_like(q, v.shape[-1])
    lse = lse_like(q) if need_lse else None
    if 0 in q.shape[:-1]:
        return out, lse
    if _no_keys(k, v, operands):
        if weights is not None:
            weights.zero_()
        return out.zero_(), _empty_lse(lse, operands)
    q, k, v = dense_last(q), dense_last(k), dense_last(v)
    seq = _Layout(q, k, operands, params)
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
    operands = _prepare(q, k, operands, params)
    dout = dout.to(q.dtype)  # whatever autocast made of it: the kernels read bare memory
    dlse = None if dlse is None else resolved(dlse)
    dq, dk, dv = (output_like(t, t.shape[-1]) for t in (q, k, v)) if into is None else into
    extra = _extra_gradients(operands, needs)
    if 0 in q.shape[:-1] or _no_keys(k, v, operands):
        for grad in (dq, dk, dv):
            grad.zero_()
        return dq, dk, dv, *_finish(extra, operands, dlse)
    q, k, v, out, dout = (dense_last(t) for t in (q, k, v, out, dout))
    lse = resolved(lse)
    seq = _Layout(q, k, operands, params)
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
    return dq, dk, dv, *_finish(extra, operands, None)


def hard_index(q: Tensor, k: Tensor, operands: Operands, params: Params) -> Tensor:
    """The key that each row of a lowered call attends to, int64 [B, Hq, Lq], -1 where it sees none.

    Args:
        q, k, operands, params: as in `forward`, of a dense call. operands.seed: draw from the softmax with
            it; None: take the largest score.
    """
    seed = None if operands.seed is None else view(resolved(operands.seed))
    operands = _prepare(q, k, operands._replace(seed=None), params)
    q, k = dense_last(q), dense_last(k)
    seq = _Layout(q, k, operands, params)
    index = torch.empty(q.shape[:3], dtype=torch.int64)
    options = seq.options(operands, params)
    threads = torch.get_num_threads()
    _C.hard_fwd(
        DTYPE_CODES[q.dtype], seq.query(q), seq.key(k), view(index), seed, params.scale, threads, options
    )
    return index


def _prepare(q: Tensor, k: Tensor, operands: Operands, params: Params) -> Operands:
    """The operands as the kernels may read them.

    The last Python on every route, so the only place that sees the values a trace or a transform hides.
    """
    if operands is NO_OPERANDS:
        return operands
    operands = Operands(*[None if t is None else resolved(t) for t in operands])
    if params.checked:
        return operands
    if operands.cu_seqlens_q is not None:
        check_cu_seqlens_values("cu_seqlens_q", operands.cu_seqlens_q, q.shape[0], params.max_seqlen_q, "q")
        check_cu_seqlens_values("cu_seqlens_k", operands.cu_seqlens_k, k.shape[0], params.max_seqlen_k, "k")
    if operands.seqlens_k is not None:
        table = operands.block_table
        capacity = k.shape[2] * (1 if table is None else table.shape[1])
        check_cache_values(operands.seqlens_k, table, capacity, k.shape)
    return operands


def _no_keys(k: Tensor, v: Tensor, operands: Operands) -> bool:
    table = operands.block_table
    return k.numel() == 0 or v.numel() == 0 or (table is not None and table.numel() == 0)


def _empty_lse(lse: Tensor | None, operands: Operands) -> Tensor | None:
    """lse of rows that see nothing: the sink where there is one, else -inf."""
    if lse is None:
        return None
    lse.fill_(-torch.inf)
    if operands.sinks is not None:
        heads = operands.sinks[:, None]
        lse.copy_((heads if lse.dim() == 2 else heads[None]).expand_as(lse))
    return lse


def _extra_gradients(operands: Operands, needs: Sequence[bool]) -> list[Tensor | None]:
    """Zeros for the gradients of the differentiable operands, in the accumulate dtype, where asked."""
    grads: list[Tensor | None] = []
    for tensor, need in zip(operands[:DIFFERENTIABLE], needs[3:], strict=True):
        if tensor is None or not need:
            grads.append(None)
        else:
            dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            grads.append(torch.zeros(tensor.shape, dtype=dtype))
    return grads


def _finish(extra: list[Tensor | None], operands: Operands, dlse: Tensor | None) -> list[Tensor | None]:
    """Gradients in their tensors' dtypes; where no kernel ran, dlse is what reaches the sinks."""
    dbias, ddiag, dsinks, dscore_weights = extra
    if dbias is not None and operands.bias is not None:
        dbias = dbias.to(operands.bias.dtype)
    if dsinks is not None and dlse is not None:
        dsinks = dlse.sum(1) if dlse.dim() == 2 else dlse.sum((0, 2))
    return [dbias, ddiag, dsinks, dscore_weights]


class _Layout:
    """How one call's tensors look to kernels: a packed tensor is S overlapping views, moved by cu_seqlens."""

    def __init__(self, q: Tensor, k: Tensor, operands: Operands, params: Params) -> None:
        self.packed = operands.cu_seqlens_q is not None
        self.heads = q.shape[1]
        if operands.cu_seqlens_q is not None:
            self.batch = operands.cu_seqlens_q.shape[0] - 1
            self.seqlen_q, self.seqlen_k = params.max_seqlen_q, params.max_seqlen_k
        else:
            self.batch, self.seqlen_q, self.seqlen_k = q.shape[0], q.shape[2], k.shape[2]
        if operands.block_table is not None:
            self.seqlen_k *= operands.block_table.shape[1]

    def query(self, tensor: Tensor) -> View:
        return self._view(tensor, self.seqlen_q)

    def key(self, tensor: Tensor) -> View:
        return self._view(tensor, self.seqlen_k)

    def _view(self, tensor: Tensor, seqlen: int) -> View:
        if not self.packed:
            return rows_view(tensor)
        _, heads, dim = tensor.shape
        step, head, _ = tensor.stride()
        return tensor.data_ptr(), (self.batch, heads, seqlen, dim), (0, head, step, 1)

    def rows(self, lse: Tensor) -> View:
        if not self.packed:
            return view(lse)
        head, step = lse.stride()
        return lse.data_ptr(), (self.batch, lse.shape[0], self.seqlen_q), (0, head, step)

    def scores(self, tensor: Tensor) -> View:
        """A [B, Hq, Lq, Lk] view with stride 0 where the tensor broadcasts."""
        a, b, c, d = tensor.shape
        sa, sb, sc, sd = tensor.stride()
        # What expand() would give, without the tensor.
        strides = (0 if a == 1 else sa, 0 if b == 1 else sb, 0 if c == 1 else sc, 0 if d == 1 else sd)
        return tensor.data_ptr(), (self.batch, self.heads, self.seqlen_q, self.seqlen_k), strides

    def options(self, operands: Operands, params: Params) -> dict[str, Any] | None:
        """The options dict of fastattn._C, or None where there is nothing to say."""
        options: dict[str, Any] = {}
        if params.score != "dot":
            options["score"] = SCORES.index(params.score)
        if params.softcap is not None:
            options["softcap"] = params.softcap
        if params.band is not None:
            options["band"] = params.band
        if params.dropout_p > 0 and operands.seed is not None:
            options["dropout"] = (params.dropout_p, (operands.seed.data_ptr(), (1,), (1,)))
        if operands is not NO_OPERANDS:
            self._masks(operands, options)
            self._tensors(operands, params, options)
        return options or None

    def _masks(self, operands: Operands, options: dict[str, Any]) -> None:
        for key in ("key_starts", "key_ends"):
            bound = getattr(operands, key)
            if bound is not None:
                options[key] = view(bound.expand(self.batch, self.seqlen_q))
        if operands.mask is not None:
            options["mask"] = self.scores(operands.mask)
        if operands.row_ptr is not None and operands.col_ptr is not None:
            pointers = {
                "row_ptr": operands.row_ptr.expand(self.batch, self.heads, -1),
                "col_ptr": operands.col_ptr.expand(self.batch, self.heads, -1),
            }
            options["block_mask"] = tuple(view(pointers.get(f, getattr(operands, f))) for f in BLOCK_FIELDS)

    def _tensors(self, operands: Operands, params: Params, options: dict[str, Any]) -> None:
        if operands.bias is not None:
            options["bias"] = (DTYPE_CODES[operands.bias.dtype], self.scores(operands.bias))
        if operands.diag is not None:
            diag = operands.diag.expand(self.batch, self.heads, -1)
            options["diag"] = (view(diag), params.diag_lo, params.diag_bottom_right)
        if operands.sinks is not None:
            options["sinks"] = view(operands.sinks)
        if operands.score_weights is not None:
            options["score_weights"] = view(operands.score_weights)
        if operands.cu_seqlens_q is not None and operands.cu_seqlens_k is not None:
            options["cu_seqlens"] = (view(operands.cu_seqlens_q), view(operands.cu_seqlens_k))
        if operands.seqlens_k is not None:
            options["seqlens_k"] = view(operands.seqlens_k)
        if operands.block_table is not None:
            options["block_table"] = view(operands.block_table)

    def gradient_views(self, extra: list[Tensor | None]) -> dict[str, Any]:
        """Where the kernels write the gradients of the differentiable operands."""
        dbias, ddiag, dsinks, dscore_weights = extra
        views: dict[str, Any] = {}
        if dbias is not None:
            views["dbias"] = self.scores(dbias)
        if ddiag is not None:
            views["ddiag"] = view(ddiag.expand(self.batch, self.heads, ddiag.shape[2]))
        if dsinks is not None:
            views["dsinks"] = view(dsinks)
        if dscore_weights is not None:
            views["dscore_weights"] = view(dscore_weights)
        return views


def rows_view(tensor: Tensor) -> View:
    """A [B, H, L, D] tensor whose last dimension is dense; one of a single element may carry any stride."""
    strides = tensor.stride()
    return tensor.data_ptr(), tensor.shape, strides if strides[3] == 1 else (*strides[:3], 1)


def view(tensor: Tensor) -> View:
    return tensor.data_ptr(), tensor.shape, tensor.stride()

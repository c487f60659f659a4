"""Tensors as fastattn._C reads them: views, and the options of a call as a dict of views and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.lowering import BLOCK_FIELDS, NO_OPERANDS, Operands, Params
from fastattn.spec import SCORES

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

# (data pointer, shape, strides), as fastattn._C reads a tensor
View = tuple[int, Sequence[int], Sequence[int]]


class Layout:
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
        """[B, Hq, Lq, n] of a tensor with a row for each query."""
        return self._view(tensor, self.seqlen_q)

    def key(self, tensor: Tensor) -> View:
        """[B, Hkv, Lk, n] of a tensor with a row for each key; pages of a paged cache as they are."""
        return self._view(tensor, self.seqlen_k)

    def _view(self, tensor: Tensor, seqlen: int) -> View:
        if not self.packed:
            return rows_view(tensor)
        _, heads, dim = tensor.shape
        step, head, _ = tensor.stride()
        return tensor.data_ptr(), (self.batch, heads, seqlen, dim), (0, head, step, 1)

    def rows(self, lse: Tensor) -> View:
        """[B, Hq, Lq] of lse or its gradient."""
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
    """Any tensor, as it lies in memory."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()

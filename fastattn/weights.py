"""attention_weights: the exact weights of chosen queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.biases import Bias
from fastattn.call import Call
from fastattn.functional import run
from fastattn.lowering import to_4d
from fastattn.masks import Mask, MaskShape, as_mask
from fastattn.masks.space import Pairs
from fastattn.spec import accumulate_dtype, dtype_name
from fastattn.validation import check_tensor, validate

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
    q, k, bias and sinks. Time and memory: chosen rows cost R * Lk each; chosen columns of all rows cost one
    fused pass and Lq * C; all of both cost the whole matrix.

    >>> q = k = torch.eye(2).view(1, 1, 2, 2)
    >>> attention_weights(q, k, rows=[1], mask=torch.tensor([[True, False], [True, True]]), scale=0.0)
    tensor([[[[0.5000, 0.5000]]]])

    Args:
        q: [B, Hq, Lq, D]; k: [B, Hkv, Lk, D].
        rows: the R queries: int tensor [R], sequence of ints, slice, or one int (R = 1); negative ones count
            from the end; None for all.
        cols: the C keys, likewise.
        mask, bias, scale, softcap, sinks: as in `attention`.
        backend: of the fused pass.
    Returns:
        [B, Hq, R, C], float32 (float64 for float64). A row sums to 1 over all keys, to less where there are
        sinks, and to 0 where it has no visible key.
    Raises:
        TypeError, ValueError: naming the argument, the rule and the value got.
    """
    v = k.new_zeros(*k.shape[:-1], 1) if isinstance(k, Tensor) and k.dim() > 0 else k
    call = Call("attention", q, k, v, mask, bias, scale, softcap, sinks, return_lse=True, backend=backend)
    validate(call)
    at_rows = _index("rows", rows, q.shape[2], q.device)
    at_cols = _index("cols", cols, k.shape[2], q.device)
    shape = call.mask_shape()
    if at_rows is None and at_cols is not None:
        _, lse = run(call)
        pairs = _Pairs(call, shape, None, at_cols)
        return pairs.weights(lse)
    # Few rows, or the whole matrix: their softmax is at hand.
    pairs = _Pairs(call, shape, at_rows, None)
    p = reference._probabilities(
        pairs.q, pairs.k, pairs.visible(), pairs.bias(), call.scale_value(), call.softcap, call.sinks
    )[0].to(pairs.dtype)
    return p if at_cols is None else p.index_select(3, at_cols)


class _Pairs:
    """The chosen rows and columns of one call."""

    def __init__(self, call: Call, shape: MaskShape, rows: Tensor | None, cols: Tensor | None) -> None:
        self.call, self.shape = call, shape
        self.rows, self.cols = rows, cols
        self.dtype = accumulate_dtype(call.q.dtype)
        q, k = call.q.to(self.dtype), call.k.to(self.dtype)
        self.q = q if rows is None else q.index_select(2, rows)
        self.k = k if cols is None else k.index_select(2, cols)

    def indices(self) -> tuple[Tensor, Tensor]:
        device = self.call.q.device
        i = torch.arange(self.shape.seqlen_q, device=device) if self.rows is None else self.rows
        j = torch.arange(self.shape.seqlen_k, device=device) if self.cols is None else self.cols
        return i, j

    def visible(self) -> Tensor:
        """Which pairs the mask shows: bool, broadcastable to [B, Hq, R, C]."""
        device = self.call.q.device
        i, j = self.indices()
        if self.call.mask is None:
            return torch.ones(1, 1, i.shape[0], j.shape[0], dtype=torch.bool, device=device)
        mask = as_mask(self.call.mask)
        mask._check(self.shape, device)
        b = torch.arange(self.shape.batch, device=device).view(-1, 1, 1, 1)
        h = torch.arange(self.shape.heads, device=device).view(1, -1, 1, 1)
        return mask._visible(Pairs(self.shape, b, h, i.view(1, 1, -1, 1), j.view(1, 1, 1, -1)))

    def bias(self) -> Tensor | None:
        """The bias of the pairs, broadcastable to [B, Hq, R, C]."""
        bias = self.call.bias
        if bias is None:
            return None
        if isinstance(bias, Tensor):
            bias = to_4d(bias)
            if self.rows is not None and bias.shape[2] != 1:
                bias = bias.index_select(2, self.rows)
            if self.cols is not None and bias.shape[3] != 1:
                bias = bias.index_select(3, self.cols)
            return bias
        i, j = self.indices()
        offset = 0 if bias.align == "top_left" else self.shape.seqlen_k - self.shape.seqlen_q
        return bias.values(j - i[:, None] - offset, self.dtype)

    def weights(self, lse: Tensor) -> Tensor:
        """exp(s - lse), 0 where a pair is not visible."""
        call, visible, bias = self.call, self.visible(), self.bias()
        if bias is not None:
            visible = visible & (bias != -torch.inf)
        groups = call.num_heads() // max(call.num_heads_kv(), 1)
        shape = (*self.q.shape[:3], self.k.shape[2])
        visible = visible.expand(shape)
        s = call.scale_value() * reference._Scores.apply(self.q, self.k.repeat_interleave(groups, 1), visible)
        if call.softcap is not None:
            s = call.softcap * torch.tanh(s / call.softcap)
        if bias is not None:
            s = s + bias
        # Selected before exp, so that what is invisible has gradient 0 and not 0 * inf.
        return torch.where(visible, s - lse.unsqueeze(-1), -torch.inf).exp()


def _index(name: str, value: Any, size: int, device: torch.device) -> Tensor | None:
    """The chosen positions as int64 [n], counted from the start."""
    if value is None:
        return None
    if isinstance(value, slice):
        return torch.arange(size, device=device)[value]
    if isinstance(value, Tensor):
        check_tensor(name, value, device)
        if value.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} must be int64 or int32, got {dtype_name(value.dtype)}")
        if value.dim() != 1:
            raise ValueError(f"{name} must be 1-D, got shape {tuple(value.shape)}")
        index = value.long()
    else:
        items = [value] if isinstance(value, int) else list(value)
        if not all(type(item) is int for item in items):
            raise TypeError(f"{name} must hold ints, got {value!r}")
        index = torch.tensor(items, dtype=torch.int64, device=device)
    if not torch.compiler.is_compiling() and index.is_cpu and type(index) is Tensor and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < -size or high >= size:
            raise ValueError(
                f"{name} must be between {-size} and {size - 1}, got {low if low < -size else high}"
            )
    return torch.where(index < 0, index + size, index)

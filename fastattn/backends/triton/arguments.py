"""What the kernels are given: tensors by address and strides, grouped by what they say.

A field that is None is known when a kernel is compiled, so an option that a call does not use costs nothing.
Tensors and numbers come before tuples: a kernel that may return early forgets, up to Triton 3.6, which fields
of a tuple were known, None or 1, where a tensor or a number follows that tuple in another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fastattn.lowering import NO_OPERANDS, Operands, Params

LOG2E = 1.4426950408889634
UNBOUNDED = 2**30  # beyond any position, and twice of it still an int32


class Rows(NamedTuple):
    """[batch, head, row, column] with contiguous columns; strides in elements."""

    ptr: Any
    batch: int
    head: int
    row: int


class Pairs(NamedTuple):
    """[B, Hq, Lq, Lk] in any layout; a stride of 0 broadcasts."""

    ptr: Any
    batch: int
    head: int
    row: int
    col: int


class Lengths(NamedTuple):
    """Where each batch entry's rows lie."""

    batch: int
    num_heads: int
    num_heads_kv: int
    seqlen_q: int  # maxima, or what all entries share
    seqlen_k: int
    total_q: int  # rows of packed tensors
    total_k: int
    cu_seqlens_q: Any  # int32 [B + 1] or None
    cu_seqlens_k: Any
    seqlens_k: Any  # int32 [B] or None
    block_table: Any  # int32 [B, max_pages] or None
    table_row: int
    page_size: int
    num_pages: int


class Bounds(NamedTuple):
    """i + lo <= j <= i + hi, counted from the top-left corner and from the bottom-right one."""

    lo_top: int | None
    hi_top: int | None
    lo_bottom: int | None
    hi_bottom: int | None


NO_BOUNDS = Bounds(None, None, None, None)


class Blocks(NamedTuple):
    """A fastattn.block_mask.BlockMask."""

    row_ptr: Any
    row_batch: int
    row_head: int
    row_tiles: Any
    row_bits: Any
    col_ptr: Any
    col_batch: int
    col_head: int
    col_tiles: Any
    col_bits: Any
    bits: Any


class Diagonals(NamedTuple):
    """The bias of relative position r = j - i - offset, at r - first."""

    ptr: Any
    batch: int
    head: int
    first: int
    bottom_right: int  # whether offset is len_k - len_q: 1, or 0


class Dropout(NamedTuple):
    seed: Any  # int64, one element
    threshold: int  # a word below it is dropped
    scale: float  # of what is kept


class Parts(NamedTuple):
    """Where programs that have a part of the keys each leave what they found, in float32.

    Of part s what lies `s` strides further: out is not yet divided by l; m is in the unit of the scores.
    """

    num_parts: int
    out_stride: int
    row_stride: int
    out: Rows
    m: Rows
    l: Rows


class Rules(NamedTuple):
    """What lies between q·k and softmax. Scores are in units of log 2 where nothing is added to them, so that
    one factor makes exp2's argument of a product, and natural otherwise; see is_natural."""

    scale: float  # of q·k, inside the tanh of softcap
    softcap: float | None  # of that tanh
    bounds: Bounds
    key_starts: Rows | None  # int32 [B, Lq] by batch and row
    key_ends: Rows | None
    mask: Pairs | None
    blocks: Blocks | None
    bias: Pairs | None
    diag: Diagonals | None
    dropout: Dropout | None


def rows(tensor: Tensor) -> Rows:
    """A [B, H, L, D] tensor, or a packed [tokens, H, D] one, with a contiguous last dimension."""
    stride = tensor.stride()
    if tensor.dim() == 3:
        return Rows(tensor, 0, stride[1], stride[0])
    return Rows(tensor, *stride[:3])


def per_row(tensor: Tensor) -> Rows:
    """[B, H, L], or packed [H, tokens]: one number for each row."""
    stride = tensor.stride()
    return Rows(tensor, 0, *stride) if tensor.dim() == 2 else Rows(tensor, *stride)


def parts(out: Tensor, m: Tensor, l: Tensor) -> Parts:
    """Tensors like out and lse, with a first dimension for the parts."""
    return Parts(
        out.shape[0],
        out.stride(0),
        m.stride(0),
        rows(out[0])._replace(ptr=out),
        per_row(m[0])._replace(ptr=m),
        per_row(l[0])._replace(ptr=l),
    )


def pairs(tensor: Tensor) -> Pairs:
    """A 4-D tensor that broadcasts to [B, Hq, Lq, Lk]."""
    strides = (0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return Pairs(tensor, *strides)


def lengths(q: Tensor, k: Tensor, operands: Operands, params: Params) -> Lengths:
    table = operands.block_table
    packed = operands.cu_seqlens_q is not None
    if operands.cu_seqlens_q is not None:
        batch, seqlen_q, seqlen_k = (
            operands.cu_seqlens_q.shape[0] - 1,
            params.max_seqlen_q,
            params.max_seqlen_k,
        )
    else:
        batch, seqlen_q = q.shape[0], q.shape[2]
        seqlen_k = k.shape[2] * (1 if table is None else table.shape[1])
    return Lengths(
        batch,
        q.shape[1],
        k.shape[1],
        seqlen_q,
        seqlen_k,
        total_q=q.shape[0] if packed else 0,
        total_k=k.shape[0] if packed else 0,
        cu_seqlens_q=operands.cu_seqlens_q,
        cu_seqlens_k=operands.cu_seqlens_k,
        seqlens_k=operands.seqlens_k,
        block_table=table,
        table_row=0 if table is None else table.stride(0),
        page_size=0 if table is None else k.shape[2],
        num_pages=0 if table is None else k.shape[0],
    )


def is_natural(q: Tensor, operands: Operands) -> bool:
    """Whether scores are in natural units: where something is added to them, and in float32, whose last bit
    the rounding of that one factor would show."""
    return q.element_size() == 4 or any(t is not None for t in (operands.bias, operands.diag, operands.sinks))


def rules(operands: Operands, params: Params, natural: bool) -> Rules:
    unit = 1.0 if natural else LOG2E
    scale, softcap = params.scale * unit, None
    if params.softcap is not None:
        scale, softcap = params.scale / params.softcap, params.softcap * unit
    bounds = NO_BOUNDS
    if params.band is not None:
        bounds = Bounds(*(None if x is None else max(-UNBOUNDED, min(UNBOUNDED, x)) for x in params.band))
    if operands is NO_OPERANDS:
        return Rules(scale, softcap, bounds, None, None, None, None, None, None, None)
    dropout = None
    if params.dropout_p > 0 and operands.seed is not None:
        p = params.dropout_p
        dropout = Dropout(operands.seed, int(p * 2**32), 1 / (1 - p))
    return Rules(
        scale,
        softcap,
        bounds,
        _key_bound(operands.key_starts),
        _key_bound(operands.key_ends),
        None if operands.mask is None else pairs(operands.mask),
        _blocks(operands),
        None if operands.bias is None else pairs(operands.bias),
        _diagonals(operands, params),
        dropout,
    )


def _key_bound(bound: Tensor | None) -> Rows | None:
    """[B or 1, Lq or 1]."""
    if bound is None:
        return None
    batch, row = (0 if size == 1 else s for size, s in zip(bound.shape, bound.stride(), strict=True))
    return Rows(bound, batch, 0, row)


def _blocks(operands: Operands) -> Blocks | None:
    row_ptr, col_ptr = operands.row_ptr, operands.col_ptr
    if row_ptr is None or col_ptr is None:
        return None
    return Blocks(
        row_ptr,
        *_broadcast(row_ptr),
        operands.row_tiles,
        operands.row_bits,
        col_ptr,
        *_broadcast(col_ptr),
        operands.col_tiles,
        operands.col_bits,
        operands.bits,
    )


def _diagonals(operands: Operands, params: Params) -> Diagonals | None:
    diag = operands.diag
    if diag is None:
        return None
    return Diagonals(diag, *_broadcast(diag), params.diag_lo, int(params.diag_bottom_right))


def _broadcast(tensor: Tensor) -> tuple[int, int]:
    """(batch stride, head stride), 0 where the dimension is 1."""
    batch, head = (0 if tensor.shape[dim] == 1 else tensor.stride(dim) for dim in (0, 1))
    return batch, head

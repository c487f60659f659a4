"""The rules on a lowered call, for graphs: a trace keeps no checks, and may run on other tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastattn.backends import cpu
from fastattn.backends.common import lse_shape
from fastattn.block_mask import TILE
from fastattn.call import Call
from fastattn.lowering import Operands, Params, diagonal_range
from fastattn.spec import FLOAT_DTYPES, accumulate_dtype, dtype_name
from fastattn.validation import check_broadcast, validate


def check(backend: str, q: Tensor, k: Tensor, v: Tensor, operands: Operands, params: Params) -> None:
    """That kernels stay within the memory of the tensors that a graph gives them.

    Lists of tiles say no more of the lengths that they are for than how many tiles those have.

    Args:
        backend: whose kernels run.
        q, k, v, operands, params: see fastattn.lowering; the contents of index tensors are checked later, by
            the backend.
    Raises:
        TypeError, ValueError: naming the argument, the rule and the value got.
    """
    if backend == cpu.name and not q.is_cpu:
        raise ValueError(f"q must be on cpu, where its graph was recorded, got {q.device}")
    if _are_dense(q, k, v) and all(operand is None for operand in operands):
        return  # what `validate` would find, in a small part of its time
    op = "attention"
    if operands.cu_seqlens_q is not None:
        op = "varlen"
    elif operands.seqlens_k is not None:
        op = "decode"
    call = Call(
        op,
        q,
        k,
        v,
        mask=operands.mask,
        bias=operands.bias,
        scale=params.scale,
        softcap=params.softcap,
        sinks=operands.sinks,
        dropout_p=params.dropout_p,
        dropout_seed=operands.seed,
        cu_seqlens_q=operands.cu_seqlens_q,
        cu_seqlens_k=operands.cu_seqlens_k,
        max_seqlen_q=params.max_seqlen_q,
        max_seqlen_k=params.max_seqlen_k,
        lengths=operands.seqlens_k,
        block_table=operands.block_table,
        score=params.score,
        score_weights=operands.score_weights,
    )
    validate(call)
    _check_lowered(call, operands, params)


def check_results(
    q: Tensor, v: Tensor, lse: Tensor | None, dlse: Tensor | None, outs: Iterable[tuple[str, Tensor]] = ()
) -> None:
    """That results of a call, and gradients of them, are of the size that its backward pass reads.

    Args:
        q, v: of the call, which `check` has seen.
        outs: by name, what is like out.
    Raises:
        ValueError: naming the argument, the rule and the value got.
    """
    for name, rows in (("lse", lse), ("dlse", dlse)):
        if rows is not None:
            check_size(name, rows, lse_shape(q), accumulate_dtype(q.dtype), q)
    for name, out in outs:
        check_size(name, out, (*q.shape[:-1], v.shape[-1]), q.dtype, q)


def check_size(name: str, tensor: Tensor, shape: Iterable[int], dtype: torch.dtype, q: Tensor) -> None:
    """Raise ValueError unless a tensor has that shape, that dtype and q's device."""
    wanted, got = (list(shape), dtype, q.device), (list(tensor.shape), tensor.dtype, tensor.device)
    if wanted != got:
        raise ValueError(f"{name} must be {_described(*wanted)}, got {_described(*got)}")


def _described(shape: list[int], dtype: torch.dtype, device: torch.device) -> str:
    return f"{dtype_name(dtype)} {shape} on {device}"


def _are_dense(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q, k and v are those of a dense call that breaks no rule."""
    shape_q, shape_k, shape_v = q.shape, k.shape, v.shape
    return (
        len(shape_q) == len(shape_k) == len(shape_v) == 4
        and shape_q[0] == shape_k[0]
        and shape_q[3] == shape_k[3]
        and shape_k[:3] == shape_v[:3]
        and shape_k[1] > 0
        and shape_q[1] % shape_k[1] == 0
        and q.dtype in FLOAT_DTYPES
        and q.dtype == k.dtype == v.dtype
        and q.device == k.device == v.device
    )


def _check_lowered(call: Call, operands: Operands, params: Params) -> None:
    """The rules on what masks and biases have become."""
    batch, heads, (seqlen_q, seqlen_k) = call.batch(), call.num_heads(), call.seqlens()
    for bounds in (operands.key_starts, operands.key_ends):
        if bounds is not None:
            check_broadcast("mask's key ranges", bounds, (batch, seqlen_q))
    for pointers, seqlen in ((operands.row_ptr, seqlen_q), (operands.col_ptr, seqlen_k)):
        if pointers is not None:
            tiles = -(-seqlen // TILE)
            check_broadcast("mask's block lists", pointers[..., :-1], (batch, heads, tiles))
            if pointers.shape[-1] != tiles + 1:
                raise ValueError(
                    f"mask must be built for {tiles} tiles of {TILE}, which length {seqlen} has, "
                    f"got lists of {pointers.shape[-1] - 1}"
                )
    if operands.diag is not None:
        check_broadcast("bias's diagonals", operands.diag[..., :1], (batch, heads, 1))
        lo, hi = diagonal_range(seqlen_q, seqlen_k, params.diag_bottom_right)
        got = params.diag_lo, params.diag_lo + operands.diag.shape[-1] - 1
        if got[0] > lo or got[1] < hi:
            raise ValueError(f"bias must be for positions {lo} to {hi}, got {got[0]} to {got[1]}")

"""What every backend with kernels of its own does around them, on any device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.lowering import DIFFERENTIABLE, NO_OPERANDS, Operands, Params
from fastattn.spec import accumulate_dtype
from fastattn.strides import output_like, resolved
from fastattn.validation import check_cache_values, check_cu_seqlens_values


def prepare(q: Tensor, k: Tensor, operands: Operands, params: Params) -> Operands:
    """The operands as kernels may read them: memory that holds its values, index tensors that are right.

    The last Python on every route, so the only place that sees the values a trace or a transform hides. On a
    GPU, where looking at them would wait for it, kernels stay within bounds by themselves.

    Raises:
        ValueError: on CPU, lengths, offsets or pages that point outside their tensors.
    """
    if operands is NO_OPERANDS:
        return operands
    operands = Operands(*[None if t is None else resolved(t) for t in operands])
    if params.checked or not q.is_cpu:
        return operands
    if operands.cu_seqlens_q is not None:
        check_cu_seqlens_values("cu_seqlens_q", operands.cu_seqlens_q, q.shape[0], params.max_seqlen_q, "q")
        check_cu_seqlens_values("cu_seqlens_k", operands.cu_seqlens_k, k.shape[0], params.max_seqlen_k, "k")
    if operands.seqlens_k is not None:
        table = operands.block_table
        capacity = k.shape[2] * (1 if table is None else table.shape[1])
        check_cache_values(operands.seqlens_k, table, capacity, k.shape)
    return operands


def lse_shape(q: Tensor) -> tuple[int, ...]:
    """[B, Hq, Lq], or [Hq, total_q] of a packed q."""
    return (q.shape[1], q.shape[0]) if q.dim() == 3 else q.shape[:3]


def lse_like(q: Tensor) -> Tensor:
    """Uninitialised lse."""
    shape = lse_shape(q)
    if q.dtype is torch.float32 or q.dtype is torch.float64:
        return q.new_empty(*shape)  # numbers of their own: a torch.Size takes twice as long
    return q.new_empty(*shape, dtype=torch.float32)


def no_keys(k: Tensor, v: Tensor, operands: Operands) -> bool:
    """Whether the shapes alone say that no row sees anything."""
    table = operands.block_table
    return k.numel() == 0 or v.numel() == 0 or (table is not None and table.numel() == 0)


def empty_lse(lse: Tensor | None, operands: Operands) -> Tensor | None:
    """lse of rows that see nothing, written into it: the sink where there is one, else -inf."""
    if lse is None:
        return None
    lse.fill_(-torch.inf)
    if operands.sinks is not None:
        heads = operands.sinks[:, None]
        lse.copy_((heads if lse.dim() == 2 else heads[None]).expand_as(lse))
    return lse


def filled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Operands,
    params: Params,
    need_lse: bool,
    fill: Callable[[Operands, Tensor, Tensor | None], None],
) -> tuple[Tensor, Tensor | None]:
    """out and lse of a lowered call, which `fill(operands, out, lse)` writes where any row can see a key."""
    out = output_like(q, v.shape[-1])
    lse = lse_like(q) if need_lse else None
    if 0 in q.shape[:-1]:
        return out, lse
    operands = prepare(q, k, operands, params)
    if no_keys(k, v, operands):
        return out.zero_(), empty_lse(lse, operands)
    fill(operands, out, lse)
    return out, lse


def extra_gradients(operands: Operands, needs: Sequence[bool]) -> list[Tensor | None]:
    """Zeros for the gradients of the differentiable operands, in the accumulate dtype, where asked.

    Args:
        needs: a flag for each of q, k and v, which are not read, and for each differentiable operand.
    """
    grads: list[Tensor | None] = []
    for tensor, need in zip(operands[:DIFFERENTIABLE], needs[3:], strict=True):
        if tensor is None or not need:
            grads.append(None)
        else:
            dtype = accumulate_dtype(tensor.dtype)
            grads.append(torch.zeros(tensor.shape, dtype=dtype, device=tensor.device))
    return grads


def finish_gradients(
    extra: list[Tensor | None], operands: Operands, dlse: Tensor | None
) -> list[Tensor | None]:
    """`extra_gradients` in their tensors' dtypes; where no kernel ran, dlse is what reaches the sinks."""
    dbias, ddiag, dsinks, dscore_weights = extra
    if dbias is not None and operands.bias is not None:
        dbias = dbias.to(operands.bias.dtype)
    if dsinks is not None and dlse is not None:
        dsinks = dlse.sum(1) if dlse.dim() == 2 else dlse.sum((0, 2))
    return [dbias, ddiag, dsinks, dscore_weights]


FEW_ROWS = 64  # of a head: decoding, and a little more
SHORTEST_PART = 256  # keys; what the parts find is written and read once more


def parts_of(tiles: int, seqlen_q: int, seqlen_k: int, slots: int) -> int:
    """Into how many parts the keys of each row tile are divided: as many as all run at once; 1 undivided.

    Args:
        tiles: row tiles of all heads and entries.
        seqlen_k: keys, or what a cache has room for.
        slots: tiles that the device works on at a time.
    """
    if torch.are_deterministic_algorithms_enabled():
        if seqlen_q > FEW_ROWS:
            return 1
        tiles = 1  # otherwise the bits of an entry would depend on how many there are beside it
    return max(1, min(slots // max(tiles, 1), seqlen_k // SHORTEST_PART))


def device_of(q: Tensor) -> Any:
    """A context in which launches go to q's device: they go to the current one."""
    if q.device.type != "cuda" or q.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(q.device)

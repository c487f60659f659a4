"""The kernels under torch.func transforms: Functions with a separate setup_context, and vmap rules.

A vmapped call is folded into the batch dimension where it can be, and runs example by example otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import ops
from fastattn.autograd import DOUBLE_BACKWARD, FORWARD_MODE, is_traced
from fastattn.lowering import DIFFERENTIABLE, Operands, Params

_COUNT = len(Operands._fields)
_SEED = Operands._fields.index("seed")
_SINKS = Operands._fields.index("sinks")
_WEIGHTS = Operands._fields.index("score_weights")
_DIAG = Operands._fields.index("diag")
_LISTS = [Operands._fields.index(name) for name in ("row_tiles", "row_bits", "col_tiles", "col_bits", "bits")]


def attention(
    kernels: Any, q: Tensor, k: Tensor, v: Tensor, operands: Operands, params: Params
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a lowered call.

    Beneath the transforms the tensors may be traced in their turn, by make_fx for one: then through the ops.
    """
    return _Forward.apply(kernels, params, q, k, v, *operands)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(kernels: Any, params: Params, q: Tensor, k: Tensor, v: Tensor, *operands: Any) -> Any:
        runs = ops.Kernels(kernels.name) if is_traced(q, k, v) else kernels
        return runs.forward(q, k, v, Operands(*operands), params, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.kernels, ctx.params, q, k, v, *operands = inputs
        ctx.save_for_backward(q, k, v, *output, *operands)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> Any:
        q, k, v, out, lse, *operands = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[2 : 5 + DIFFERENTIABLE])
        grads = _Backward.apply(ctx.kernels, ctx.params, needs, q, k, v, out, lse, dout, dlse, *operands)
        return None, None, *grads, *(None,) * (_COUNT - DIFFERENTIABLE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(FORWARD_MODE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], kernels: Any, params: Params, *tensors: Any) -> Any:
        def call(*args: Any) -> tuple[Any, ...]:
            return _Forward.apply(kernels, params, *args)

        return _vmap(call, info.batch_size, in_dims[2:], tensors, params, heads=3, foldable=True)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(kernels: Any, params: Params, needs: Sequence[bool], *tensors: Any) -> Any:
        q, k, v, out, lse, dout, dlse, *operands = tensors
        runs = ops.Kernels(kernels.name) if is_traced(q, k, v) else kernels
        return runs.backward(q, k, v, out, lse, dout, dlse, Operands(*operands), params, needs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(DOUBLE_BACKWARD)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(FORWARD_MODE)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        kernels: Any,
        params: Params,
        needs: Sequence[bool],
        *tensors: Any,
    ) -> Any:
        def call(*args: Any) -> tuple[Any, ...]:
            return _Backward.apply(kernels, params, needs, *args)

        # Gradients of what all examples share are summed over a folded batch, but each example wants its own.
        foldable = not any(needs[3:])
        return _vmap(call, info.batch_size, in_dims[3:], tensors, params, heads=7, foldable=foldable)


def hard_index(kernels: Any, q: Tensor, k: Tensor, operands: Operands, params: Params) -> Tensor:
    """The key that each row of a lowered call attends to; no gradient comes from it."""
    return _HardIndex.apply(kernels, params, q, k, *operands)[0]


class _HardIndex(torch.autograd.Function):
    @staticmethod
    def forward(kernels: Any, params: Params, q: Tensor, k: Tensor, *operands: Any) -> tuple[Tensor]:
        if is_traced(q, k):
            return (ops.hard_index(kernels.name, q, k, Operands(*operands), params),)
        return (kernels.hard_index(q, k, Operands(*operands), params),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, None, None, *(None,) * _COUNT

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return (None,)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], kernels: Any, params: Params, *tensors: Any) -> Any:
        def call(*args: Any) -> tuple[Any, ...]:
            return _HardIndex.apply(kernels, params, *args)

        foldable = tensors[2 + _SEED] is None  # draws go by the batch index
        return _vmap(call, info.batch_size, in_dims[2:], tensors, params, heads=2, foldable=foldable)


def _vmap(
    call: Callable[..., tuple[Any, ...]],
    size: int,
    in_dims: Sequence[int | None],
    tensors: Sequence[Tensor | None],
    params: Params,
    *,
    heads: int,
    foldable: bool,
) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    """Results and their out_dims of `call` over `size` examples; the first `heads` tensors have a batch."""
    operands = Operands(*tensors[heads:])
    operand_dims = in_dims[heads:]
    # Dropout draws by batch index, packed sequences have no batch dimension, sinks and lists of tiles are
    # shared by the whole batch: such calls run one by one.
    foldable = (
        foldable and params.dropout_p == 0 and operands.cu_seqlens_q is None and operands.block_table is None
    )
    foldable = foldable and all(operand_dims[index] is None for index in (_SINKS, _WEIGHTS, _DIAG, *_LISTS))
    if foldable and size > 0:
        batch = _batch_of(tensors[0], in_dims[0])
        unbatched = {heads + index for index in (_SINKS, _WEIGHTS, _SEED, *_LISTS)}
        folded = [
            tensor if index in unbatched else _fold(tensor, dim, size, batch, always=index < heads)
            for index, (tensor, dim) in enumerate(zip(tensors, in_dims, strict=True))
        ]
        results = call(*folded)
        unfolded = tuple(None if r is None else r.unflatten(0, (size, batch)) for r in results)
        return unfolded, tuple(None if r is None else 0 for r in results)
    return _one_by_one(call, size, in_dims, tensors)


def _batch_of(q: Tensor | None, dim: int | None) -> int:
    if q is None:
        raise TypeError("q must be a tensor, got None")
    return q.shape[0] if dim is None else q.movedim(dim, 0).shape[1]


def _fold(tensor: Tensor | None, dim: int | None, size: int, batch: int, *, always: bool) -> Tensor | None:
    """[size, batch or 1, ...] as [size * batch, ...]; a tensor shared by the batch stays as it is."""
    if tensor is None:
        return None
    if dim is None:
        if not always and tensor.shape[0] == 1:
            return tensor
        return tensor.expand(size, *tensor.shape).flatten(0, 1)
    tensor = tensor.movedim(dim, 0)
    if tensor.shape[1] != batch:
        tensor = tensor.expand(size, batch, *tensor.shape[2:])
    return tensor.flatten(0, 1)


def _one_by_one(
    call: Callable[..., tuple[Any, ...]],
    size: int,
    in_dims: Sequence[int | None],
    tensors: Sequence[Tensor | None],
) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    columns = []
    for n in range(max(size, 1)):
        args = [
            t if t is None or dim is None else (t.select(dim, n) if size else t.new_zeros(_without(t, dim)))
            for t, dim in zip(tensors, in_dims, strict=True)
        ]
        columns.append(call(*args))
    results = tuple(
        None if parts[0] is None else torch.stack(parts)[:size] for parts in zip(*columns, strict=True)
    )
    return results, tuple(None if r is None else 0 for r in results)


def _without(tensor: Tensor, dim: int) -> list[int]:
    shape = list(tensor.shape)
    del shape[dim]
    return shape

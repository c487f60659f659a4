"""The kernels under torch.func transforms: Functions with a separate setup_context, and vmap rules.

A vmapped call is folded into the batch dimension where it can be, and runs example by example otherwise.
fastattn.inspect.transforms has the summaries' Functions on the same bases and rule.
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


class NoTangents(torch.autograd.Function):
    """A Function of kernels, which have no forward-mode derivative."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(FORWARD_MODE)


class LastDerivative(NoTangents):
    """The backward pass of such a Function, which has no derivative at all."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(DOUBLE_BACKWARD)


class _Forward(NoTangents):
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
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return vmapped(_Forward, info, in_dims, arguments, settings=2, heads=3)


class _Backward(LastDerivative):
    @staticmethod
    def forward(kernels: Any, params: Params, needs: Sequence[bool], *tensors: Any) -> Any:
        q, k, v, out, lse, dout, dlse, *operands = tensors
        runs = ops.Kernels(kernels.name) if is_traced(q, k, v) else kernels
        return runs.backward(q, k, v, out, lse, dout, dlse, Operands(*operands), params, needs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        needs = arguments[2]
        # Gradients of what all examples share are summed over a folded batch, but each example wants its own.
        foldable = not any(needs[3:])
        return vmapped(_Backward, info, in_dims, arguments, settings=3, heads=7, foldable=foldable)


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
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        foldable = arguments[4 + _SEED] is None  # draws go by the batch index
        return vmapped(_HardIndex, info, in_dims, arguments, settings=2, heads=2, foldable=foldable)


def vmapped(
    function: type[torch.autograd.Function],
    info: Any,
    in_dims: Sequence[int | None],
    arguments: Sequence[Any],
    *,
    settings: int,
    heads: int,
    foldable: bool = True,
) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    """The vmap rule of a Function: its results for each example, and their out_dims.

    Args:
        function: gives a tuple; takes settings, then tensors that have a batch dimension, then Operands.
        info, in_dims, arguments: what torch gives a vmap rule.
        settings: how many arguments are settings; the first two are the kernels and Params.
        heads: how many tensors come before the Operands.
        foldable: whether one call on a longer batch may stand for the calls of all examples.
    """

    def call(*tensors: Any) -> tuple[Any, ...]:
        return function.apply(*arguments[:settings], *tensors)

    size, params = info.batch_size, arguments[1]
    in_dims, tensors = in_dims[settings:], arguments[settings:]
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

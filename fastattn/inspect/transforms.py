"""The summary kernels under torch.func transforms, as fastattn.functorch has attention's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastattn.autograd import is_traced
from fastattn.functorch import LastDerivative, NoTangents, vmapped
from fastattn.inspect import fused
from fastattn.inspect.fused import LOGITS
from fastattn.lowering import Operands, Params
from fastattn.weight_statistics import LOSSES, Results, Wanted


def run(
    kernels: Any, q: Tensor, k: Tensor, lse: Tensor | None, operands: Operands, params: Params, wanted: Wanted
) -> Results:
    """The results of a lowered call."""
    return Results(*_Forward.apply(kernels, params, wanted, q, k, lse, *operands))


class _Forward(NoTangents):
    @staticmethod
    def forward(
        kernels: Any, params: Params, wanted: Wanted, q: Tensor, k: Tensor, lse: Tensor | None, *operands: Any
    ) -> Any:
        runs = fused.Kernels(kernels.name) if is_traced(q, k) else kernels
        return tuple(runs.forward(q, k, lse, Operands(*operands), params, wanted))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.kernels, ctx.params, wanted, q, k, _, *operands = inputs
        results = Results(*output)
        ctx.pool_mode = wanted.pool_mode
        ctx.save_for_backward(q, k, results.lse, *operands)
        ctx.mark_non_differentiable(*results.constant(wanted.pool_mode))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needs = (*ctx.needs_input_grad[3:5], *ctx.needs_input_grad[6 : 6 + LOGITS])
        q, k, lse, *operands = ctx.saved_tensors
        settings = (ctx.kernels, ctx.params, ctx.pool_mode, needs)
        dq, dk, *extra = _Backward.apply(*settings, q, k, lse, *grads[:LOSSES], *operands)
        return None, None, None, dq, dk, None, *extra, *(None,) * (len(operands) - LOGITS)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return vmapped(_Forward, info, in_dims, arguments, settings=3, heads=3)


class _Backward(LastDerivative):
    @staticmethod
    def forward(kernels: Any, params: Params, pool_mode: str, needs: Sequence[bool], *tensors: Any) -> Any:
        (q, k, lse), rest = tensors[:3], tensors[3:]
        grads, operands = rest[:LOSSES], rest[LOSSES:]
        runs = fused.Kernels(kernels.name) if is_traced(q, k) else kernels
        return runs.backward(q, k, lse, grads, Operands(*operands), params, pool_mode, needs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        needs = arguments[3]
        # Gradients of what all examples share are summed over a folded batch, but each example wants its own.
        foldable, heads = not any(needs[2:]), 3 + LOSSES
        return vmapped(_Backward, info, in_dims, arguments, settings=4, heads=heads, foldable=foldable)

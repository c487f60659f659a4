"""From a lowered call to the summary kernels: directly, with gradients, or as library ops.

As in fastattn.autograd: a direct call where no gradient is wanted, a ctx-style autograd.Function where one
is, the ops fastattn::attention_summary and fastattn::attention_summary_backward where a tracer watches, and
fastattn.inspect.transforms under torch.func.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.autograd import FORWARD_MODE, has_tangent, is_traced, wants_gradient, without_double_backward
from fastattn.backends import cpu_summary
from fastattn.backends.common import lse_shape
from fastattn.backends.cpu_summary import results_like
from fastattn.backends.triton import summary as triton_summary
from fastattn.graph_checks import check, check_results, check_size
from fastattn.lowering import Operands, Params
from fastattn.ops import _COUNT, _OPERANDS, _PARAMS, _flat, _no_gradient, _params
from fastattn.spec import accumulate_dtype
from fastattn.strides import output_like
from fastattn.weight_statistics import LOSSES, Results, Wanted

LOGITS = 3  # leading fields of Operands that a summary has gradients to: bias, diag and sinks

_WANTED = "SymInt top_k, SymInt pool_rows, SymInt pool_cols, str pool_mode"
_RESULTS = ", ".join(["Tensor"] * len(Results._fields))
_FORWARD = (
    f"(str backend, Tensor q, Tensor k, Tensor? lse, {_OPERANDS}, {_PARAMS}, {_WANTED}) -> ({_RESULTS})"
)
_GRADS = "Tensor? dentropy, Tensor? dreceived, Tensor? ddistance, Tensor? dlse, Tensor? dpooled"
_BACKWARD = (
    f"(str backend, Tensor q, Tensor k, Tensor lse, {_GRADS}, {_OPERANDS}, {_PARAMS}, str pool_mode, "
    f"bool[] needs) -> ({', '.join(['Tensor'] * (2 + LOGITS))})"
)

_library = torch.library.Library("fastattn", "FRAGMENT")
_library.define(f"attention_summary{_FORWARD}", tags=(torch.Tag.needs_exact_strides,))
_library.define(f"attention_summary_backward{_BACKWARD}", tags=(torch.Tag.needs_exact_strides,))

_KERNELS: dict[str, Any] = {kernels.name: kernels for kernels in (triton_summary, cpu_summary)}


def run(
    kernels: Any, q: Tensor, k: Tensor, lse: Tensor | None, operands: Operands, params: Params, wanted: Wanted
) -> Results:
    """The results of a lowered call on a backend's kernels, by the route that the surroundings ask for.

    No gradient flows into lse, which only saves its computation.
    """
    lse = None if lse is None else lse.detach()
    if torch.compiler.is_compiling() or is_traced(q, k):
        return Kernels(kernels.name).forward(q, k, lse, operands, params, wanted)
    if torch._C._are_functorch_transforms_active():
        from fastattn.inspect import transforms

        return transforms.run(kernels, q, k, lse, operands, params, wanted)
    if has_tangent(q, k, *operands[:LOGITS]):
        raise NotImplementedError(FORWARD_MODE)
    return eager(kernels, q, k, lse, operands, params, wanted)


def eager(
    kernels: Any, q: Tensor, k: Tensor, lse: Tensor | None, operands: Operands, params: Params, wanted: Wanted
) -> Results:
    """`run` where nothing but plain autograd watches."""
    lse = constant(lse)
    if not wants_gradient(q, k, k, operands):
        return kernels.forward(q, k, lse, operands, params, wanted)
    fixed = operands[LOGITS:]
    return Results(*_Summary.apply(q, k, *operands[:LOGITS], lse, fixed, kernels, params, wanted))


def constant(lse: Tensor | None) -> Tensor | None:
    """lse without gradient, where no transform hides whether it has one."""
    return lse.detach() if lse is not None and lse.requires_grad else lse


class Kernels:
    """A backend's kernels, called through the ops."""

    def __init__(self, name: str) -> None:
        self.name = name

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor | None,
        operands: Operands,
        params: Params,
        wanted: Wanted,
    ) -> Results:
        settings = (wanted.top_k, *wanted.pool, wanted.pool_mode)
        flat = (*operands, *_flat(params), *settings)
        return Results(*torch.ops.fastattn.attention_summary(self.name, q, k, lse, *flat))

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        grads: Sequence[Tensor | None],
        operands: Operands,
        params: Params,
        pool_mode: str,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        flat = (*grads, *operands, *_flat(params), pool_mode, list(needs))
        found = torch.ops.fastattn.attention_summary_backward(self.name, q, k, lse, *flat)
        wanted = [True] * 2 + [n and t is not None for n, t in zip(needs[2:], operands, strict=False)]
        return tuple(grad if want else None for grad, want in zip(found, wanted, strict=True))


class _Summary(torch.autograd.Function):
    """The results with gradients to q, k and the differentiable operands."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        lse, fixed, kernels, params, wanted = rest[LOGITS:]
        operands = Operands(*rest[:LOGITS], *fixed)
        results = kernels.forward(q, k, lse, operands, params, wanted)
        ctx.save_for_backward(q, k, results.lse, *operands)
        ctx.kernels, ctx.params, ctx.pool_mode = kernels, params, wanted.pool_mode
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results.constant(wanted.pool_mode))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        unused = (None,) * 5
        if all(grad is None for grad in grads[:LOSSES]):
            return (None,) * (2 + LOGITS) + unused
        needs = ctx.needs_input_grad[: 2 + LOGITS]

        def gradients(*tensors: Any) -> tuple[Tensor | None, ...]:
            wanted, (q, k, lse, *operands) = tensors[:LOSSES], tensors[LOSSES:]
            return ctx.kernels.backward(
                q, k, lse, wanted, Operands(*operands), ctx.params, ctx.pool_mode, needs
            )

        return without_double_backward(gradients, *grads[:LOSSES], *ctx.saved_tensors) + unused


def _settings(flat: Sequence[Any]) -> Wanted:
    top_k, rows, cols, pool_mode = flat
    return Wanted(top_k, (rows, cols), pool_mode)


def _forward(backend: str, q: Tensor, k: Tensor, lse: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    operands, params = Operands(*rest[:_COUNT]), _params(rest[_COUNT:-4])
    check(backend, q, k, k, operands, params)
    check_results(q, k, lse, None)
    return tuple(_KERNELS[backend].forward(q, k, lse, operands, params, _settings(rest[-4:])))


def _forward_fake(backend: str, q: Tensor, k: Tensor, lse: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(results_like(q, k, _settings(rest[-4:])))


def _backward(backend: str, q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    grads, rest = rest[:LOSSES], rest[LOSSES:]
    operands, params = Operands(*rest[:_COUNT]), _params(rest[_COUNT:-2])
    check_results(q, k, lse, None)
    _check_losses(q, k, grads)
    found = _KERNELS[backend].backward(q, k, lse, grads, operands, params, *rest[-2:])
    # A schema's outputs cannot be absent, nor can they alias one another.
    return tuple(q.new_empty(0) if grad is None else grad for grad in found)


def _check_losses(q: Tensor, k: Tensor, grads: Sequence[Tensor | None]) -> None:
    """Raise ValueError unless the gradients of the statistics are of their sizes."""
    for name, grad in zip(Results._fields[:LOSSES], grads, strict=True):
        if grad is None:
            continue
        shape = lse_shape(q)
        if name == "received":
            shape = (*q.shape[:2], k.shape[2])
        elif name == "pooled":
            shape = (*q.shape[:2], *grad.shape[2:])
        check_size(f"the gradient of {name}", grad, shape, accumulate_dtype(q.dtype), q)


def _backward_fake(backend: str, q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    grads = [output_like(t, t.shape[-1]) for t in (q, k)]
    for tensor, need in zip(rest[LOSSES : LOSSES + LOGITS], rest[-1][2:], strict=True):
        if tensor is None or not need:
            grads.append(q.new_empty(0))
        else:
            grads.append(torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device))
    return tuple(grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    backend, q, k, _, *rest = inputs
    results = Results(*output)
    ctx.save_for_backward(q, k, results.lse, *rest[:_COUNT])
    ctx.backend, ctx.flat, ctx.pool_mode = backend, rest[_COUNT:-4], rest[-1]
    needs = ctx.needs_input_grad
    ctx.needs = [*needs[1:3], *needs[4 : 4 + LOGITS]]
    ctx.mark_non_differentiable(*results.constant(ctx.pool_mode))
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    q, k, lse, *operands = ctx.saved_tensors
    unused = (None,) * (_COUNT - LOGITS + len(ctx.flat) + 4)
    if all(grad is None for grad in grads[:LOSSES]):
        return (None,) * (4 + LOGITS) + unused
    pool_mode = ctx.pool_mode
    found = torch.ops.fastattn.attention_summary_backward(
        ctx.backend, q, k, lse, *grads[:LOSSES], *operands, *ctx.flat, pool_mode, ctx.needs
    )
    dq, dk, *extra = (grad if need else None for grad, need in zip(found, ctx.needs, strict=True))
    return (None, dq, dk, None, *extra, *unused)


_library.impl("attention_summary", _forward, "CompositeExplicitAutograd")
_library.impl("attention_summary_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::attention_summary", _forward_fake, lib=_library)
torch.library.register_fake("fastattn::attention_summary_backward", _backward_fake, lib=_library)
torch.library.register_autograd(
    "fastattn::attention_summary", _gradient, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("fastattn::attention_summary_backward", _no_gradient, lib=_library)

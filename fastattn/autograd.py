"""Gradients in eager mode, and the choice of the route by which a lowered call reaches its kernels.

Three routes to the same kernels: a direct call where no gradient is wanted, a ctx-style autograd.Function
where one is, and fastattn.ops (library ops) or fastattn.functorch (a Function with vmap rules) where a
tracer or a transform watches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn.backends import cpu
from fastattn.backends.common import lse_like
from fastattn.lowering import DIFFERENTIABLE, NO_OPERANDS, Operands, Params

Gradients = tuple["Tensor | None", ...]

_REFERENCE = "backend='reference' (of a module, set FASTATTN_BACKEND=reference in the environment)"
DOUBLE_BACKWARD = (
    f"fastattn's kernels have no double backward: call with {_REFERENCE}, "
    "which has derivatives of every order"
)
BATCHED_GRADS = (
    "fastattn's backward pass takes one gradient at a time: call it without is_grads_batched (in jacobian, "
    f"with vectorize=False), use torch.func's vmap and vjp, or call with {_REFERENCE}"
)
FORWARD_MODE = f"fastattn's kernels have no forward-mode derivative: call with {_REFERENCE}, which has it"


class Kernels(Protocol):
    """What a backend with kernels of its own offers beside `supports`."""

    name: str

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Operands, params: Params, need_lse: bool = True
    ) -> tuple[Tensor, Tensor | None]: ...

    def backward(
        self,
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
    ) -> Gradients: ...


def attention(
    kernels: Any, q: Tensor, k: Tensor, v: Tensor, operands: Operands, params: Params, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of a lowered call on a backend's kernels, by the route that the surroundings ask for."""
    is_compiling = torch.compiler.is_compiling()
    if torch._C._are_functorch_transforms_active():
        if is_compiling:
            from fastattn import in_graph

            return in_graph.attention(kernels.name, q, k, v, *operands, *params)
        from fastattn import functorch

        return functorch.attention(kernels, q, k, v, operands, params)
    if not is_compiling and has_tangent(q, k, v, *operands[:DIFFERENTIABLE]):
        raise NotImplementedError(FORWARD_MODE)
    if is_compiling or is_traced(q, k, v):
        from fastattn import ops

        return ops.attention(kernels.name, q, k, v, operands, params)
    return eager(kernels, q, k, v, operands, params, need_lse)


def eager(
    kernels: Any, q: Tensor, k: Tensor, v: Tensor, operands: Operands, params: Params, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """`attention` where nothing but plain autograd watches."""
    if not wants_gradient(q, k, v, operands):
        return kernels.forward(q, k, v, operands, params, need_lse)
    # One tuple for what has no gradient, empty where there is nothing: apply() walks its arguments.
    fixed = () if operands is NO_OPERANDS else operands[DIFFERENTIABLE:]
    out, lse = _Attention.apply(q, k, v, *operands[:DIFFERENTIABLE], fixed, kernels, params)
    return out, lse


def is_traced(*tensors: Tensor) -> bool:
    """Whether something beside plain eager mode sees the tensors: a dispatch mode, a subclass, a trace."""
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None:
        return True
    return any(type(t) is not Tensor and type(t) is not torch.nn.Parameter for t in tensors)


def has_tangent(*tensors: Any) -> bool:
    """Whether forward-mode AD follows one of the tensors (None and other values are passed over)."""
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def wants_gradient(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> bool:
    """Whether autograd is to follow a call."""
    if not torch.is_grad_enabled():
        return False
    if q.requires_grad or k.requires_grad or v.requires_grad:
        return True
    return operands is not NO_OPERANDS and any(
        t is not None and t.requires_grad for t in operands[:DIFFERENTIABLE]
    )


class _Attention(torch.autograd.Function):
    """out and lse with gradients to q, k, v, bias, diag, sinks and score_weights."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        diag: Tensor | None,
        sinks: Tensor | None,
        score_weights: Tensor | None,
        fixed: tuple[Tensor | None, ...],
        kernels: Any,
        params: Params,
    ) -> tuple[Tensor, Tensor]:
        operands = Operands(bias, diag, sinks, score_weights, *fixed) if fixed else NO_OPERANDS
        out, lse = kernels.forward(q, k, v, operands, params, True)
        ctx.save_for_backward(q, k, v, out, lse, *(operands if fixed else ()))
        ctx.kernels, ctx.params = kernels, params
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        unused = (None, None, None)
        if dout is None and dlse is None:
            return (None,) * (3 + DIFFERENTIABLE) + unused
        saved = ctx.saved_tensors  # read once: checkpointing computes them on the way
        if dout is None:
            dout = torch.zeros_like(saved[3])
        needs = ctx.needs_input_grad[: 3 + DIFFERENTIABLE]

        def gradients(dout: Tensor, dlse: Tensor | None, *saved: Any) -> Gradients:
            q, k, v, out, lse, *fields = saved
            operands = Operands(*fields) if fields else NO_OPERANDS
            return ctx.kernels.backward(q, k, v, out, lse, dout, dlse, operands, ctx.params, needs)

        return without_double_backward(gradients, dout, dlse, *saved) + unused


class Plain(torch.autograd.Function):
    """out of a dense call on the CPU that has no option, which `fastattn.plain` has recognised.

    What _Attention does, with nothing to look up: of a call on a few tokens that would be most of the time.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        lse = lse_like(q)
        out = cpu.small(q, k, v, scale, lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # not always the memory of the forward pass: hooks may have moved it
        if not (torch.is_grad_enabled() or _is_batched(dout)):
            return *cpu.small_backward(ctx.scale, dout, *saved), None

        def gradients(*tensors: Any) -> Gradients:
            return cpu.small_backward(ctx.scale, *tensors)

        return *without_double_backward(gradients, dout, *saved), None


# Without what Function.apply looks for first, functorch's transforms: a third of its time.
plain: Callable[..., Tensor] = super(torch.autograd.Function, Plain).apply


# Whether autograd.grad(is_grads_batched=True) made the tensor, of which there is no memory to read.
_is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


def without_double_backward(gradients: Callable[..., Gradients], *tensors: Tensor | None) -> Gradients:
    """gradients(*tensors), whose own gradients raise: create_graph=True leaves a node that says why."""
    if any(t is not None and _is_batched(t) for t in tensors):
        raise NotImplementedError(BATCHED_GRADS)
    if torch.is_grad_enabled():
        return _OneBackward.apply(gradients, *tensors)
    return gradients(*tensors)


class _OneBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: Callable[..., Gradients], *tensors: Tensor | None) -> Gradients:
        return gradients(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(DOUBLE_BACKWARD)

"""Library ops with flat schemas: how torch.compile, export and dispatch modes see fastattn's kernels.

fastattn::attention_forward and fastattn::attention_backward take every field of Operands and Params by name;
`backend` names whose kernels run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.autograd import DOUBLE_BACKWARD
from fastattn.backends import cpu, triton
from fastattn.backends.common import lse_like
from fastattn.graph_checks import check, check_results
from fastattn.joined import CUDA
from fastattn.lowering import DIFFERENTIABLE, Operands, Params
from fastattn.strides import output_like

_OPERANDS = ", ".join(f"Tensor? {name}" for name in Operands._fields)
_PARAMS = (
    "float scale, float? softcap, float dropout_p, "
    "SymInt? lo_top, SymInt? hi_top, SymInt? lo_bottom, SymInt? hi_bottom, "
    "SymInt diag_lo, bool diag_bottom_right, SymInt max_seqlen_q, SymInt max_seqlen_k, str score"
)
_FORWARD = f"(str backend, Tensor q, Tensor k, Tensor v, {_OPERANDS}, {_PARAMS}) -> (Tensor, Tensor)"
_BACKWARD = (
    "(str backend, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, "
    f"{_OPERANDS}, {_PARAMS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_HARD = f"(str backend, Tensor q, Tensor k, {_OPERANDS}, {_PARAMS}) -> Tensor"
_COUNT = len(Operands._fields)

# Kernels read memory by its strides, so a compiler may not choose others than eager mode has.
_library = torch.library.Library("fastattn", "DEF")
_library.define(f"attention_forward{_FORWARD}", tags=(torch.Tag.needs_exact_strides,))
_library.define(f"attention_backward{_BACKWARD}", tags=(torch.Tag.needs_exact_strides,))
_library.define(f"hard_index{_HARD}", tags=(torch.Tag.needs_exact_strides,))

_KERNELS: dict[str, Any] = {cpu.name: cpu, triton.name: triton, CUDA.name: CUDA}


def attention(
    backend: str, q: Tensor, k: Tensor, v: Tensor, operands: Operands, params: Params
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a lowered call through the op."""
    return torch.ops.fastattn.attention_forward(backend, q, k, v, *operands, *_flat(params))


def hard_index(backend: str, q: Tensor, k: Tensor, operands: Operands, params: Params) -> Tensor:
    """The key that each row of a lowered call attends to, through the op."""
    return torch.ops.fastattn.hard_index(backend, q, k, *operands, *_flat(params))


class Kernels:
    """A backend's kernels, called through the ops."""

    def __init__(self, name: str) -> None:
        self.name = name

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Operands, params: Params, need_lse: bool = True
    ) -> tuple[Tensor, Tensor]:
        return attention(self.name, q, k, v, operands, params)

    def backward(self, *args: Any) -> tuple[Tensor | None, ...]:
        *tensors, operands, params, needs = args
        grads = torch.ops.fastattn.attention_backward(
            self.name, *tensors, *operands, *_flat(params), list(needs)
        )
        wanted = [True] * 3 + [n and t is not None for n, t in zip(needs[3:], operands, strict=False)]
        return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))


def _flat(params: Params) -> tuple[Any, ...]:
    band = params.band or (None,) * 4
    return (
        params.scale,
        params.softcap,
        params.dropout_p,
        *band,
        params.diag_lo,
        params.diag_bottom_right,
        params.max_seqlen_q,
        params.max_seqlen_k,
        params.score,
    )


def _params(flat: Sequence[Any]) -> Params:
    scale, softcap, dropout_p, *rest, score = flat
    band = (rest[0], rest[1], rest[2], rest[3])
    is_bounded = any(bound is not None for bound in band)
    bounds = band if is_bounded else None
    return Params(scale, softcap, dropout_p, bounds, rest[4], rest[5], rest[6], rest[7], score=score)


def _forward(backend: str, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    operands, params = Operands(*rest[:_COUNT]), _params(rest[_COUNT:])
    check(backend, q, k, v, operands, params)
    out, lse = _KERNELS[backend].forward(q, k, v, operands, params, True)
    return out, lse


def _backward(backend: str, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    out, lse, dout, dlse = rest[:4]
    operands, needs = Operands(*rest[4 : 4 + _COUNT]), rest[-1]
    check_results(q, v, lse, dlse, [("out", out), ("dout", dout)])
    grads = _KERNELS[backend].backward(
        q, k, v, out, lse, dout, dlse, operands, _params(rest[4 + _COUNT : -1]), needs
    )
    # A schema's outputs cannot be absent, nor can they alias one another.
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)


def _hard_index(backend: str, q: Tensor, k: Tensor, *rest: Any) -> Tensor:
    operands, params = Operands(*rest[:_COUNT]), _params(rest[_COUNT:])
    check(backend, q, k, k, operands, params)
    return _KERNELS[backend].hard_index(q, k, operands, params)


def _hard_index_fake(backend: str, q: Tensor, k: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.int64)


def _forward_fake(backend: str, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return output_like(q, v.shape[-1]), lse_like(q)


def _backward_fake(backend: str, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    grads = [output_like(t, t.shape[-1]) for t in (q, k, v)]
    for tensor, need in zip(rest[4 : 4 + DIFFERENTIABLE], rest[-1][3:], strict=True):
        if tensor is None or not need:
            grads.append(q.new_empty(0))
        else:
            grads.append(torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device))
    return tuple(grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    backend, q, k, v, *rest = inputs
    ctx.save_for_backward(q, k, v, *output, *rest[:_COUNT])
    ctx.backend, ctx.flat = backend, rest[_COUNT:]
    ctx.needs = list(ctx.needs_input_grad[1 : 4 + DIFFERENTIABLE])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *operands = ctx.saved_tensors
    unused = (None,) * (_COUNT - DIFFERENTIABLE + len(ctx.flat))
    if dout is None and dlse is None:
        return (None,) * (4 + DIFFERENTIABLE) + unused
    if dout is None:
        dout = torch.zeros_like(out)
    grads = torch.ops.fastattn.attention_backward(
        ctx.backend, q, k, v, out, lse, dout, dlse, *operands, *ctx.flat, ctx.needs
    )
    wanted = [grad if need else None for grad, need in zip(grads, ctx.needs, strict=True)]
    return (None, *wanted, *unused)


def _no_gradient(ctx: Any, *grads: Tensor | None) -> Any:
    raise NotImplementedError(DOUBLE_BACKWARD)


_library.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")
_library.impl("hard_index", _hard_index, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::hard_index", _hard_index_fake, lib=_library)
torch.library.register_fake("fastattn::attention_forward", _forward_fake, lib=_library)
torch.library.register_fake("fastattn::attention_backward", _backward_fake, lib=_library)
torch.library.register_autograd(
    "fastattn::attention_forward", _gradient, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("fastattn::attention_backward", _no_gradient, lib=_library)

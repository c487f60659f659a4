"""multi_head_attention: input projections, attention and output projection as one differentiable call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastattn import autograd, dispatch, execution, watch
from fastattn.autocast import autocast_dtype, cast, cast_bias, without_autocast
from fastattn.autograd import without_double_backward
from fastattn.backends import cpu
from fastattn.biases import Bias
from fastattn.call import Call
from fastattn.checks import check_bool, check_int
from fastattn.head_weights import dropped_weights, with_lazy_gradient
from fastattn.lowering import DIFFERENTIABLE, NO_OPERANDS, Operands, Params, lower
from fastattn.masks import Mask
from fastattn.projections import HeadLayout, Projections, check_projections
from fastattn.validation import validate_options

Output = tuple[Tensor, Tensor | None]  # out_proj_weight and out_proj_bias


def multi_head_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    in_proj_weight: Tensor | Sequence[Tensor],
    out_proj_weight: Tensor,
    num_heads: int,
    num_kv_heads: int | None = None,
    in_proj_bias: Tensor | None = None,
    out_proj_bias: Tensor | None = None,
    batch_first: bool = True,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    need_weights: bool = False,
    average_weights: bool = True,
    backend: str | None = None,
) -> Any:
    """y = concat_h(attention(x W_q[h], x W_k[h], x W_v[h])) W_o, with one pass of autograd over all of it.

    Kernels read the projected heads where the projection leaves them and write where the output projection
    reads: nothing is transposed or copied in between, forward or backward.

    >>> x = torch.randn(2, 5, 8)
    >>> y = multi_head_attention(
    ...     x, in_proj_weight=torch.randn(24, 8), out_proj_weight=torch.randn(8, 8), num_heads=2
    ... )
    >>> list(y.shape)
    [2, 5, 8]

    Args:
        query: [B, L, E], or [L, B, E] with batch_first=False.
        key: [B, S, Ek]; None: the query itself (self-attention).
        value: [B, S, Ev]; None: the key.
        in_proj_weight: [(Hq + 2 Hkv) D, E], the rows of W_q, W_k and W_v one after the other; or the three
            of them, [Hq D, E], [Hkv D, Ek] and [Hkv D, Ev].
        out_proj_weight: [E', Hq D].
        num_heads: Hq. The head_dim D follows from the number of rows.
        num_kv_heads: Hkv, which must divide Hq; None for Hq.
        in_proj_bias: [(Hq + 2 Hkv) D].
        out_proj_bias: [E'].
        mask, bias, scale, softcap, sinks, dropout_p, dropout_seed, backend: as in `attention`.
        need_weights: whether to return the attention weights too.
        average_weights: whether these are averaged over the heads.
    Returns:
        y, [B, L, E'] or [L, B, E'] as the query is; with need_weights also the weights after dropout,
        [B, L, S] or, not averaged, [B, Hq, L, S], in the query's dtype. Output and weights of a row that
        sees no key are the output projection of 0, and 0.
    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule and the value got.
    Source: Vaswani et al., "Attention Is All You Need", NIPS 2017, section 3.2.2.
    """
    heads = check_int("num_heads", num_heads, 1)
    heads_kv = heads if num_kv_heads is None else check_int("num_kv_heads", num_kv_heads, 1)
    if heads % heads_kv != 0:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads {heads_kv}, got {heads}")
    check_bool("need_weights", need_weights)
    check_bool("average_weights", average_weights)
    if not isinstance(in_proj_weight, (Tensor, list, tuple)):
        raise TypeError(f"in_proj_weight must be one tensor or three, got {type(in_proj_weight).__name__}")
    w_in = in_proj_weight if isinstance(in_proj_weight, Tensor) else tuple(in_proj_weight)
    b_in, w_out, b_out = in_proj_bias, out_proj_weight, out_proj_bias
    dtype = autocast_dtype(query)
    if dtype is not None:
        query, key, value, w_in, b_in, w_out, b_out = cast(
            (query, key, value, w_in, b_in, w_out, b_out), dtype
        )
        bias = cast_bias(bias, dtype)
    head_dim = check_projections(query, key, value, w_in, b_in, w_out, b_out, heads, heads_kv, batch_first)
    projections = Projections.of(query, key, value, w_in, b_in, heads, heads_kv, head_dim, batch_first)
    call = projections.call(
        mask=mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        backend=backend,
    )
    validate_options(call)
    dispatch.seed(call)
    with without_autocast(query.device):
        run = _fused if _is_fusable(call, projections, (w_out, b_out)) else _composed
        y, weights = run(call, projections, (w_out, b_out), need_weights, average_weights)
    return (y, weights) if need_weights else y


def _composed(
    call: Call, projections: Projections, output: Output, need_weights: bool, average: bool
) -> tuple[Tensor, Tensor | None]:
    """The three steps one after the other, for traces, transforms and backends without kernels."""
    layout = projections.layout
    q, k, v = projections.split()
    out = execution.run(replace(call, q=q, k=k, v=v))
    weights = dropped_weights(call, q, k, average) if need_weights else None
    return F.linear(layout.from_heads(out), *output), weights


def _is_fusable(call: Call, projections: Projections, output: Output) -> bool:
    """Whether eager mode runs the CPU kernels on these tensors as they are."""
    tensors = [
        t for t in (*projections.inputs, *projections.weights, projections.bias, *output) if t is not None
    ]
    options = () if call.bias is None and call.sinks is None else tree_leaves((call.bias, call.sinks))
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and all(t.is_cpu for t in tensors)
        and not autograd.is_traced(*tensors)
        and not autograd.has_tangent(*tensors, *options)
        and call.dropout_p < 1
        and call.q.numel() > 0
        and call.k.numel() > 0
        and not watch.is_watched()
        and dispatch.choose(call) is cpu
    )


def _fused(
    call: Call, projections: Projections, output: Output, need_weights: bool, average: bool
) -> tuple[Tensor, Tensor | None]:
    """The whole call as one node of autograd, or none where nothing wants a gradient."""
    operands, params = lower(call)
    tensors = (*projections.inputs, *projections.weights, projections.bias, *output)
    differentiable = (*tensors, *operands[:DIFFERENTIABLE])
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in differentiable):
        run = _Run(projections.layout, operands, params, (need_weights, average))
        return run.forward(projections, output)[:2]
    fixed = () if operands is NO_OPERANDS else operands[DIFFERENTIABLE:]
    constants = (projections.layout, len(projections.inputs), params, (need_weights, average))
    y, weights = _apply(constants, fixed, *operands[:DIFFERENTIABLE], *tensors)
    if weights is not None:
        scored = projections.without(2)
        options = [getattr(call, name) for name in _WEIGHTS_READ]
        arguments = (scored.inputs, scored.weights, scored.bias, *options)
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(arguments)):
            recompute = _Recompute(scored.layout, call, average)
            weights = with_lazy_gradient(weights, recompute, arguments)
    return y, weights


_WEIGHTS_READ = ("mask", "bias", "sinks", "dropout_seed")  # the tensors, or holders of tensors, of a call


class _Recompute:
    """The weights of a call as a differentiable function of its tensors."""

    def __init__(self, layout: HeadLayout, call: Call, average: bool) -> None:
        self.layout, self.average = layout, average
        self.options = {name: getattr(call, name) for name in ("scale", "softcap", "dropout_p", "backend")}

    def __call__(self, inputs: Any, weights: Any, b_in: Any, *options: Any) -> Tensor:
        projections = Projections(self.layout, inputs, weights, b_in)
        q, k = projections.split()
        call = projections.call(**dict(zip(_WEIGHTS_READ, options, strict=True)), **self.options)
        return dropped_weights(call, q, k, self.average)


class _Run:
    """Forward and backward of a call whose tensors are plain."""

    def __init__(
        self, layout: HeadLayout, operands: Operands, params: Params, weights: tuple[bool, bool]
    ) -> None:
        self.layout, self.operands, self.params = layout, operands, params
        self.need_weights, self.average = weights

    def forward(
        self, projections: Projections, output: Output, need_lse: bool = False
    ) -> tuple[Tensor, Tensor | None, list[Tensor], Tensor, Tensor | None]:
        """(y, weights, packed products, out by heads, lse)."""
        packed = projections.project()
        q, k, v = self.layout.split(packed)
        weights = cpu.weights_like(q, k, self.average) if self.need_weights else None
        x, (w_out, b_out) = packed[0], output
        a, b, _ = x.shape  # B and L, in the order of the layout
        context = x.new_empty(a, b, w_out.shape[1])
        out = self.layout.to_heads(context)
        out, lse = cpu.forward(q, k, v, self.operands, self.params, need_lse, weights, out)
        # No view: autograd refuses to change a view that a function made in place.
        y = x.new_empty(a, b, w_out.shape[0])
        flat = context.view(a * b, -1)
        if b_out is None:
            torch.mm(flat, w_out.t(), out=y.view(a * b, -1))
        else:
            torch.addmm(b_out, flat, w_out.t(), out=y.view(a * b, -1))
        if weights is not None:
            if self.average:
                batch, _, *matrix = weights.shape
                weights = torch.ops.aten._unsafe_view(weights, (batch, *matrix))
            weights = weights.to(q.dtype)
        return y, weights, packed, out, lse

    def backward(
        self,
        dy: Tensor,
        projections: Projections,
        output: Output,
        packed: list[Tensor],
        out: Tensor,
        lse: Tensor,
        needs: Any,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of bias, diag, sinks, the inputs, the input weights, their bias, and the output's two."""
        layout, (w_out, _) = self.layout, output
        flat = dy.flatten(0, 1)
        need_w, need_b = needs[-2:]
        context = layout.from_heads(out)
        dw_out = flat.mT @ context.flatten(0, 1) if need_w else None
        db_out = flat.sum(0) if need_b else None
        if not any(needs[:-2]):
            return (None,) * (len(needs) - 2) + (dw_out, db_out)
        dout = layout.to_heads((flat @ w_out).view(context.shape))
        dpacked = [torch.empty_like(part) for part in packed]
        into = layout.split(dpacked)
        q, k, v = layout.split(packed)
        extra = cpu.backward(
            q,
            k,
            v,
            out,
            lse,
            dout,
            None,
            self.operands,
            self.params,
            (True,) * 3 + needs[:DIFFERENTIABLE],
            into,
        )[3:]
        dinputs, dweights, dbias = projections.backward(dpacked, needs[DIFFERENTIABLE:-2])
        return (*extra, *dinputs, *dweights, dbias, dw_out, db_out)


class _MultiHead(torch.autograd.Function):
    """y with gradients to every tensor of the call, and the weights without."""

    @staticmethod
    def forward(ctx: Any, constants: Any, fixed: Any, *tensors: Any) -> tuple[Tensor, Tensor | None]:
        ctx.constants = constants
        run, projections, output = _gathered(constants, fixed, tensors)
        y, weights, packed, out, lse = run.forward(projections, output, need_lse=True)
        ctx.save_for_backward(out, lse, *packed, *tensors, *fixed)
        ctx.set_materialize_grads(False)
        if weights is not None:
            ctx.mark_non_differentiable(weights)
        return y, weights

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[2:]
        if dy is None:
            return (None,) * (2 + len(needs))

        def gradients(dy: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
            count = len(ctx.constants[0].groups)
            packed, rest = list(rest[:count]), rest[count:]
            run, projections, output = _gathered(ctx.constants, rest[len(needs) :], rest[: len(needs)])
            with without_autocast(dy.device):
                return run.backward(dy.to(out.dtype), projections, output, packed, out, lse, needs)

        return None, None, *without_double_backward(gradients, dy, *ctx.saved_tensors)


# As `autograd.plain`: `_is_fusable` has looked for transforms.
_apply: Callable[..., Output] = super(torch.autograd.Function, _MultiHead).apply


def _gathered(constants: Any, fixed: Any, tensors: Any) -> tuple[_Run, Projections, Output]:
    """What the flat arguments of `_MultiHead` stand for."""
    layout, num_inputs, params, weights_wanted = constants
    head, tensors = tensors[:DIFFERENTIABLE], tensors[DIFFERENTIABLE:]
    operands = Operands(*head, *fixed) if fixed else NO_OPERANDS
    projections = Projections(layout, tensors[:num_inputs], tensors[num_inputs:-3], tensors[-3])
    return _Run(layout, operands, params, weights_wanted), projections, tensors[-2:]

"""The weights that multi-head attention returns beside its output: after dropout, by head or averaged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastattn.autocast import without_autocast
from fastattn.call import Call
from fastattn.philox import dropout_mask
from fastattn.weights import attention_weights


def dropped_weights(call: Call, q: Tensor, k: Tensor, average: bool) -> Tensor:
    """[B, Hq, L, S], or averaged [B, L, S], in q's dtype: differentiable, and as large as it looks.

    Args:
        call: mask, bias, numbers and seed; its own q and k are not read.
    """
    weights = attention_weights(
        q,
        k,
        mask=call.mask,
        bias=call.bias,
        scale=call.scale,
        softcap=call.softcap,
        sinks=call.sinks,
        backend=call.backend,
    )
    if call.dropout_p == 1:
        weights = torch.zeros_like(weights)
    elif call.dropout_p > 0 and call.dropout_seed is not None:
        batch, heads, seqlen_q, seqlen_k = weights.shape
        keep = dropout_mask(call.dropout_seed, batch, heads, seqlen_q, seqlen_k, call.dropout_p)
        weights = torch.where(keep, weights / (1 - call.dropout_p), 0.0)
    return (weights.mean(1) if average else weights).to(q.dtype)


def with_lazy_gradient(value: Tensor, recompute: Any, arguments: Any) -> Tensor:
    """`value` as a function of the tensors among `arguments`, computed again only if its gradient is asked.

    Most training never differentiates the weights, so the kernels keep nothing for it.

    Args:
        value: what recompute(*arguments) would give; becomes the result.
        recompute: a differentiable function.
        arguments: of any pytree structure.
    """
    leaves, spec = pytree.tree_flatten(arguments)
    return _Lazy.apply(value, recompute, spec, *leaves)


class _Lazy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, recompute: Any, spec: Any, *leaves: Any) -> Tensor:
        ctx.recompute, ctx.spec = recompute, spec
        ctx.tensors = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.save_for_backward(*(leaves[n] for n in ctx.tensors))
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        leaves = list(ctx.others)
        wanted = []
        create_graph = torch.is_grad_enabled()
        for n, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            needs = ctx.needs_input_grad[3 + n]
            if needs:
                wanted.append(n)
            if create_graph and needs:
                # A second derivative goes on to the tensor; the first stops at an alias of its own, as one
                # tensor may be several arguments, or made of another.
                with torch.enable_grad():
                    leaves[n] = tensor.view_as(tensor)
            else:
                leaves[n] = tensor.detach().requires_grad_(needs)
        with without_autocast(grad.device):
            with torch.enable_grad():
                value = ctx.recompute(*pytree.tree_unflatten(leaves, ctx.spec))
            found = torch.autograd.grad(
                value,
                [leaves[n] for n in wanted],
                grad.to(value.dtype),
                allow_unused=True,
                create_graph=create_graph,
            )
        grads: list[Tensor | None] = [None] * len(leaves)
        for n, gradient in zip(wanted, found, strict=True):
            grads[n] = gradient
        return (None, None, None, *grads)

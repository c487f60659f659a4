"""Scores to weights, and weights times values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.autocast import autocast_dtype
from fastattn.integrations.handwritten.lazy import Lazy, Make
from fastattn.integrations.handwritten.rules.registry import derived, lead_of, pending, rule
from fastattn.integrations.handwritten.scores import Lead, NotFusable, Scores, Transposed, Weights, attend


@rule(F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)
def softmax(
    func: Any, input: Any, dim: Any = None, *args: Any, _stacklevel: int = 3, dtype: Any = None
) -> Any:
    make: Make = (func, (input, dim, *args), {} if dtype is None else {"dtype": dtype})
    if func is F.softmax:
        dtype = args[1] if len(args) > 1 else dtype
    elif args:
        dtype = args[0]
    if not pending(input, Scores) or dim not in (-1, input.dim() - 1):
        return NotImplemented
    if dtype is None:
        dtype = input.dtype if autocast_dtype(input.meaning.q) is None else torch.float32
    return derived(input, Weights(input.meaning), make, dtype=dtype)


@rule(F.dropout, torch.dropout)
def dropout(
    func: Any, input: Any, p: Any = 0.5, training: Any = True, inplace: bool = False, train: Any = None
) -> Any:
    is_training = training if train is None else train
    if not isinstance(input, Lazy) or not isinstance(p, int | float):
        return NotImplemented
    if not is_training or p == 0:
        return input
    weights = input.meaning
    if not pending(input, Weights) or inplace or not 0 < p < 1:
        return NotImplemented
    if not isinstance(weights, Weights) or weights.seed is not None:
        return NotImplemented
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=weights.scores.q.device)
    make: Make = (func, (input, p, is_training), {})
    return derived(input, Weights(weights.scores, float(p), seed), make)


@rule(Tensor.transpose, torch.transpose, Tensor.mT.__get__)  # type: ignore[attr-defined]
def transpose(func: Any, input: Any, *dims: Any) -> Any:
    last = {input.dim() - 2, input.dim() - 1}
    if not pending(input, Weights) or not all(isinstance(dim, int) for dim in dims):
        return NotImplemented
    if dims and {dim % input.dim() for dim in dims} != last:
        return NotImplemented
    shape = (*input.shape[:-2], input.shape[-1], input.shape[-2])
    make: Make = (func, (input, *dims), {})
    return derived(input, Transposed(input.meaning), make, shape=shape, shares_memory=True)


@rule(Tensor.permute, torch.permute)
def permute(func: Any, input: Any, *dims: Any) -> Any:
    """A permutation that is a transposition of the last two dimensions."""
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims
    if not all(isinstance(dim, int) for dim in order) or len(order) != input.dim():
        return NotImplemented
    n = len(order)
    if [dim % n for dim in order] != [*range(n - 2), n - 1, n - 2]:
        return NotImplemented
    return transpose(Tensor.transpose, input, -2, -1)


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
def matmul(func: Any, input: Any, other: Any) -> Any:
    if pending(other, Transposed) and isinstance(input, Tensor) and not isinstance(input, Lazy):
        found = matmul(func, other.parents[0], input.mT) if input.dim() > 1 else NotImplemented
        return found if found is NotImplemented else found.mT
    if not pending(input, Weights) or isinstance(other, Lazy) or other.dim() < 2:
        return NotImplemented
    return output(input, other, lead_of(input))


def output(lazy: Lazy, v: Tensor, lead: Lead) -> Any:
    """The finished attention; NotImplemented where no one call has it."""
    lazy.check_inputs()
    try:
        out = attend(lazy.meaning, v, lead)  # type: ignore[arg-type]
    except NotFusable:
        return NotImplemented
    lazy.notes.fused += 1
    return out.clone() if lazy.notes.copies and out.requires_grad else out

"""Biases: what is added to scores, or subtracted."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn.integrations.handwritten.lazy import Lazy, Make
from fastattn.integrations.handwritten.rules.registry import (
    as_number,
    at_least_2d,
    changed,
    derived,
    fits,
    in_place,
    lead_of,
    pending,
    rule,
)
from fastattn.integrations.handwritten.scores import RowMaximum, Scores


def _biased(lazy: Any, bias: Any, factor: float, make: Any) -> Any:
    if not pending(lazy, Scores):
        return NotImplemented
    scores = lazy.meaning
    number = as_number(bias)
    if number is not None and math.isfinite(number) and not (isinstance(bias, Tensor) and bias.dim()):
        return derived(lazy, scores, make)  # the same number everywhere leaves a softmax as it is
    if pending(bias, RowMaximum) and bias.shape[-1] == 1 and bias.dim() == lazy.dim() and fits(bias, lazy):
        return derived(lazy, scores, make)  # the same number for a whole row likewise
    if isinstance(bias, Lazy):
        bias = bias.settled()
    if not isinstance(bias, Tensor) or not fits(bias, lazy) or not bias.is_floating_point():
        return NotImplemented
    if torch.promote_types(bias.dtype, lazy.dtype) == torch.float64 != scores.q.dtype:
        return NotImplemented
    biases = (*scores.biases, (at_least_2d(bias), factor, lead_of(lazy)))
    dtype = torch.promote_types(bias.dtype, lazy.dtype) if bias.dim() else lazy.dtype
    return derived(lazy, changed(scores, biases=biases), make, dtype=dtype)


@rule(Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add)
def add(func: Any, input: Any, other: Any, *, alpha: Any = 1) -> Any:
    if as_number(alpha) is None:
        return NotImplemented
    make: Make = (func, (input, other), {} if alpha == 1 else {"alpha": alpha})
    if pending(input, Scores):
        return _biased(input, other, float(alpha), make)
    return _biased(other, input, 1.0, make) if alpha == 1 else NotImplemented


@rule(Tensor.sub, Tensor.__sub__, torch.sub, torch.subtract, Tensor.subtract)
def sub(func: Any, input: Any, other: Any, *, alpha: Any = 1) -> Any:
    if as_number(alpha) is None:
        return NotImplemented
    make: Make = (func, (input, other), {} if alpha == 1 else {"alpha": alpha})
    return _biased(input, other, -float(alpha), make)


@rule(Tensor.amax, torch.amax)
def amax(func: Any, input: Any, dim: Any = (), keepdim: bool = False) -> Any:
    """What some subtract from scores before a softmax, so that no exponential overflows."""
    if not pending(input, Scores) or dim not in (-1, input.dim() - 1, (-1,), [-1]):
        return NotImplemented
    shape = (*input.shape[:-1], 1) if keepdim else input.shape[:-1]
    return derived(input, RowMaximum(), (func, (input, dim, keepdim), {}), shape=shape)


@rule(Tensor.detach, torch.detach)
def detach(func: Any, input: Any) -> Any:
    """The softmax is the same with a row's maximum subtracted, and so is its gradient, with or without."""
    if not pending(input, RowMaximum):
        return NotImplemented
    return derived(input, input.meaning, (func, (input,), {}))


in_place(add, Tensor.add_, Tensor.__iadd__)
in_place(sub, Tensor.sub_, Tensor.__isub__)

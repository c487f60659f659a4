"""Scores times or divided by a number, or by one for each query."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn.integrations.handwritten.lazy import Lazy
from fastattn.integrations.handwritten.rules.registry import (
    as_number,
    changed,
    derived,
    in_place,
    lead_of,
    pending,
    rule,
)
from fastattn.integrations.handwritten.scores import Scores


def _scaled(func: Any, lazy: Any, other: Any, by: float | Tensor, make: Any) -> Any:
    if not pending(lazy, Scores):
        return NotImplemented
    scores = lazy.meaning
    if isinstance(by, float):
        if not math.isfinite(by):
            return NotImplemented
        biases = tuple((bias, factor * by, lead) for bias, factor, lead in scores.biases)
        meaning = changed(scores, scale=scores.scale * by, biases=biases)
        return derived(lazy, meaning, make)
    # One factor for a whole row of scores is a factor of its query.
    fits = (
        by.dim() >= 2
        and by.shape[-1] == 1
        and by.dtype == scores.q.dtype
        and not scores.biases
        and lead_of(lazy) == scores.lead
        and torch.broadcast_shapes(by.shape, lazy.shape) == lazy.shape
    )
    return derived(lazy, changed(scores, q=scores.q * by), make) if fits else NotImplemented


@rule(Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul, torch.multiply, Tensor.multiply)
def mul(func: Any, input: Any, other: Any) -> Any:
    lazy, by = (input, other) if isinstance(input, Lazy) else (other, input)
    number = as_number(by)
    if number is None and (not isinstance(by, Tensor) or isinstance(by, Lazy)):
        return NotImplemented
    return _scaled(func, lazy, other, by if number is None else number, (func, (input, other), {}))


@rule(
    Tensor.div,
    Tensor.__truediv__,
    torch.div,
    torch.divide,
    torch.true_divide,
    Tensor.divide,
    Tensor.true_divide,
)
def div(func: Any, input: Any, other: Any) -> Any:
    number = as_number(other)
    if number == 0 or (number is None and (not isinstance(other, Tensor) or isinstance(other, Lazy))):
        return NotImplemented
    by = 1 / other if number is None else 1 / number
    return _scaled(func, input, other, by, (func, (input, other), {}))


in_place(mul, Tensor.mul_, Tensor.__imul__, Tensor.multiply_)
in_place(div, Tensor.div_, Tensor.__itruediv__, Tensor.true_divide_)

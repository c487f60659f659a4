"""Masks: scores that are filled with one low number, or cut off from below."""

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
from fastattn.integrations.handwritten.scores import Lead, NotFusable, Scores, cut, factors_of

# A fill as low as this leaves nothing of the score that it is added to, in float32: -3e8 + 10 is -3e8.
FILL = -1e8


@rule(Tensor.masked_fill, torch.masked_fill)
def masked_fill(func: Any, input: Any, mask: Any, value: Any) -> Any:
    return _filled(input, mask, value, (func, (input, mask, value), {}))


@rule(torch.where)
def where(func: Any, condition: Any, input: Any = None, other: Any = None) -> Any:
    make: Make = (func, (condition, input, other), {})
    if pending(input, Scores):
        return _filled(input, condition, other, make, keeps=True)
    return _filled(other, condition, input, make)


@rule(Tensor.where)
def where_method(func: Any, input: Any, condition: Any, other: Any) -> Any:
    make: Make = (func, (input, condition, other), {})
    if pending(input, Scores):
        return _filled(input, condition, other, make, keeps=True)
    return _filled(other, condition, input, make)


def _filled(lazy: Any, mask: Any, value: Any, make: Any, keeps: bool = False) -> Any:
    """Scores with `value` where `mask` holds (where it does not, if it says what to keep)."""
    number = _fill(value)
    if number is None or not pending(lazy, Scores):
        return NotImplemented
    if not isinstance(mask, Tensor) or isinstance(mask, Lazy) or mask.dtype != torch.bool:
        return NotImplemented
    if not fits(mask, lazy):
        return NotImplemented
    scores, lead, mask = lazy.meaning, lead_of(lazy), at_least_2d(mask)
    if number == -math.inf:
        keep = mask if keeps else ~mask
        return derived(lazy, changed(scores, keeps=(*scores.keeps, (keep, lead))), make)
    lowest = torch.finfo(lazy.dtype).min
    if number > FILL:
        if number > lowest:
            return NotImplemented
        number = torch.finfo(torch.float32).min  # float16's lowest, for arithmetic in float32
    filled = ~mask if keeps else mask
    zero = scores.q.new_zeros((), dtype=torch.promote_types(scores.q.dtype, torch.float32))
    fill = (torch.where(filled, number, zero), 1.0, lead)
    try:
        scores = _without_gradient(scores, filled.all(-1, keepdim=True), lead)
    except NotFusable:
        return NotImplemented
    return derived(lazy, changed(scores, biases=(*scores.biases, fill)), make)


def _without_gradient(scores: Scores, rows: Tensor, lead: Lead) -> Scores:
    """Scores that pass no gradient on in some rows, and whose values there are of no account.

    A row of fills alone weighs all keys alike, whatever its scores were.

    Args:
        rows: bool [*, L|1, 1] that broadcasts to scores with these leading dimensions.
    """
    factors = factors_of([scores.lead, lead, *(bias[2] for bias in scores.biases)])
    rows = cut(rows, lead, factors)
    q, k = (cut(x, scores.lead, factors) for x in (scores.q, scores.k))
    biases = tuple(
        (torch.where(rows, 0, cut(bias, at, factors)), factor, factors)
        if bias.requires_grad
        else (bias, factor, at)
        for bias, factor, at in scores.biases
    )
    return changed(scores, q=torch.where(rows, 0, q), k=k, lead=factors, biases=biases)


in_place(masked_fill, Tensor.masked_fill_)


@rule(torch.max, torch.maximum, Tensor.max, Tensor.maximum, torch.clamp, Tensor.clamp)
def at_least(func: Any, input: Any, other: Any = None, **kwargs: Any) -> Any:
    """Scores cut off from below, where nothing lies that a softmax would see."""
    options = {"other": other, **kwargs}
    bound = options.pop("min", options.pop("other"))
    number = _fill(bound)
    if not pending(input, Scores) or any(option is not None for option in options.values()):
        return NotImplemented
    if number is None or number > torch.finfo(input.dtype).min:
        return NotImplemented
    return derived(input, input.meaning, (func, (input, other) if other is not None else (input,), kwargs))


@rule(Tensor.expand_as, Tensor.view_as)
def as_large(func: Any, input: Any, other: Any) -> Any:
    if isinstance(input, Lazy):
        return NotImplemented
    return input.expand(other.shape) if func is Tensor.expand_as else input.view(other.shape)


def _fill(value: Any) -> float | None:
    """A constant: a number, or a tensor of one element that no gradient follows."""
    if isinstance(value, Tensor) and not isinstance(value, Lazy) and value.numel() == 1 and value.is_cpu:
        value = value.reshape(())
    number = as_number(value)
    return None if number is None or math.isnan(number) else number

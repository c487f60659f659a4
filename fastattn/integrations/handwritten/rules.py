"""What the functions of torch do to scores and weights that have not been computed.

Each rule returns what the function would, as a Lazy or (for weights times values) as the finished output, or
NotImplemented where that has no place in a call of attention; the values are then computed as written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.autocast import autocast_dtype
from fastattn.integrations.handwritten.lazy import RULES, Lazy, Make, Meaning
from fastattn.integrations.handwritten.scores import (
    Lead,
    NotFusable,
    Scores,
    Transposed,
    Weights,
    attend,
    cut,
    factors_of,
)

# A fill as low as this leaves nothing of the score that it is added to, in float32: -3e8 + 10 is -3e8.
FILL = -1e8


def _rule(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            RULES[function] = rule
        return rule

    return register


def _in_place(rule: Callable[..., Any], *functions: Any) -> None:
    """The same rule for functions that change their first argument."""

    def change(func: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(target, Lazy) or not target.is_alone:
            return NotImplemented
        found = rule(func, target, *args, **kwargs)
        if not isinstance(found, Lazy) or found is target:
            return found
        if found.shape != target.shape or found.dtype != target.dtype:
            return NotImplemented
        return target.become(found)

    _rule(*functions)(change)


def derived(lazy: Lazy, meaning: Meaning, make: Make, **changes: Any) -> Lazy:
    """A Lazy made from another, of the same shape and dtype where `changes` do not say otherwise."""
    options = {"shape": lazy.shape, "dtype": lazy.dtype, **changes}
    return Lazy.of(meaning, notes=lazy.notes, make=make, **options)


def pending(value: Any, kind: Any) -> bool:
    """Whether a value is a Lazy of scores or of weights whose values nobody has asked for."""
    return isinstance(value, Lazy) and value.made is None and isinstance(value.meaning, kind)


def lead_of(lazy: Lazy) -> Lead:
    return tuple(lazy.shape[:-2])


def as_number(value: Any) -> float | None:
    """A finite Python number, or what a 0-dimensional constant on CPU holds; None for anything else."""
    if isinstance(value, Tensor):
        is_constant = type(value) is Tensor and value.dim() == 0 and value.is_cpu and not value.requires_grad
        if not is_constant or value.dtype == torch.bool or value.is_complex():
            return None
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


# Scores: scaled


def _scaled(func: Any, lazy: Any, other: Any, by: float | Tensor, make: Any) -> Any:
    if not pending(lazy, Scores):
        return NotImplemented
    scores = lazy.meaning
    if isinstance(by, float):
        if not math.isfinite(by):
            return NotImplemented
        biases = tuple((bias, factor * by, lead) for bias, factor, lead in scores.biases)
        meaning = _with(scores, scale=scores.scale * by, biases=biases)
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
    return derived(lazy, _with(scores, q=scores.q * by), make) if fits else NotImplemented


@_rule(Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul, torch.multiply, Tensor.multiply)
def mul(func: Any, input: Any, other: Any) -> Any:
    lazy, by = (input, other) if isinstance(input, Lazy) else (other, input)
    number = as_number(by)
    if number is None and (not isinstance(by, Tensor) or isinstance(by, Lazy)):
        return NotImplemented
    return _scaled(func, lazy, other, by if number is None else number, (func, (input, other), {}))


@_rule(
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


_in_place(mul, Tensor.mul_, Tensor.__imul__, Tensor.multiply_)
_in_place(div, Tensor.div_, Tensor.__itruediv__, Tensor.true_divide_)


# Scores: biases and masks


def _biased(lazy: Any, bias: Any, factor: float, make: Any) -> Any:
    if not pending(lazy, Scores):
        return NotImplemented
    scores = lazy.meaning
    number = as_number(bias)
    if number is not None and math.isfinite(number) and not (isinstance(bias, Tensor) and bias.dim()):
        return derived(lazy, scores, make)  # the same number everywhere leaves a softmax as it is
    if isinstance(bias, Lazy):
        bias = bias.settled()
    if not isinstance(bias, Tensor) or not _fits(bias, lazy) or not bias.is_floating_point():
        return NotImplemented
    if torch.promote_types(bias.dtype, lazy.dtype) == torch.float64 != scores.q.dtype:
        return NotImplemented
    biases = (*scores.biases, (_at_least_2d(bias), factor, lead_of(lazy)))
    dtype = torch.promote_types(bias.dtype, lazy.dtype) if bias.dim() else lazy.dtype
    return derived(lazy, _with(scores, biases=biases), make, dtype=dtype)


@_rule(Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add)
def add(func: Any, input: Any, other: Any, *, alpha: Any = 1) -> Any:
    if as_number(alpha) is None:
        return NotImplemented
    make: Make = (func, (input, other), {} if alpha == 1 else {"alpha": alpha})
    if pending(input, Scores):
        return _biased(input, other, float(alpha), make)
    return _biased(other, input, 1.0, make) if alpha == 1 else NotImplemented


@_rule(Tensor.sub, Tensor.__sub__, torch.sub, torch.subtract, Tensor.subtract)
def sub(func: Any, input: Any, other: Any, *, alpha: Any = 1) -> Any:
    if as_number(alpha) is None:
        return NotImplemented
    make: Make = (func, (input, other), {} if alpha == 1 else {"alpha": alpha})
    return _biased(input, other, -float(alpha), make)


_in_place(add, Tensor.add_, Tensor.__iadd__)
_in_place(sub, Tensor.sub_, Tensor.__isub__)


@_rule(Tensor.masked_fill, torch.masked_fill)
def masked_fill(func: Any, input: Any, mask: Any, value: Any) -> Any:
    return _filled(input, mask, value, (func, (input, mask, value), {}))


@_rule(torch.where)
def where(func: Any, condition: Any, input: Any = None, other: Any = None) -> Any:
    make: Make = (func, (condition, input, other), {})
    if pending(input, Scores):
        return _filled(input, condition, other, make, keeps=True)
    return _filled(other, condition, input, make)


@_rule(Tensor.where)
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
    if not _fits(mask, lazy):
        return NotImplemented
    scores, lead, mask = lazy.meaning, lead_of(lazy), _at_least_2d(mask)
    if number == -math.inf:
        keep = mask if keeps else ~mask
        return derived(lazy, _with(scores, keeps=(*scores.keeps, (keep, lead))), make)
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
    return derived(lazy, _with(scores, biases=(*scores.biases, fill)), make)


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
    return _with(scores, q=torch.where(rows, 0, q), k=k, lead=factors, biases=biases)


_in_place(masked_fill, Tensor.masked_fill_)


@_rule(torch.max, torch.maximum, Tensor.max, Tensor.maximum, torch.clamp, Tensor.clamp)
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


@_rule(Tensor.expand_as, Tensor.view_as)
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


def _fits(tensor: Tensor, lazy: Lazy) -> bool:
    try:
        return torch.broadcast_shapes(tensor.shape, lazy.shape) == lazy.shape
    except RuntimeError:
        return False


def _at_least_2d(tensor: Tensor) -> Tensor:
    return tensor[(None,) * (2 - tensor.dim())] if tensor.dim() < 2 else tensor


def _with(scores: Scores, **changes: Any) -> Scores:
    return Scores(**{**vars(scores), **changes})


# Scores to weights, and weights


@_rule(F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)
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


@_rule(F.dropout, torch.dropout)
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


# Both


@_rule(Tensor.view, Tensor.reshape, torch.reshape, Tensor.unflatten, torch.unflatten, Tensor.flatten)
def reshape(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    if not pending(input, Scores | Weights) or isinstance(args[0], torch.dtype):
        return NotImplemented
    shape = func(torch.empty(input.shape, device="meta"), *args, **kwargs).shape
    if len(shape) < 2 or shape[-2:] != input.shape[-2:]:
        return NotImplemented
    return derived(input, input.meaning, (func, (input, *args), kwargs), shape=shape, shares_memory=True)


@_rule(torch.flatten, Tensor.unsqueeze, torch.unsqueeze, Tensor.squeeze, torch.squeeze)
def reshape_by_number(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    return reshape(func, input, *(args or (0,)), **kwargs) if args or kwargs else NotImplemented


@_rule(Tensor.contiguous)
def contiguous(func: Any, input: Any, **kwargs: Any) -> Any:
    return NotImplemented if kwargs or input.made is not None else input


@_rule(Tensor.to, Tensor.type_as, Tensor.type)
def to(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(input, Lazy) or input.made is not None or len(args) + len(kwargs) != 1:
        return NotImplemented
    (target,) = (*args, *kwargs.values())
    dtype = target.dtype if isinstance(target, Tensor) else target
    if isinstance(target, Tensor) and target.device != input.device:
        return NotImplemented
    if not isinstance(dtype, torch.dtype) or set(kwargs) - {"dtype", "other"}:
        return NotImplemented
    if not dtype.is_floating_point:
        return NotImplemented
    if dtype == input.dtype:
        return input
    return derived(input, input.meaning, (func, (input, *args), kwargs), dtype=dtype)


def _cast_to(dtype: torch.dtype) -> Callable[..., Any]:
    def cast(func: Any, input: Any) -> Any:
        return to(Tensor.to, input, dtype)

    return cast


_rule(Tensor.float)(_cast_to(torch.float32))
_rule(Tensor.double)(_cast_to(torch.float64))
_rule(Tensor.half)(_cast_to(torch.float16))
_rule(Tensor.bfloat16)(_cast_to(torch.bfloat16))


# Weights times values


@_rule(Tensor.transpose, torch.transpose, Tensor.mT.__get__)  # type: ignore[attr-defined]
def transpose(func: Any, input: Any, *dims: Any) -> Any:
    last = {input.dim() - 2, input.dim() - 1}
    if not pending(input, Weights) or not all(isinstance(dim, int) for dim in dims):
        return NotImplemented
    if dims and {dim % input.dim() for dim in dims} != last:
        return NotImplemented
    shape = (*input.shape[:-2], input.shape[-1], input.shape[-2])
    make: Make = (func, (input, *dims), {})
    return derived(input, Transposed(input.meaning), make, shape=shape, shares_memory=True)


@_rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
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
    return out

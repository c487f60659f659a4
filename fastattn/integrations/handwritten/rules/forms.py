"""Other shapes and dtypes of scores and weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.integrations.handwritten.lazy import Lazy, Make
from fastattn.integrations.handwritten.rules.registry import derived, pending, rule
from fastattn.integrations.handwritten.scores import RowMaximum, Scores, Weights


@rule(Tensor.view, Tensor.reshape, torch.reshape, Tensor.unflatten, torch.unflatten, Tensor.flatten)
def reshape(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    if not pending(input, Scores | Weights) or isinstance(args[0], torch.dtype):
        return NotImplemented
    shape = func(torch.empty(input.shape, device="meta"), *args, **kwargs).shape
    if len(shape) < 2 or shape[-2:] != input.shape[-2:]:
        return NotImplemented
    return derived(input, input.meaning, (func, (input, *args), kwargs), shape=shape, shares_memory=True)


@rule(torch.flatten, Tensor.unsqueeze, torch.unsqueeze, Tensor.squeeze, torch.squeeze)
def reshape_by_number(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    if pending(input, RowMaximum) and args == (-1,) and func in (Tensor.unsqueeze, torch.unsqueeze):
        make: Make = (func, (input, -1), {})
        return derived(input, input.meaning, make, shape=(*input.shape, 1), shares_memory=True)
    return reshape(func, input, *(args or (0,)), **kwargs) if args or kwargs else NotImplemented


@rule(Tensor.contiguous)
def contiguous(func: Any, input: Any, **kwargs: Any) -> Any:
    return NotImplemented if kwargs or input.made is not None else input


@rule(Tensor.to, Tensor.type_as, Tensor.type)
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


rule(Tensor.float)(_cast_to(torch.float32))
rule(Tensor.double)(_cast_to(torch.float64))
rule(Tensor.half)(_cast_to(torch.float16))
rule(Tensor.bfloat16)(_cast_to(torch.bfloat16))

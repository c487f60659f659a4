"""Rules on single numbers, shared by every constructor and call."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor


def check_int(name: str, value: Any, least: int | None = None, *, or_none: bool = False) -> int:
    """`value` as an int, which may be NumPy's or a traced one, but no bool, float or tensor.

    Args:
        name: of the argument, for messages.
        least: the smallest allowed value.
        or_none: whether the message names None too; the caller has dealt with it.
    Raises:
        TypeError: not an integer.
        ValueError: below `least`.
    """
    none = " or None" if or_none else ""
    if type(value) is not int and not isinstance(value, torch.SymInt):
        try:
            if isinstance(value, (bool, Tensor)):
                raise TypeError
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be an int{none}, got {type(value).__name__}") from None
    if least is not None and value < least:
        raise ValueError(f"{name} must be >= {least}{none}, got {value}")
    return value


def not_a_mask(name: str, value: Any) -> TypeError:
    """The error for an argument that is neither a mask nor a tensor."""
    got = type(value).__name__
    if callable(value) and hasattr(value, "__name__"):
        got += f" {value.__name__}: call it, {value.__name__}(...)"
    return TypeError(f"{name} must be a fastattn.masks.Mask or a bool tensor, got {got}")


def not_a_bias(name: str, value: Any) -> TypeError:
    """The error for an argument that is neither a bias nor a tensor."""
    got = type(value).__name__
    if isinstance(value, torch.nn.Module):
        got += ", a module: call it, and give what it returns"
    return TypeError(f"{name} must be a tensor or a fastattn.biases.Bias, got {got}")


def check_bool(name: str, value: Any) -> bool:
    """`value`, which must be True or False.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value

"""How a rule is registered and what rules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.integrations.handwritten.lazy import RULES, Lazy, Make, Meaning
from fastattn.integrations.handwritten.scores import Lead, Scores


def rule(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(meant: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            RULES[function] = meant
        return meant

    return register


def in_place(what: Callable[..., Any], *functions: Any) -> None:
    """The same rule for functions that change their first argument."""

    def change(func: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(target, Lazy) or not target.is_alone:
            return NotImplemented
        found = what(func, target, *args, **kwargs)
        if not isinstance(found, Lazy) or found is target:
            return found
        if found.shape != target.shape or found.dtype != target.dtype:
            return NotImplemented
        return target.become(found)

    rule(*functions)(change)


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


def fits(tensor: Tensor, lazy: Lazy) -> bool:
    try:
        return torch.broadcast_shapes(tensor.shape, lazy.shape) == lazy.shape
    except RuntimeError:
        return False


def at_least_2d(tensor: Tensor) -> Tensor:
    return tensor[(None,) * (2 - tensor.dim())] if tensor.dim() < 2 else tensor


def changed(scores: Scores, **changes: Any) -> Scores:
    return Scores(**{**vars(scores), **changes})

"""What autocast asks of a call: casts made once, at its door, and none within."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(tensor: Any) -> torch.dtype | None:
    """The dtype that autocast asks for on the tensor's device, None where it is off."""
    if not isinstance(tensor, Tensor):
        return None
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if _is_on(device) else None


def cast(values: Iterable[Any], dtype: torch.dtype) -> list[Any]:
    """The values with every floating-point tensor, also in tuples, as dtype; float64 stays, as in PyTorch.

    What is one tensor stays one.
    """
    values = list(values)
    done = {id(value): _cast(value, dtype) for value in values}
    return [done[id(value)] for value in values]


def cast_bias(bias: Any, dtype: torch.dtype) -> Any:
    """A bias as calls take it: float32 may stand beside any dtype, and stays."""
    return bias if isinstance(bias, Tensor) and bias.dtype == torch.float32 else _cast(bias, dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """For computations whose dtypes are settled: the inside of a call, and backward wherever it is called."""
    return torch.autocast(device.type, enabled=False) if _is_on(device.type) else contextlib.nullcontext()


def _is_on(device: str) -> bool:
    if torch.compiler.is_compiling():  # torch 2.9 cannot trace is_autocast_available
        return device != "meta" and torch.is_autocast_enabled(device)
    return (device == "cpu" or torch.amp.is_autocast_available(device)) and torch.is_autocast_enabled(device)

"""Compiled kernels where none can be run: they take addresses, as Triton's do, and are interpreted."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from fastattn.backends.triton import descriptors


class Stored:
    """Memory at an address, as the interpreter takes tensors."""

    def __init__(self, address: int, like: torch.Tensor) -> None:
        last = sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
        size = (last + 1) * like.element_size() if like.numel() else 0
        data = (ctypes.c_uint8 * max(size, 8)).from_address(address) if address else bytearray(8)
        self.tensor = torch.frombuffer(data, dtype=torch.uint8)[: size or 8].view(like.dtype)


class StandIn:
    """What Triton would have compiled a launch to: it gets addresses, and interprets the kernel."""

    runs = 0

    def __init__(self, kernel: Any, args: list[Any]) -> None:
        self.kernel, self.args = kernel, args

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any) -> None:
            StandIn.runs += 1
            self.kernel[grid](*[self._restored(*pair) for pair in zip(args, self.args, strict=True)])

        return launch

    def _restored(self, given: Any, before: Any) -> Any:
        """What was given, with tensors for addresses and the names of tuples."""
        if isinstance(before, torch.Tensor):
            assert type(given) is int
            return Stored(given, before).tensor
        if descriptors.is_descriptor(before):
            base = Stored(given.base.data_ptr(), before.base).tensor
            return type(before)(base, given.shape, given.strides, given.block_shape)
        if isinstance(before, tuple):
            return type(before)(*[self._restored(*pair) for pair in zip(given, before, strict=True)])
        assert given is before or given == before
        return given

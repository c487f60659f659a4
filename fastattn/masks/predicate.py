"""A mask given as a function of indices."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.masks.base import Mask, register
from fastattn.masks.space import MaskShape, Pairs
from fastattn.spec import dtype_name

PairFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def predicate(fn: PairFunction) -> Mask:
    """Pairs where fn(b, h, i, j) is True.

    Args:
        fn: takes the batch entry, query head, row and column as int64 tensors of four dimensions that
            broadcast together, and returns a bool tensor that broadcasts to their common shape. Indices are
            raw: no offset is added. It must judge each pair by itself (tensor operators, and lookups such as
            `table[b, i]`), since it is called for strips of rows cut into tiles, b and h [T, 1, 1, 1],
            i [T, 1, 64, 1], j [T, 1, 1, 64]; and in `to_dense` for all pairs at once, b [B, 1, 1, 1],
            h [1, H, 1, 1], i [1, 1, Lq, 1], j [1, 1, 1, Lk]. A result that does not extend along b (or h)
            says that the mask is the same for every batch entry (or head).

    What fn captures may change: a mask that holds a predicate evaluates it anew in every call. Where it stays
    as it is, `build` the mask once instead.

    Raises:
        TypeError: fn is not callable with four arguments, or, when used, returns something else than a bool
            tensor.
        ValueError: when used, fn's result does not broadcast.

    Example: `predicate(lambda b, h, i, j: (i - j) % 4 == 0) & causal()` is a dilated causal mask.
    """
    if not callable(fn):
        raise TypeError(f"predicate fn must be callable, got {type(fn).__name__}")
    if not torch.compiler.is_compiling():
        _check_signature(fn)
    return Predicate(fn)


def _check_signature(fn: PairFunction) -> None:
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # a builtin that does not tell
        return
    try:
        signature.bind(None, None, None, None)
    except TypeError:
        name = getattr(fn, "__qualname__", type(fn).__name__)
        raise TypeError(f"predicate fn must take (b, h, i, j), got {name}{signature}") from None


@register
@dataclass(frozen=True, eq=False, repr=False)
class Predicate(Mask):
    """A function of indices."""

    fn: PairFunction

    @property
    def is_constant(self) -> bool:
        return False

    def _call(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        result = self.fn(b, h, i, j)
        if not isinstance(result, Tensor) or result.dtype != torch.bool:
            got = dtype_name(result.dtype) if isinstance(result, Tensor) else type(result).__name__
            raise TypeError(f"predicate fn must return a bool tensor, got {got}")
        want = torch.broadcast_shapes(b.shape, h.shape, i.shape, j.shape)
        result = result[(None,) * (4 - result.dim())]
        if result.dim() != 4 or any(
            size not in (1, full) for size, full in zip(result.shape, want, strict=True)
        ):
            raise ValueError(
                f"predicate fn must return a tensor broadcastable to {list(want)}, got {list(result.shape)}"
            )
        return result

    def _visible(self, at: Pairs) -> Tensor:
        return self._call(at.b, at.h, at.i, at.j)

    def _varies(self, shape: MaskShape, device: torch.device) -> tuple[bool, bool]:
        if 0 in (shape.batch, shape.heads, shape.seqlen_q, shape.seqlen_k):
            return False, False
        # Index 0 twice along batch and head: the result extends along those that it depends on.
        zeros = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
        result = self._call(zeros.expand(2, 1, 1, 1), zeros.expand(1, 2, 1, 1), zeros, zeros)
        return result.shape[0] > 1, result.shape[1] > 1

    def __repr__(self) -> str:
        return f"predicate({getattr(self.fn, '__qualname__', repr(self.fn))})"

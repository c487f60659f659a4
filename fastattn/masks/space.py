"""The index space of a mask: its batch entries, heads, rows and columns, and how rows align with keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastattn.checks import check_int
from fastattn.spec import dtype_name

Align = Literal["bottom_right", "top_left"]
Ints = Tensor | tuple[int, ...]

ALIGNMENTS = ("bottom_right", "top_left")


@dataclass(frozen=True, eq=False)
class MaskShape:
    """The index space in which a mask is evaluated.

    Args:
        batch: number of batch entries, or of sequences in a packed (varlen) call.
        heads: number of query heads.
        seqlen_q, seqlen_k: lengths; the maxima where per-sequence lengths are given.
        seqlens_q: int [batch], actual query lengths of a packed call, else None.
        seqlens_k: int [batch], actual key lengths of a packed call or of caches, else None.
    """

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    seqlens_q: Tensor | None = None
    seqlens_k: Tensor | None = None

    @property
    def is_ragged(self) -> bool:
        """Whether lengths differ from one batch entry to the next."""
        return self.seqlens_q is not None or self.seqlens_k is not None

    def length_q(self, b: Tensor) -> int | Tensor:
        """Query length of the batch entries `b`: an int where all agree, else int64 of b's shape."""
        return self.seqlen_q if self.seqlens_q is None else self.seqlens_q.long()[b]

    def length_k(self, b: Tensor) -> int | Tensor:
        """Key length of the batch entries `b`: an int where all agree, else int64 of b's shape."""
        return self.seqlen_k if self.seqlens_k is None else self.seqlens_k.long()[b]

    def offset(self, align: Align, b: Tensor) -> int | Tensor:
        """Key position of row 0 in the batch entries `b`: len_k - len_q for "bottom_right", else 0."""
        if align == "top_left":
            return 0
        return self.length_k(b) - self.length_q(b)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Indices of batch entry, head, row and column: int64, four dimensions each, that broadcast together.

    `complete`: they are the whole index space in order, [B,1,1,1], [1,H,1,1], [1,1,Lq,1], [1,1,1,Lk].
    """

    shape: MaskShape
    b: Tensor
    h: Tensor
    i: Tensor
    j: Tensor
    complete: bool = False

    @staticmethod
    def all(shape: MaskShape, device: torch.device) -> Pairs:
        """Every pair of the index space."""

        def axis(size: int, dim: int) -> Tensor:
            view = [1, 1, 1, 1]
            view[dim] = size
            return torch.arange(size, device=device).view(view)

        b, h = axis(shape.batch, 0), axis(shape.heads, 1)
        return Pairs(shape, b, h, axis(shape.seqlen_q, 2), axis(shape.seqlen_k, 3), complete=True)

    def position(self, align: Align) -> Tensor:
        """Key position that each row stands at: i + offset."""
        return self.i + self.shape.offset(align, self.b)


def check_align(align: str) -> None:
    if align not in ALIGNMENTS:
        raise ValueError(f"align must be one of {ALIGNMENTS}, got {align!r}")


def describe(value: object) -> str:
    """Short text for an argument: `int64[4, 7]` for a tensor, its repr otherwise."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)}{list(value.shape)}"
    return repr(value)


def is_integer(value: Tensor) -> bool:
    return not (value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool)


def as_ints(name: str, value: Tensor | int | Sequence[int], dims: tuple[int, ...]) -> Ints:
    """Check an integer argument: a tensor of one of the given numbers of dimensions, or Python ints.

    Python ints stay a tuple, which follows each call to its device; a tensor must already be there. Those
    below 0 are refused; a tensor's values are not looked at.
    """
    if isinstance(value, Tensor):
        if not is_integer(value):
            raise TypeError(f"{name} must be an integer tensor, got {dtype_name(value.dtype)}")
        if value.dim() not in dims:
            raise ValueError(
                f"{name} must have {' or '.join(map(str, dims))} dimensions, got shape {list(value.shape)}"
            )
        return value
    items = (value,) if isinstance(value, int) else value
    if not isinstance(items, (list, tuple, range)) or not all(type(item) is int for item in items):
        raise TypeError(f"{name} must be an integer tensor or a sequence of ints, got {type(value).__name__}")
    for item in items:
        check_int(name, item, 0)
    return tuple(items)


def check_device(name: str, value: Tensor, device: torch.device) -> Tensor:
    """Return `value`, which must lie on the call's device."""
    if not same_device(value.device, device):
        raise ValueError(f"{name} must be on the call's device {device}, got {value.device}")
    return value


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether two devices agree, where one without an index agrees with all of its type."""
    return one.type == other.type and (one.index == other.index or None in (one.index, other.index))


def ints_on(name: str, value: Ints, device: torch.device) -> Tensor:
    """The argument as an integer tensor on the call's device."""
    if isinstance(value, Tensor):
        return check_device(name, value, device)
    return torch.tensor(value, dtype=torch.int64, device=device)


def check_batch(name: str, size: int, batch: int) -> None:
    if size not in (1, batch):
        raise ValueError(f"{name} must have batch size {batch}{_or_hint('batch', batch, size)}")


def check_heads(name: str, size: int, heads: int) -> None:
    if size not in (1, heads):
        raise ValueError(f"{name} must have {heads} heads{_or_hint('heads', heads, size)}")


def _or_hint(keyword: str, size: int, got: int) -> str:
    return f", got {got}; in build(), pass {keyword}={got}" if size == 1 else f" (or 1), got {got}"


def lookup(values: Tensor, *index: Tensor) -> Tensor:
    """values[index], where a dimension of size 1 serves every index."""
    return values[tuple(0 if size == 1 else at for size, at in zip(values.shape, index, strict=True))]


def show(value: object) -> str:
    """An argument in a mask's repr: a lone int without its tuple."""
    return str(value[0]) if isinstance(value, tuple) and len(value) == 1 else describe(value)

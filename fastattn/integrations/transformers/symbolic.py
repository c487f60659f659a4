"""What a mask function of transformers means, read off by calling it with symbolic indices.

A mask function tells whether query q_idx of batch entry batch_idx sees key kv_idx. Called with the objects
below in place of numbers it spells out its own definition, which becomes a mask of fastattn: `kv_idx <=
q_idx` is a band, `ids[batch_idx, q_idx] == ids[batch_idx, kv_idx]` are documents. No function is known by
name, so one of the user's is read in the same way, and one whose meaning changes with a version is read as
what it became.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastattn.integrations.transformers.frame import EVERYTHING, NOTHING, Frame, Offset
from fastattn.integrations.transformers.ordered import Ordered
from fastattn.masks import Mask, documents

MaskFunction = Callable[[Any, Any, Any, Any], Any]


class Opaque(Exception):
    """A mask function did what symbolic indices cannot follow."""


def read(mask_function: MaskFunction, frame: Frame) -> Mask | None:
    """The mask that the function defines, or None where it cannot be read."""
    batch = Value(frame, "", shift=0)
    q_idx, kv_idx = Value(frame, "q", shift=frame.q_offset), Value(frame, "k", shift=frame.kv_offset)
    try:
        with _LookUps():
            return _truth(mask_function(batch, _Head(frame), q_idx, kv_idx)).mask
    except (Opaque, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        # What code raises that expected tensors of indices. The function is then called with those, where an
        # error of its own shows.
        return None


class _LookUps(TorchFunctionMode):
    """Lets a tensor take symbolic indices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            table, index = args
            index = index if isinstance(index, tuple) else (index,)
            if any(isinstance(at, Symbol) for at in index):
                return _look_up(table, index)
        return func(*args, **(kwargs or {}))


class Symbol:
    """What every symbolic value shares with the tensor of indices that a mask function expects."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame

    @property
    def device(self) -> torch.device:
        return self.frame.device

    def to(self, *_: Any, **__: Any) -> Any:
        return self

    def new_ones(self, *_: Any, **__: Any) -> Truth:
        return Truth(self.frame, EVERYTHING)

    def new_zeros(self, *_: Any, **__: Any) -> Truth:
        return Truth(self.frame, NOTHING)

    def __bool__(self) -> bool:
        raise Opaque("a symbolic value has no truth value")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = _OF_TORCH.get(func)
        if known is None or kwargs:
            raise Opaque(f"{func} of symbolic indices")
        return known(*args)


class _Head(Symbol):
    """The head, on which no mask of transformers depends; one that does cannot be read."""


class Truth(Symbol):
    """A bool for each pair of query and key."""

    def __init__(self, frame: Frame, mask: Mask) -> None:
        super().__init__(frame)
        self.mask = mask

    def __and__(self, other: Any) -> Truth:
        return Truth(self.frame, both(self.mask, _truth(other).mask))

    def __or__(self, other: Any) -> Truth:
        return Truth(self.frame, either(self.mask, _truth(other).mask))

    def __invert__(self) -> Truth:
        return Truth(self.frame, complement(self.mask))

    __rand__ = __and__
    __ror__ = __or__


class Value(Symbol):
    """A number for each query (axis "q"), each key ("k") or each batch entry (""): int64 [B|1, L|1].

    Args:
        table: the numbers; None where they are the index n plus `shift`.
    """

    def __init__(
        self, frame: Frame, axis: str, table: Tensor | None = None, shift: Offset | None = None
    ) -> None:
        super().__init__(frame)
        self.axis, self._table, self.shift = axis, table, shift

    @property
    def table(self) -> Tensor:
        if self._table is not None:
            return self._table
        length = self.frame.shape.batch if self.axis == "" else self._length()
        numbers = torch.arange(length, device=self.device)
        # Batch entries stand below one another, queries and keys side by side.
        return (numbers[:, None] if self.axis == "" else numbers[None]) + self.shift  # type: ignore[operator]

    @property
    def full_table(self) -> Tensor:
        """[B|1, L]."""
        return self.table.expand(-1, self._length())

    def _length(self) -> int:
        return self.frame.shape.seqlen_q if self.axis == "q" else self.frame.shape.seqlen_k

    def _arithmetic(self, other: Any, operation: Callable[[Any, Any], Any]) -> Any:
        if not isinstance(other, Value):
            moves = self.shift is not None and operation in (operator.add, operator.sub)
            shift = operation(self.shift, _number(other)) if moves else None
            table = None if moves else operation(self.table, _number(other))
            return Value(self.frame, self.axis, table, shift)
        if self.axis != other.axis and self.axis and other.axis:
            if operation is not operator.sub or self.shift is None or other.shift is None:
                raise Opaque("arithmetic of a query's and a key's number")
            shift = self.shift - other.shift
            return Distance(self.frame, shift if self.axis == "q" else -shift, 1 if self.axis == "q" else -1)
        return Value(self.frame, self.axis or other.axis, operation(self.table, other.table))

    def __add__(self, other: Any) -> Any:
        return self._arithmetic(other, operator.add)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._arithmetic(other, operator.sub)

    def __mul__(self, other: Any) -> Any:
        return self._arithmetic(other, operator.mul)

    def __floordiv__(self, other: Any) -> Any:
        return self._arithmetic(other, operator.floordiv)

    def __mod__(self, other: Any) -> Any:
        return self._arithmetic(other, operator.mod)

    def _compare(self, other: Any, relation: Callable[[Any, Any], Any]) -> Truth:
        if not isinstance(other, Value):
            number = _number(other)
            if self.axis and isinstance(self.shift, int) and isinstance(number, int):
                # Positions rise by one, so what holds of the first and the last may hold of all.
                ends = relation(self.shift, number), relation(self.shift + self._length() - 1, number)
                if all(ends) and relation is not operator.ne:
                    return Truth(self.frame, EVERYTHING)
            return _fact(self.frame, self.axis, relation(self.table, number))
        if self.axis == other.axis or not self.axis or not other.axis:
            return _fact(self.frame, self.axis or other.axis, relation(self.table, other.table))
        if self.axis == "q":
            return other._compare(self, _MIRRORED[relation])
        return Truth(self.frame, _key_to_query(self, other, relation))

    def __le__(self, other: Any) -> Truth:
        return self._compare(other, operator.le)

    def __lt__(self, other: Any) -> Truth:
        return self._compare(other, operator.lt)

    def __ge__(self, other: Any) -> Truth:
        return self._compare(other, operator.ge)

    def __gt__(self, other: Any) -> Truth:
        return self._compare(other, operator.gt)

    def __eq__(self, other: object) -> Truth:  # type: ignore[override]
        return self._compare(other, operator.eq)

    def __ne__(self, other: object) -> Truth:  # type: ignore[override]
        return self._compare(other, operator.ne)

    __hash__ = None  # type: ignore[assignment]


class Distance(Symbol):
    """sign * (i - j + offset), or its absolute value: what a window compares with its width."""

    def __init__(self, frame: Frame, offset: Offset, sign: int, absolute: bool = False) -> None:
        super().__init__(frame)
        self.offset, self.sign, self.absolute = offset, sign, absolute

    def __abs__(self) -> Distance:
        return Distance(self.frame, self.offset, 1, True)

    def __le__(self, width: Any) -> Truth:
        width = _number(width)
        # i - j + offset <= width, and the same of its negative.
        lo, hi = self.offset - width, self.offset + width
        if self.absolute:
            return Truth(self.frame, self.frame.band(lo, hi))
        return Truth(self.frame, self.frame.band(lo, None) if self.sign > 0 else self.frame.band(None, hi))

    def __lt__(self, width: Any) -> Truth:
        return self <= _number(width) - 1

    def __gt__(self, width: Any) -> Truth:
        return Truth(self.frame, complement((self <= width).mask))

    def __ge__(self, width: Any) -> Truth:
        return self > _number(width) - 1


_MIRRORED = {
    operator.le: operator.ge,
    operator.lt: operator.gt,
    operator.ge: operator.le,
    operator.gt: operator.lt,
    operator.eq: operator.eq,
    operator.ne: operator.ne,
}

_OF_TORCH: dict[Any, Callable[..., Any]] = {
    torch.abs: operator.abs,
    torch.logical_and: operator.and_,
    torch.logical_or: operator.or_,
    torch.logical_not: operator.invert,
    torch.bitwise_and: operator.and_,
    torch.bitwise_or: operator.or_,
    torch.eq: operator.eq,
    torch.le: operator.le,
    torch.lt: operator.lt,
    torch.ge: operator.ge,
    torch.gt: operator.gt,
}


def both(one: Mask, other: Mask) -> Mask:
    """one & other, which is the one where the other is everything."""
    if one == EVERYTHING:
        return other
    return one if other == EVERYTHING else one & other


def either(one: Mask, other: Mask) -> Mask:
    """one | other, which is the one where the other is nothing."""
    if one == NOTHING:
        return other
    return one if other == NOTHING else one | other


def complement(mask: Mask) -> Mask:
    """~mask, by its method, which torch.compile knows how to call."""
    return mask.__invert__()


def _truth(value: Any) -> Truth:
    if not isinstance(value, Truth):
        raise Opaque(f"a {type(value).__name__} in place of a symbolic bool")
    return value


def _number(value: Any) -> Offset:
    if isinstance(value, bool) or not isinstance(value, (int, Tensor)):
        raise Opaque(f"a {type(value).__name__} in place of a whole number")
    if isinstance(value, Tensor) and (value.dim() or value.dtype.is_floating_point):
        raise Opaque("a tensor of several numbers, which belong to no index")
    return value


def _fact(frame: Frame, axis: str, visible: Tensor) -> Truth:
    """A bool [B|1, L|1] of queries, keys or batch entries as a mask."""
    if axis == "k":
        return Truth(frame, frame.keys(visible))
    return Truth(frame, frame.queries(visible))


def _key_to_query(key: Value, query: Value, relation: Callable[[Any, Any], Any]) -> Mask:
    """The pairs for which relation(the key's number, the query's number)."""
    frame = key.frame
    if relation is operator.ne:
        return complement(_key_to_query(key, query, operator.eq))
    if key.shift is not None and query.shift is not None:
        at = query.shift - key.shift  # j <= i + at
        bounds = {
            operator.le: (None, at),
            operator.lt: (None, at - 1),
            operator.ge: (at, None),
            operator.gt: (at + 1, None),
            operator.eq: (at, at),
        }
        return frame.band(*bounds[relation])
    keys, queries = key.full_table, query.full_table
    if relation is operator.eq:
        return documents(queries, keys)
    if relation is operator.le:
        return Ordered(queries, keys)
    if relation is operator.lt:
        return Ordered(queries - 1, keys)
    return Ordered(-queries if relation is operator.ge else -queries - 1, -keys)


def _look_up(table: Tensor, index: tuple[Any, ...]) -> Symbol:
    """table[index] with symbolic indices, one for each dimension."""
    if table.dim() != len(index):
        raise Opaque("indices for a part of a tensor's dimensions")
    if not all(isinstance(at, Value) for at in index):
        raise Opaque("an index that belongs to neither entry, query nor key")
    axes = {at.axis for at in index} - {""}
    if len(axes) > 1:
        raise Opaque("a table of pairs")
    axis = axes.pop() if axes else ""
    values, frame = table[tuple(at.table for at in index)], index[0].frame
    if values.dtype == torch.bool:
        return _fact(frame, axis, values)
    if values.dtype.is_floating_point:
        raise Opaque("a table of fractions")
    return Value(frame, axis, values)

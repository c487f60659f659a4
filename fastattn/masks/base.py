"""The mask algebra: what every mask can do, and how masks compose and reach kernels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastattn.block_mask import BlockMask
from fastattn.masks.space import MaskShape, Pairs, check_device, describe
from fastattn.masks.tiles import Tiler, TileRows, Tiles, build_block_mask


@dataclass(frozen=True, eq=False)
class LoweredMask:
    """A mask as kernels read it: a pair is visible where every part that is present says so.

    Args:
        lo_top, hi_top: i + lo_top <= j <= i + hi_top.
        lo_bottom, hi_bottom: i + offset + lo_bottom <= j <= i + offset + hi_bottom, offset = len_k - len_q.
        key_starts, key_ends: int32 [B|1, Lq|1] contiguous, start <= j < end.
        dense: bool, 4-D, broadcastable to [B, H, Lq, Lk]; the user's memory, not expanded.
        block: block lists.
    """

    lo_top: int | None = None
    hi_top: int | None = None
    lo_bottom: int | None = None
    hi_bottom: int | None = None
    key_starts: Tensor | None = None
    key_ends: Tensor | None = None
    dense: Tensor | None = None
    block: BlockMask | None = None

    def __and__(self, other: LoweredMask) -> LoweredMask:
        """Intersection of two masks without block lists."""
        return LoweredMask(
            lo_top=_tighter(max, self.lo_top, other.lo_top),
            hi_top=_tighter(min, self.hi_top, other.hi_top),
            lo_bottom=_tighter(max, self.lo_bottom, other.lo_bottom),
            hi_bottom=_tighter(min, self.hi_bottom, other.hi_bottom),
            key_starts=_tighter(torch.maximum, self.key_starts, other.key_starts),
            key_ends=_tighter(torch.minimum, self.key_ends, other.key_ends),
            dense=_tighter(torch.logical_and, self.dense, other.dense),
        )

    @property
    def is_dense_only(self) -> bool:
        return all((value is not None) == (name == "dense") for name, value in vars(self).items())


class Mask:
    """A set of visible (query, key) pairs. Masks are immutable: neither they nor their tensors may be changed.

    Compose with `&`, `|` and `~`; Python binds `&` tighter than `|`. `~` complements within Lq x Lk.
    A subclass is a frozen dataclass that defines `_visible`, and where it can be faster than pair by pair
    `_analytic` and `_tiler`.

    Example: `causal() & (window(255, 0) | global_tokens([0]))`.
    """

    def to_dense(self, shape: MaskShape, device: torch.device | str = "cpu") -> Tensor:
        """The definition: bool, broadcastable to [B, H, Lq, Lk], True = visible.

        Args:
            shape: the index space; rows and columns beyond a sequence's own lengths are False.
            device: of the result; the mask's tensors must lie there.
        """
        device = torch.device(device)
        self._check(shape, device)
        at = Pairs.all(shape, device)
        visible = self._visible(at)
        if shape.seqlens_q is not None:
            visible = visible & (at.i < shape.length_q(at.b))
        if shape.seqlens_k is not None:
            visible = visible & (at.j < shape.length_k(at.b))
        return visible

    def lower(self, shape: MaskShape, device: torch.device | str = "cpu") -> LoweredMask:
        """The form for kernels. Block lists are built on first use, and kept for the next call of equal shape.

        Args:
            shape: the index space.
            device: of the call; the mask's tensors must lie there.

        Raises:
            ValueError: a tensor of the mask has another device, or does not fit the shape.
            RuntimeError: block lists would be built while torch.compile or export traces; see `build`.
        """
        device = torch.device(device)
        analytic = self._analytic(shape, device)
        if analytic is not None:
            return analytic
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"mask {self!r} becomes block lists, whose size depends on data and cannot be traced: "
                "build it before the compiled region, mask.build(seqlen_q, seqlen_k, batch=, heads=, device=)"
            )
        kept = self._kept()
        if kept is not None and kept[0].matches(shape, device, self):
            return kept[1]
        self._check(shape, device)
        block = build_block_mask(self._tiler(shape, device), shape, device, self._varies(shape, device))
        lowered = LoweredMask(block=block)
        # Frozen for the user; a single assignment, so threads at worst build twice.
        object.__setattr__(self, "_kept_result", (_Key.of(shape, device, self), lowered))
        return lowered

    def build(
        self, seqlen_q: int, seqlen_k: int, *, batch: int = 1, heads: int = 1, device: torch.device | str = "cpu"
    ) -> Mask:
        """The same mask with its kernel form computed now, for reuse across layers and steps and under compile.

        Args:
            seqlen_q, seqlen_k: the lengths it will be used with.
            batch, heads: batch size and number of query heads, needed only where the mask depends on them.
            device: of the calls.

        Example: `mask = (causal() | prefix(16)).build(1024, 1024)`.
        """
        shape, device = MaskShape(batch, heads, seqlen_q, seqlen_k), torch.device(device)
        lowered = self.lower(shape, device)
        by_batch, by_head = self._varies(shape, device)
        return BuiltMask(
            self, lowered, seqlen_q, seqlen_k, batch if by_batch else None, heads if by_head else None, str(device)
        )

    def __and__(self, other: Mask | Tensor) -> Mask:
        return AndMask(_flatten(AndMask, self, other))

    def __or__(self, other: Mask | Tensor) -> Mask:
        return OrMask(_flatten(OrMask, self, other))

    def __rand__(self, other: Mask | Tensor) -> Mask:
        return AndMask(_flatten(AndMask, other, self))

    def __ror__(self, other: Mask | Tensor) -> Mask:
        return OrMask(_flatten(OrMask, other, self))

    def __invert__(self) -> Mask:
        return self.mask if isinstance(self, NotMask) else NotMask(self)

    def __bool__(self) -> bool:
        raise TypeError("a mask has no truth value: compose masks with &, | and ~, not with and, or and not")

    def __eq__(self, other: object) -> bool:
        """Same structure over the same tensors (by identity, not by value)."""
        return type(self) is type(other) and self._identity() == other._identity()  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((type(self), self._identity()))

    def _identity(self) -> tuple[Any, ...]:
        return tuple(id(value) if isinstance(value, Tensor) else value for _, value in self._items())

    def _items(self) -> Iterable[tuple[str, Any]]:
        return ((field.name, getattr(self, field.name)) for field in fields(self))  # type: ignore[arg-type]

    def _kept(self) -> tuple[_Key, LoweredMask] | None:
        return self.__dict__.get("_kept_result")

    def _visible(self, at: Pairs) -> Tensor:
        """Whether each pair is visible: bool, broadcastable to the pairs' common shape."""
        raise NotImplementedError

    def _analytic(self, shape: MaskShape, device: torch.device) -> LoweredMask | None:
        """The form without block lists, where the mask has one."""
        return None

    def _tiler(self, shape: MaskShape, device: torch.device) -> Tiler:
        """What is known of whole tiles."""
        return Tiler(self._visible)

    def _check(self, shape: MaskShape, device: torch.device) -> None:
        """Raise where the mask's tensors do not fit the shape or lie elsewhere."""

    def _varies(self, shape: MaskShape, device: torch.device) -> tuple[bool, bool]:
        """Whether the mask depends on the batch entry, and on the head."""
        return False, False

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), dict(self._items()))


MaskType = TypeVar("MaskType", bound=Mask)


def register(cls: type[MaskType]) -> type[MaskType]:
    """Make a mask class a pytree node: tensors and masks are children, everything else is context."""

    def flatten(mask: MaskType) -> tuple[list[Any], tuple[Any, ...]]:
        children = {name: value for name, value in mask._items() if _is_child(value)}
        rest = tuple((name, value) for name, value in mask._items() if name not in children)
        return list(children.values()), (tuple(children), rest)

    def unflatten(children: Iterable[Any], context: tuple[Any, ...]) -> MaskType:
        names, rest = context
        return _rebuild(cls, {**dict(zip(names, children, strict=True)), **dict(rest)})

    pytree.register_pytree_node(cls, flatten, unflatten, serialized_type_name=f"fastattn.masks.{cls.__name__}")
    return cls


def _is_child(value: object) -> bool:
    if isinstance(value, tuple):
        return any(isinstance(item, Mask) for item in value)
    return isinstance(value, (Tensor, Mask, LoweredMask))


def _rebuild(cls: type[MaskType], values: dict[str, Any]) -> MaskType:
    # Leaves may be anything while a pytree is mapped, so nothing is checked.
    mask = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(mask, name, value)
    return mask


@register
@dataclass(frozen=True, eq=False, repr=False)
class AndMask(Mask):
    """Pairs visible in every mask."""

    masks: tuple[Mask, ...]

    def _visible(self, at: Pairs) -> Tensor:
        result = self.masks[0]._visible(at)
        for mask in self.masks[1:]:
            result = result & mask._visible(at)
        return result

    def _analytic(self, shape: MaskShape, device: torch.device) -> LoweredMask | None:
        result = LoweredMask()
        for mask in self.masks:
            lowered = mask._analytic(shape, device)
            if lowered is None:
                return None
            result = result & lowered
        return result

    def _tiler(self, shape: MaskShape, device: torch.device) -> Tiler:
        return _AndTiler([mask._tiler(shape, device) for mask in self.masks])

    def _check(self, shape: MaskShape, device: torch.device) -> None:
        for mask in self.masks:
            mask._check(shape, device)

    def _varies(self, shape: MaskShape, device: torch.device) -> tuple[bool, bool]:
        return _any_varies(self.masks, shape, device)

    def __repr__(self) -> str:
        return " & ".join(f"({mask!r})" if isinstance(mask, OrMask) else repr(mask) for mask in self.masks)


@register
@dataclass(frozen=True, eq=False, repr=False)
class OrMask(Mask):
    """Pairs visible in some mask."""

    masks: tuple[Mask, ...]

    def _visible(self, at: Pairs) -> Tensor:
        result = self.masks[0]._visible(at)
        for mask in self.masks[1:]:
            result = result | mask._visible(at)
        return result

    def _analytic(self, shape: MaskShape, device: torch.device) -> LoweredMask | None:
        parts = [mask._analytic(shape, device) for mask in self.masks]
        dense = [part.dense for part in parts if part is not None and part.is_dense_only]
        if len(dense) < len(parts):
            return None
        result = dense[0]
        for other in dense[1:]:
            result = torch.logical_or(result, other)  # type: ignore[arg-type]
        return LoweredMask(dense=result)

    def _tiler(self, shape: MaskShape, device: torch.device) -> Tiler:
        return _OrTiler([mask._tiler(shape, device) for mask in self.masks])

    def _check(self, shape: MaskShape, device: torch.device) -> None:
        for mask in self.masks:
            mask._check(shape, device)

    def _varies(self, shape: MaskShape, device: torch.device) -> tuple[bool, bool]:
        return _any_varies(self.masks, shape, device)

    def __repr__(self) -> str:
        return " | ".join(f"({mask!r})" if isinstance(mask, AndMask) else repr(mask) for mask in self.masks)


@register
@dataclass(frozen=True, eq=False, repr=False)
class NotMask(Mask):
    """Pairs of Lq x Lk that are not visible in the mask."""

    mask: Mask

    def _visible(self, at: Pairs) -> Tensor:
        return ~self.mask._visible(at)

    def _analytic(self, shape: MaskShape, device: torch.device) -> LoweredMask | None:
        lowered = self.mask._analytic(shape, device)
        if lowered is None or not lowered.is_dense_only:
            return None
        return replace(lowered, dense=torch.logical_not(lowered.dense))  # type: ignore[arg-type]

    def _tiler(self, shape: MaskShape, device: torch.device) -> Tiler:
        return _NotTiler(self.mask._tiler(shape, device))

    def _check(self, shape: MaskShape, device: torch.device) -> None:
        self.mask._check(shape, device)

    def _varies(self, shape: MaskShape, device: torch.device) -> tuple[bool, bool]:
        return self.mask._varies(shape, device)

    def __repr__(self) -> str:
        return f"~({self.mask!r})" if isinstance(self.mask, (AndMask, OrMask)) else f"~{self.mask!r}"


@register
@dataclass(frozen=True, eq=False, repr=False)
class BuiltMask(Mask):
    """A mask with its kernel form for given lengths. `batch` and `heads` are None where it serves any number."""

    source: Mask
    lowered: LoweredMask
    seqlen_q: int
    seqlen_k: int
    batch: int | None
    heads: int | None
    device: str

    def lower(self, shape: MaskShape, device: torch.device | str = "cpu") -> LoweredMask:
        self._check(shape, torch.device(device))
        return self.lowered

    def _visible(self, at: Pairs) -> Tensor:
        return self.source._visible(at)

    def _check(self, shape: MaskShape, device: torch.device) -> None:
        if shape.is_ragged:
            raise ValueError("a built mask has fixed lengths, got per-sequence lengths: pass the mask it was built from")
        got = (shape.batch, shape.heads, shape.seqlen_q, shape.seqlen_k)
        want = (self.batch, self.heads, self.seqlen_q, self.seqlen_k)
        if any(mine is not None and mine != size for mine, size in zip(want, got, strict=True)):
            text = ", ".join("any" if mine is None else str(mine) for mine in want)
            raise ValueError(f"mask was built for (batch, heads, seqlen_q, seqlen_k) = ({text}), got {got}")
        if torch.device(self.device).type != device.type:
            raise ValueError(f"mask must be on the call's device {device}, got one built on {self.device}")
        self.source._check(shape, device)

    def _varies(self, shape: MaskShape, device: torch.device) -> tuple[bool, bool]:
        return self.batch is not None, self.heads is not None

    def __repr__(self) -> str:
        return f"{self.source!r} built for {self.seqlen_q}x{self.seqlen_k}"


class _AndTiler(Tiler):
    def __init__(self, parts: list[Tiler]) -> None:
        self.parts = parts

    def classify(self, rows: TileRows) -> tuple[Tensor, Tensor]:
        some, every = self.parts[0].classify(rows)
        for part in self.parts[1:]:
            other_some, other_every = part.classify(rows)
            some, every = some & other_some, every & other_every
        return some, every

    def words(self, tiles: Tiles) -> Tensor:
        result = self.parts[0].words(tiles)
        for part in self.parts[1:]:
            result = result & part.words(tiles)
        return result


class _OrTiler(_AndTiler):
    def classify(self, rows: TileRows) -> tuple[Tensor, Tensor]:
        some, every = self.parts[0].classify(rows)
        for part in self.parts[1:]:
            other_some, other_every = part.classify(rows)
            some, every = some | other_some, every | other_every
        return some, every

    def words(self, tiles: Tiles) -> Tensor:
        result = self.parts[0].words(tiles)
        for part in self.parts[1:]:
            result = result | part.words(tiles)
        return result


class _NotTiler(Tiler):
    def __init__(self, part: Tiler) -> None:
        self.part = part

    def classify(self, rows: TileRows) -> tuple[Tensor, Tensor]:
        some, every = self.part.classify(rows)
        return ~every, ~some

    def words(self, tiles: Tiles) -> Tensor:
        return ~self.part.words(tiles)


@dataclass(frozen=True, eq=False)
class _Key:
    """What a kept result was built for."""

    sizes: tuple[object, ...]
    lengths: tuple[Tensor | None, Tensor | None]
    versions: tuple[int, ...] | None

    @staticmethod
    def of(shape: MaskShape, device: torch.device, mask: Mask) -> _Key:
        # Lengths are copied: decoding adds to them in place.
        lengths = [None if x is None else x.clone() for x in (shape.seqlens_q, shape.seqlens_k)]
        return _Key(_sizes(shape, device), (lengths[0], lengths[1]), _versions(mask))

    def matches(self, shape: MaskShape, device: torch.device, mask: Mask) -> bool:
        if self.sizes != _sizes(shape, device) or self.versions is None or self.versions != _versions(mask):
            return False
        return all(
            (mine is None) == (other is None) and (mine is None or other is None or torch.equal(mine, other))
            for mine, other in zip(self.lengths, (shape.seqlens_q, shape.seqlens_k), strict=True)
        )


def _sizes(shape: MaskShape, device: torch.device) -> tuple[object, ...]:
    return shape.batch, shape.heads, shape.seqlen_q, shape.seqlen_k, device


def _versions(mask: Mask) -> tuple[int, ...] | None:
    """Counters of in-place changes to the mask's tensors; inference tensors have none and count as constant."""
    leaves = (leaf for leaf in pytree.tree_leaves(mask) if isinstance(leaf, Tensor))
    return tuple(-1 if leaf.is_inference() else leaf._version for leaf in leaves)


def _any_varies(masks: Iterable[Mask], shape: MaskShape, device: torch.device) -> tuple[bool, bool]:
    answers = [mask._varies(shape, device) for mask in masks]
    return any(batch for batch, _ in answers), any(heads for _, heads in answers)


def _tighter(choose: Any, mine: Any, other: Any) -> Any:
    if mine is None or other is None:
        return other if mine is None else mine
    return choose(mine, other)


def _flatten(kind: type[AndMask] | type[OrMask], *masks: Mask | Tensor) -> tuple[Mask, ...]:
    """Operands of `kind`, nested ones of the same kind opened, built ones replaced by what they were built from."""
    result: list[Mask] = []
    for mask in masks:
        mask = as_mask(mask)
        mask = mask.source if isinstance(mask, BuiltMask) else mask
        result.extend(mask.masks if isinstance(mask, kind) else (mask,))
    return tuple(result)


def as_mask(mask: Mask | Tensor) -> Mask:
    """A mask as it is; a bool tensor as `dense(tensor)`."""
    from fastattn.masks.dense import dense  # here, since every mask's file imports this one

    return mask if isinstance(mask, Mask) else dense(mask)




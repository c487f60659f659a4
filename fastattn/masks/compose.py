"""Intersection, union and complement of masks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastattn.masks.base import LoweredMask, Mask, register
from fastattn.masks.built import BuiltMask
from fastattn.masks.space import MaskShape, Pairs
from fastattn.masks.tiles import Tiler, TileRows, Tiles

Combine = Callable[[Tensor, Tensor], Tensor]


def intersect(*masks: Mask) -> Mask:
    """Pairs visible in every mask."""
    return AndMask(_operands(AndMask, masks))


def unite(*masks: Mask) -> Mask:
    """Pairs visible in some mask."""
    return OrMask(_operands(OrMask, masks))


def complement(mask: Mask) -> Mask:
    """Pairs of Lq x Lk that are not visible in the mask."""
    mask = _source(mask)
    return mask.mask if isinstance(mask, NotMask) else NotMask(mask)


@dataclass(frozen=True, eq=False, repr=False)
class _Several(Mask):
    """Masks combined pair by pair."""

    masks: tuple[Mask, ...]

    # Logical on bool tensors and the same bit by bit on words: one operation serves pairs, tiles and bits.
    combine: ClassVar[Combine]
    symbol: ClassVar[str]

    @property
    def is_dense(self) -> bool:
        return all(mask.is_dense for mask in self.masks)

    def _visible(self, at: Pairs) -> Tensor:
        return functools.reduce(type(self).combine, [mask._visible(at) for mask in self.masks])

    def _tiler(self, shape: MaskShape, device: torch.device) -> Tiler:
        return _SeveralTiler(type(self).combine, [mask._tiler(shape, device) for mask in self.masks])

    def _check(self, shape: MaskShape, device: torch.device) -> None:
        for mask in self.masks:
            mask._check(shape, device)

    def _varies(self, shape: MaskShape, device: torch.device) -> tuple[bool, bool]:
        answers = [mask._varies(shape, device) for mask in self.masks]
        return any(batch for batch, _ in answers), any(heads for _, heads in answers)

    def __repr__(self) -> str:
        parts = (f"({mask!r})" if isinstance(mask, _Several) else repr(mask) for mask in self.masks)
        return self.symbol.join(parts)


@register
@dataclass(frozen=True, eq=False, repr=False)
class AndMask(_Several):
    """Pairs visible in every mask; bands, key ranges and bool tensors intersect without block lists."""

    combine = torch.bitwise_and
    symbol = " & "

    @property
    def needs_blocks(self) -> bool:
        return any(mask.needs_blocks for mask in self.masks)

    def _direct(self, shape: MaskShape, device: torch.device) -> LoweredMask:
        result = LoweredMask()
        for mask in self.masks:
            result = result & mask._direct(shape, device)
        return result


@register
@dataclass(frozen=True, eq=False, repr=False)
class OrMask(_Several):
    """Pairs visible in some mask."""

    combine = torch.bitwise_or
    symbol = " | "

    @property
    def needs_blocks(self) -> bool:
        return not self.is_dense

    def _direct(self, shape: MaskShape, device: torch.device) -> LoweredMask:
        return LoweredMask(dense=self._visible(Pairs.all(shape, device)))


@register
@dataclass(frozen=True, eq=False, repr=False)
class NotMask(Mask):
    """Pairs of Lq x Lk that are not visible in the mask."""

    mask: Mask

    @property
    def is_dense(self) -> bool:
        return self.mask.is_dense

    @property
    def needs_blocks(self) -> bool:
        return not self.is_dense

    def _visible(self, at: Pairs) -> Tensor:
        return ~self.mask._visible(at)

    def _direct(self, shape: MaskShape, device: torch.device) -> LoweredMask:
        return LoweredMask(dense=self._visible(Pairs.all(shape, device)))

    def _tiler(self, shape: MaskShape, device: torch.device) -> Tiler:
        return _NotTiler(self.mask._tiler(shape, device))

    def _check(self, shape: MaskShape, device: torch.device) -> None:
        self.mask._check(shape, device)

    def _varies(self, shape: MaskShape, device: torch.device) -> tuple[bool, bool]:
        return self.mask._varies(shape, device)

    def __repr__(self) -> str:
        return f"~({self.mask!r})" if isinstance(self.mask, _Several) else f"~{self.mask!r}"


class _SeveralTiler(Tiler):
    def __init__(self, combine: Combine, parts: list[Tiler]) -> None:
        self.combine, self.parts = combine, parts

    def classify(self, rows: TileRows) -> tuple[Tensor, Tensor]:
        # `some` stays an upper bound and `every` a lower bound under both operations.
        somes, everys = zip(*(part.classify(rows) for part in self.parts), strict=True)
        return functools.reduce(self.combine, somes), functools.reduce(self.combine, everys)

    def words(self, tiles: Tiles) -> Tensor:
        return functools.reduce(self.combine, [part.words(tiles) for part in self.parts])


class _NotTiler(Tiler):
    def __init__(self, part: Tiler) -> None:
        self.part = part

    def classify(self, rows: TileRows) -> tuple[Tensor, Tensor]:
        some, every = self.part.classify(rows)
        return ~every, ~some

    def words(self, tiles: Tiles) -> Tensor:
        return ~self.part.words(tiles)


def _source(mask: Mask) -> Mask:
    return mask.source if isinstance(mask, BuiltMask) else mask


def _operands(kind: type[_Several], masks: tuple[Mask, ...]) -> tuple[Mask, ...]:
    """The masks, with those of the same kind opened and built ones replaced by what they were built from."""
    result: list[Mask] = []
    for mask in map(_source, masks):
        result.extend(mask.masks if isinstance(mask, kind) else (mask,))
    return tuple(result)

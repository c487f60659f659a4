"""Masks whose kernel form is computed already: built ones, and the last result that a mask keeps."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastattn.masks.base import LoweredMask, Mask, register
from fastattn.masks.space import MaskShape, Pairs, same_device


@register
@dataclass(frozen=True, eq=False, repr=False)
class BuiltMask(Mask):
    """A mask with its kernel form for given lengths; batch or heads None: it serves any number of them.

    Composing it composes the mask it was built from.
    """

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

    def to(self, device: torch.device | str) -> Mask:
        moved = super().to(device)
        return replace(moved, device=str(torch.device(device))) if isinstance(moved, BuiltMask) else moved

    @property
    def needs_blocks(self) -> bool:
        return self.source.needs_blocks

    @property
    def is_dense(self) -> bool:
        return self.source.is_dense

    def _visible(self, at: Pairs) -> Tensor:
        return self.source._visible(at)

    def _check(self, shape: MaskShape, device: torch.device) -> None:
        if shape.is_ragged:
            raise ValueError(
                "mask must not be a built one where sequences have lengths of their own: "
                "pass the mask that it was built from"
            )
        got = (shape.batch, shape.heads, shape.seqlen_q, shape.seqlen_k)
        want = (self.batch, self.heads, self.seqlen_q, self.seqlen_k)
        if any(mine is not None and mine != size for mine, size in zip(want, got, strict=True)):
            text = ", ".join("any" if mine is None else str(mine) for mine in want)
            raise ValueError(f"mask was built for (batch, heads, seqlen_q, seqlen_k) = ({text}), got {got}")
        if not same_device(torch.device(self.device), device):
            raise ValueError(f"mask must be on the call's device {device}, got one built on {self.device}")

    def _varies(self, shape: MaskShape, device: torch.device) -> tuple[bool, bool]:
        return self.batch is not None, self.heads is not None

    def __repr__(self) -> str:
        return f"({self.source!r}).build({self.seqlen_q}, {self.seqlen_k})"


def build(mask: Mask, shape: MaskShape, device: torch.device) -> Mask:
    """The mask with its kernel form for one shape."""
    mask = mask.source if isinstance(mask, BuiltMask) else mask
    lowered = mask.lower(shape, device)
    by_batch, by_head = mask._varies(shape, device)
    batch, heads = shape.batch if by_batch else None, shape.heads if by_head else None
    return BuiltMask(mask, lowered, shape.seqlen_q, shape.seqlen_k, batch, heads, str(device))


def keep(mask: Mask, shape: MaskShape, device: torch.device) -> LoweredMask:
    """The mask's block lists: those of its last call if they still hold, else new ones, which it keeps.

    Only in-place changes to the mask's own tensors are seen, so nothing is kept of a mask that holds more.
    """
    kept = mask.__dict__.get("_kept")
    if kept is not None and kept[0].matches(shape, device, mask):
        return kept[1]
    if "torch._dynamo" in sys.modules:
        # Called in eager between compiled regions: tracing the builder's operations one by one gains nothing.
        lowered = torch.compiler.disable(mask._build_blocks)(shape, device)
    else:
        lowered = mask._build_blocks(shape, device)
    # Frozen for the user. One assignment, so threads at worst build twice.
    if mask.is_constant:
        object.__setattr__(mask, "_kept", (_Key.of(shape, device, mask), lowered))
    return lowered


@dataclass(frozen=True, eq=False)
class _Key:
    """What a kept result was built for."""

    sizes: tuple[object, ...]
    lengths: tuple[Tensor | None, ...]
    versions: tuple[int, ...]

    @staticmethod
    def of(shape: MaskShape, device: torch.device, mask: Mask) -> _Key:
        # Lengths are copied: decoding adds to them in place.
        lengths = tuple(None if x is None else x.clone() for x in (shape.seqlens_q, shape.seqlens_k))
        return _Key(_sizes(shape, device), lengths, _versions(mask))

    def matches(self, shape: MaskShape, device: torch.device, mask: Mask) -> bool:
        if self.sizes != _sizes(shape, device) or self.versions != _versions(mask):
            return False
        return all(map(_same_lengths, self.lengths, (shape.seqlens_q, shape.seqlens_k)))


def _sizes(shape: MaskShape, device: torch.device) -> tuple[object, ...]:
    return shape.batch, shape.heads, shape.seqlen_q, shape.seqlen_k, device


def _versions(mask: Mask) -> tuple[int, ...]:
    """Counters of in-place changes to the mask's tensors; inference tensors have none, so are constant."""
    versions: list[int] = []
    for value in vars(mask).values():
        if isinstance(value, Tensor):
            versions.append(-1 if value.is_inference() else value._version)
    for part in mask._parts():
        versions.extend(_versions(part))
    return tuple(versions)


def _same_lengths(mine: Tensor | None, other: Tensor | None) -> bool:
    if mine is None or other is None:
        return mine is other
    return mine.device == other.device and torch.equal(mine, other)

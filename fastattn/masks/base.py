"""What every mask can do, and the form in which it reaches kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastattn.block_mask import BlockMask
from fastattn.checks import check_int
from fastattn.masks.space import MaskShape, Pairs
from fastattn.masks.tiles import Tiler, build_block_mask

T = TypeVar("T")


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
        """Intersection of two forms without block lists."""
        return LoweredMask(
            lo_top=_tighter(max, self.lo_top, other.lo_top),
            hi_top=_tighter(min, self.hi_top, other.hi_top),
            lo_bottom=_tighter(max, self.lo_bottom, other.lo_bottom),
            hi_bottom=_tighter(min, self.hi_bottom, other.hi_bottom),
            key_starts=_tighter(torch.maximum, self.key_starts, other.key_starts),
            key_ends=_tighter(torch.minimum, self.key_ends, other.key_ends),
            dense=_tighter(torch.logical_and, self.dense, other.dense),
        )


class Mask:
    """A set of visible (query, key) pairs.

    Masks are immutable: change neither them nor the tensors they hold, make a new mask instead.
    Under `torch.vmap`, a mask that needs block lists may not hold tensors that are mapped over: give
    them, and q, k and v, a batch dimension instead.
    Compose with `&`, `|` and `~`; Python binds `&` tighter than `|`. `~` complements within Lq x Lk.

    A kind of mask is a frozen, registered dataclass that defines `_visible`. Where it can tell faster than
    pair by pair it also defines `_tiler`; where kernels read it without block lists, `needs_blocks` and
    `_direct`.

    Example: `causal() & (window(255, 0) | global_tokens([0]))`.
    """

    def to_dense(self, shape: MaskShape, device: torch.device | str = "cpu") -> Tensor:
        """The definition: bool, broadcastable to [B, H, Lq, Lk], True = visible.

        Args:
            shape: the index space; rows and columns beyond a sequence's own lengths are False.
            device: of the result; the mask's tensors must lie there.

        Raises:
            TypeError: shape is no MaskShape.
            ValueError: a tensor of the mask has another device, or does not fit the shape.
        """
        if not isinstance(shape, MaskShape):
            raise TypeError(f"shape must be a fastattn.masks.MaskShape, got {type(shape).__name__}")
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
        """The form for kernels. Block lists, once built, are kept for the next call of equal shape; those of
        a mask that holds a predicate are not, since its function may change its mind.

        Args:
            shape: the index space.
            device: of the call; the mask's tensors must lie there.

        Raises:
            ValueError: a tensor of the mask has another device, or does not fit the shape.
            RuntimeError: block lists would be built while torch.compile or export traces; see `build`.
        """
        device = torch.device(device)
        if not self.needs_blocks:
            return self._direct(shape, device)
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"mask {self!r} becomes block lists, whose size depends on data and cannot be traced: "
                "build it before the compiled region, mask.build(seqlen_q, seqlen_k, batch=, heads=, device=)"
            )
        from fastattn.masks.built import keep  # a mask's operations name the kinds of mask that import this

        return keep(self, shape, device)

    def build(
        self,
        seqlen_q: int,
        seqlen_k: int,
        *,
        batch: int = 1,
        heads: int = 1,
        device: torch.device | str = "cpu",
    ) -> Mask:
        """The same mask with its kernel form computed now: for reuse across layers and steps, or compile.

        It serves calls of exactly these lengths, so not `varlen_attention` and `decode_attention`, where each
        sequence has its own: they raise, and take the mask that was built from.

        Args:
            seqlen_q, seqlen_k: the lengths it will be used with.
            batch, heads: batch size and number of query heads; needed where the mask depends on them.
            device: of the calls.

        Raises:
            TypeError: a size is not an int.
            ValueError: a negative size; a tensor of the mask has another device, or does not fit the shape.

        Example: `mask = (causal() | prefix(16)).build(1024, 1024)`.
        """
        from fastattn.masks.built import build

        shape = MaskShape(
            check_int("batch", batch, 0),
            check_int("heads", heads, 0),
            check_int("seqlen_q", seqlen_q, 0),
            check_int("seqlen_k", seqlen_k, 0),
        )
        return build(self, shape, torch.device(device))

    def to(self, device: torch.device | str) -> Mask:
        """The mask with its tensors on another device (a predicate's function stays as it is)."""
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), self)

    def __and__(self, other: Mask | Tensor) -> Mask:
        from fastattn.masks.compose import intersect

        return intersect(self, as_mask(other))

    def __rand__(self, other: Mask | Tensor) -> Mask:
        return as_mask(other) & self

    def __or__(self, other: Mask | Tensor) -> Mask:
        from fastattn.masks.compose import unite

        return unite(self, as_mask(other))

    def __ror__(self, other: Mask | Tensor) -> Mask:
        return as_mask(other) | self

    def __invert__(self) -> Mask:
        from fastattn.masks.compose import complement

        return complement(self)

    def __bool__(self) -> bool:
        raise TypeError("a mask has no truth value: compose masks with &, | and ~, not with and, or and not")

    def __eq__(self, other: object) -> bool:
        """Same structure over the same tensors (by identity, not by value)."""
        return isinstance(other, Mask) and type(self) is type(other) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash((type(self), self._identity()))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), dict(self._items()))

    @property
    def needs_blocks(self) -> bool:
        """Whether kernels need block lists for it."""
        return True

    @property
    def is_dense(self) -> bool:
        """Whether it consists of bool tensors alone."""
        return False

    @property
    def is_constant(self) -> bool:
        """Whether it says the same for as long as its tensors do."""
        return all(part.is_constant for part in self._parts())

    def _parts(self) -> Iterator[Mask]:
        """The masks that it is composed of."""
        for value in vars(self).values():
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Mask):
                    yield part

    def _visible(self, at: Pairs) -> Tensor:
        """Whether each pair is visible: bool, broadcastable to the pairs' common shape."""
        raise NotImplementedError

    def _direct(self, shape: MaskShape, device: torch.device) -> LoweredMask:
        """The form of a mask that needs no block lists; raises as `_check` does."""
        raise NotImplementedError

    def _tiler(self, shape: MaskShape, device: torch.device) -> Tiler:
        """What is known of whole tiles."""
        return Tiler(self._visible)

    def _check(self, shape: MaskShape, device: torch.device) -> None:
        """Raise where the mask's tensors do not fit the shape or lie elsewhere."""

    def _varies(self, shape: MaskShape, device: torch.device) -> tuple[bool, bool]:
        """Whether the mask depends on the batch entry, and on the head."""
        return False, False

    def _items(self) -> list[tuple[str, Any]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]  # type: ignore[arg-type]

    def _identity(self) -> tuple[Any, ...]:
        return tuple(id(value) if isinstance(value, Tensor) else value for _, value in self._items())

    def _build_blocks(self, shape: MaskShape, device: torch.device) -> LoweredMask:
        self._check(shape, device)
        varies = self._varies(shape, device)
        return LoweredMask(block=build_block_mask(self._tiler(shape, device), shape, device, varies))


def register(cls: type[T]) -> type[T]:
    """Make a dataclass a pytree node: tensors, masks and lowered masks are children, the rest is context."""
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]

    def flatten(node: T) -> tuple[list[Any], tuple[Any, ...]]:
        values = {name: getattr(node, name) for name in names}
        children = {name: value for name, value in values.items() if _is_child(value)}
        rest = tuple((name, value) for name, value in values.items() if name not in children)
        return list(children.values()), (tuple(children), rest)

    def unflatten(children: Iterable[Any], context: tuple[Any, ...]) -> T:
        chosen, rest = context
        return _rebuild(cls, {**dict(zip(chosen, children, strict=True)), **dict(rest)})

    name = f"{cls.__module__}.{cls.__name__}"
    pytree.register_pytree_node(cls, flatten, unflatten, serialized_type_name=name)
    return cls


def _is_child(value: object) -> bool:
    if isinstance(value, tuple):
        return any(isinstance(item, Mask) for item in value)
    return isinstance(value, (Tensor, Mask, LoweredMask, BlockMask))


def _rebuild(cls: type[T], values: dict[str, Any]) -> T:
    # Leaves may be anything while a pytree is mapped, so nothing is checked.
    node = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(node, name, value)
    return node


def _tighter(choose: Callable[[Any, Any], Any], mine: Any, other: Any) -> Any:
    if mine is None or other is None:
        return other if mine is None else mine
    return choose(mine, other)


def as_mask(mask: Mask | Tensor) -> Mask:
    """A mask as it is; a bool tensor as `dense(tensor)`.

    Raises:
        TypeError: anything else.
    """
    from fastattn.masks.dense import dense

    return mask if isinstance(mask, Mask) else dense(mask)


register(LoweredMask)

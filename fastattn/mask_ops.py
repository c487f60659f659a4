"""fastattn::block_lists: building a mask's block lists as an op, so that compiled code can do it.

How many tiles a mask has depends on values, which a tracer does not know. The op therefore takes the whole
mask, written as a string with its tensors and ints beside it, and its outputs have sizes known only at run
time.
"""

from __future__ import annotations

import ast
from typing import Any

import torch
from torch import Tensor

from fastattn.block_mask import TILE, BlockMask
from fastattn.lowering import BLOCK_FIELDS
from fastattn.masks import Mask, MaskShape
from fastattn.masks.base import _rebuild
from fastattn.masks.built import BuiltMask
from fastattn.masks.predicate import Predicate

_SCHEMA = (
    "(str mask, Tensor[] tensors, SymInt[] ints, "
    "SymInt batch, SymInt heads, SymInt seqlen_q, SymInt seqlen_k, "
    "Tensor? seqlens_q, Tensor? seqlens_k, Device device) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library = torch.library.Library("fastattn", "FRAGMENT")
_library.define(f"block_lists{_SCHEMA}")


def block_lists(mask: Mask, shape: MaskShape, device: torch.device) -> BlockMask:
    """The block lists of a mask, built by the op.

    Raises:
        RuntimeError: the mask holds a predicate, which only Python can evaluate.
    """
    tensors: list[Tensor] = []
    ints: list[int] = []
    text = _encode(mask, tensors, ints)
    lists = torch.ops.fastattn.block_lists(
        text,
        tensors,
        ints,
        shape.batch,
        shape.heads,
        shape.seqlen_q,
        shape.seqlen_k,
        shape.seqlens_q,
        shape.seqlens_k,
        device,
    )
    named = dict(zip(BLOCK_FIELDS, lists, strict=True))
    return BlockMask(seqlen_q=shape.seqlen_q, seqlen_k=shape.seqlen_k, **named)


def _encode(value: Any, tensors: list[Tensor], ints: list[int]) -> str:
    """A Python literal: (kind, ...) tuples, with tensors and ints replaced by their places in the lists.

    Ints go into a list because a traced one has no digits to print.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return f"('tensor', {len(tensors) - 1})"
    if isinstance(value, BuiltMask):
        return _encode(value.source, tensors, ints)
    if isinstance(value, Predicate):
        raise RuntimeError(
            "mask holds a predicate, which compiled code cannot call: build it before the compiled region, "
            "mask.build(seqlen_q, seqlen_k, batch=, heads=, device=)"
        )
    if isinstance(value, Mask):
        parts = [f"({name!r}, {_encode(item, tensors, ints)})" for name, item in value._items()]
        return f"('mask', {type(value).__name__!r}, {', '.join(parts)})"
    if isinstance(value, tuple):
        return f"('tuple', {', '.join([_encode(item, tensors, ints) for item in value])})"
    if isinstance(value, int) and not isinstance(value, bool):
        ints.append(value)
        return f"('int', {len(ints) - 1})"
    return f"('constant', {value!r})"


def _decode(form: tuple[Any, ...], tensors: list[Tensor], ints: list[int]) -> Any:
    kind, *rest = form
    if kind == "tensor":
        return tensors[rest[0]]
    if kind == "int":
        return ints[rest[0]]
    if kind == "constant":
        return rest[0]
    if kind == "tuple":
        return tuple(_decode(item, tensors, ints) for item in rest)
    name, *items = rest
    return _rebuild(_mask_class(name), {field: _decode(item, tensors, ints) for field, item in items})


def _mask_class(name: str) -> type[Mask]:
    pending: list[type[Mask]] = [Mask]
    while pending:
        found = pending.pop()
        if found.__name__ == name:
            return found
        pending.extend(found.__subclasses__())
    raise ValueError(f"mask must be made of known classes, got {name!r}")


def _real(text: str, tensors: list[Tensor], ints: list[int], *rest: Any) -> tuple[Tensor, ...]:
    *sizes, device = rest
    block = _decode(ast.literal_eval(text), tensors, ints).lower(MaskShape(*sizes), device).block
    # Outputs may not share memory with what the mask keeps for its next use.
    return tuple(lists.clone() for lists in _fields(block))


def _fields(block: BlockMask) -> tuple[Tensor, ...]:
    return tuple(getattr(block, name) for name in BLOCK_FIELDS)


def _fake(text: str, tensors: list[Tensor], ints: list[int], *rest: Any) -> tuple[Tensor, ...]:
    *sizes, device = rest
    shape = MaskShape(*sizes)
    by_batch, by_head = _decode(ast.literal_eval(text), tensors, ints)._varies(shape, device)
    batch = shape.batch if by_batch or shape.is_ragged else 1
    heads = shape.heads if by_head else 1
    context = torch.library.get_ctx()
    tiles, bits = context.new_dynamic_size(), context.new_dynamic_size()

    def lists(*size: Any) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    rows = (shape.seqlen_q + TILE - 1) // TILE
    cols = (shape.seqlen_k + TILE - 1) // TILE
    row_lists = lists(batch, heads, rows + 1), lists(tiles), lists(tiles)
    return *row_lists, lists(batch, heads, cols + 1), lists(tiles), lists(tiles), lists(bits, TILE, 2)


_library.impl("block_lists", _real, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::block_lists", _fake, lib=_library)

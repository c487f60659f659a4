"""Packed and cached calls as plain ones, sequence by sequence: for statistics, which know only those."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastattn.biases import Bias
from fastattn.call import Call
from fastattn.masks import Mask, MaskShape, as_mask
from fastattn.masks.band import Band
from fastattn.masks.base import register
from fastattn.masks.compose import AndMask, NotMask, OrMask, complement, intersect, unite
from fastattn.masks.space import Pairs


class Part(NamedTuple):
    """A plain call on part of a batch.

    Args:
        call: of op "attention"; its v is not read.
        lse: [B, Hq, Lq] or None.
        number: which sequence of the batch, None where it is the whole batch.
        first_query: position of the first query where the call tells, else None.
    """

    call: Call
    lse: Tensor | None
    number: int | None = None
    first_query: int | None = None


def sequences(call: Call, lse: Tensor | None) -> Iterator[Part]:
    """The call itself where it is plain; else each sequence of a packed batch, or each entry of a cache.

    Args:
        call: validated.
        lse: what the call returned.
    """
    if call.op == "attention":
        yield Part(call, lse)
        return
    shape = call.mask_shape()
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        bounds_q, bounds_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
        for n in range(shape.batch):
            queries, keys = slice(bounds_q[n], bounds_q[n + 1]), slice(bounds_k[n], bounds_k[n + 1])
            q, k = call.q[queries].transpose(0, 1)[None], call.k[keys].transpose(0, 1)[None]
            part = _plain(call, shape, n, q, k)
            yield Part(part, None if lse is None else lse[None, :, queries], n, None)
    elif call.lengths is not None:
        for n, length in enumerate(call.lengths.tolist()):
            q, k = call.q[n : n + 1], _cached(call, n)[None, :, :length]
            part = _plain(call, shape, n, q, k)
            yield Part(part, None if lse is None else lse[n : n + 1], n, max(0, length - q.shape[2]))


def _cached(call: Call, n: int) -> Tensor:
    """The keys of a cache's entry: [Hkv, capacity, D]."""
    if call.block_table is None:
        return call.k[n]
    # Entries beyond a length may be anything.
    pages = call.k[call.block_table[n].long().clamp(0, max(call.k.shape[0] - 1, 0))]
    return pages.transpose(0, 1).flatten(1, 2)


def _plain(call: Call, shape: MaskShape, n: int, q: Tensor, k: Tensor) -> Call:
    """The call of sequence n alone."""
    mask = None if call.mask is None else _of_sequence(as_mask(call.mask), shape, n)
    bias = call.bias
    if isinstance(bias, Bias) and bias.batch > 1:
        bias = pytree.tree_map_only(Tensor, lambda tensor: tensor[n : n + 1], bias)
    elif isinstance(bias, Tensor):
        bias = bias[(None,) * (4 - bias.dim())]
        bias = bias[n : n + 1] if bias.shape[0] > 1 else bias
        bias = bias[..., : k.shape[2]] if bias.shape[3] > 1 else bias
    return replace(
        call,
        op="attention",
        q=q,
        k=k,
        v=k[..., :0],
        mask=mask,
        bias=bias,
        scale=call.scale_value(),
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        lengths=None,
        block_table=None,
    )


def _of_sequence(mask: Mask, shape: MaskShape, n: int) -> Mask:
    """The mask as sequence n sees it. Bands say the same of any sequence, and stay bands."""
    if isinstance(mask, Band):
        return mask
    if isinstance(mask, AndMask):
        return intersect(*(_of_sequence(part, shape, n) for part in mask.masks))
    if isinstance(mask, OrMask):
        return unite(*(_of_sequence(part, shape, n) for part in mask.masks))
    if isinstance(mask, NotMask):
        return complement(_of_sequence(mask.mask, shape, n))
    return _OneSequence(mask, shape, n)


@register
@dataclass(frozen=True, eq=False, repr=False)
class _OneSequence(Mask):
    """Pairs of one sequence that are visible in a mask of the whole batch."""

    mask: Mask
    shape: MaskShape
    number: int

    def _visible(self, at: Pairs) -> Tensor:
        b = torch.full_like(at.b, self.number)
        return self.mask._visible(Pairs(self.shape, b, at.h, at.i, at.j))

    def _varies(self, shape: MaskShape, device: torch.device) -> tuple[bool, bool]:
        return False, self.mask._varies(self.shape, device)[1]

    def __repr__(self) -> str:
        return f"{self.mask!r} of sequence {self.number}"

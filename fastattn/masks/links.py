"""Single pairs, named one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.checks import check_int
from fastattn.masks.base import Mask, register
from fastattn.masks.space import Align, MaskShape, Pairs, check_align, check_device, describe, is_integer
from fastattn.masks.tiles import TILE, Tiler, TileRows
from fastattn.spec import dtype_name


def links(pairs: Tensor | Sequence[tuple[int, int]], *, align: Align = "bottom_right") -> Mask:
    """Pairs (i, j) of which (i + offset, j) is among the given ones.

    Memory and time to build grow with the tiles that hold a pair, so that `causal() & ~links([(9, 4)])` costs
    no more than `causal()` does elsewhere.

    Args:
        pairs: (query, key) positions: int [N, 2] or Python ints. Pairs that a call does not have are ignored.
        align: which position a row stands at, as for `causal`.

    Raises:
        TypeError: not integers.
        ValueError: not pairs, unknown align, or a negative position (of a tensor: when used, on CPU).

    Example: `~links([(1, 0)])` on 2x2 is [[1, 1], [0, 1]].
    """
    check_align(align)
    if isinstance(pairs, Tensor):
        if not is_integer(pairs):
            raise TypeError(f"links pairs must be integers, got {dtype_name(pairs.dtype)}")
        if pairs.dim() != 2 or pairs.shape[1] != 2:
            raise ValueError(f"links pairs must have shape [N, 2], got {list(pairs.shape)}")
        return Links(pairs, align)
    if not isinstance(pairs, Sequence) or isinstance(pairs, str):
        raise TypeError(f"links pairs must be a tensor or a sequence of pairs, got {type(pairs).__name__}")
    found = []
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"links pairs must be (query, key) positions, got {pair!r}")
        found.append((check_int("links query", pair[0], 0), check_int("links key", pair[1], 0)))
    return Links(tuple(found), align)


@register
@dataclass(frozen=True, eq=False, repr=False)
class Links(Mask):
    """Single pairs."""

    pairs: Tensor | tuple[tuple[int, int], ...]
    align: Align

    def _pairs(self, device: torch.device) -> Tensor:
        """int64 [N, 2]."""
        if isinstance(self.pairs, Tensor):
            return check_device("links pairs", self.pairs, device).long()
        return torch.tensor(self.pairs, dtype=torch.int64, device=device).view(-1, 2)

    def _visible(self, at: Pairs) -> Tensor:
        pairs, width = self._pairs(at.j.device), at.shape.seqlen_k
        pairs = pairs[pairs[:, 1] < width]
        # One number for each pair: a key's position is less than the width, a row's may be anything.
        numbers = pairs[:, 0] * width + pairs[:, 1]
        return torch.isin(at.position(self.align) * width + at.j, numbers)

    def _tiler(self, shape: MaskShape, device: torch.device) -> Tiler:
        return _LinksTiler(self, device)

    def _check(self, shape: MaskShape, device: torch.device) -> None:
        pairs = self._pairs(device)
        # Elsewhere than on the CPU the check would wait for the device; such pairs are nowhere then.
        if isinstance(self.pairs, Tensor) and pairs.device.type == "cpu" and pairs.numel():
            least = int(pairs.min())
            if least < 0:
                raise ValueError(f"links pairs must be >= 0, got {least}")

    def _varies(self, shape: MaskShape, device: torch.device) -> tuple[bool, bool]:
        return shape.is_ragged and self.align == "bottom_right", False

    def __repr__(self) -> str:
        align = "" if self.align == "bottom_right" else f", align={self.align!r}"
        pairs = describe(self.pairs) if isinstance(self.pairs, Tensor) else str(list(self.pairs))
        return f"links({pairs}{align})"


class _LinksTiler(Tiler):
    """A tile without a pair is empty; the others are looked at."""

    def __init__(self, mask: Links, device: torch.device) -> None:
        super().__init__(mask._visible)
        self.pairs, self.align = mask._pairs(device), mask.align

    def classify(self, rows: TileRows) -> tuple[Tensor, Tensor]:
        query, key = self.pairs[:, 0], self.pairs[:, 1]
        row_first, row_last = rows.position(self.align)
        in_row = (row_first <= query) & (query <= row_last)  # [R, N]
        in_col = (key >= rows.j_first.T) & (key < rows.j_first.T + TILE)  # [nk, N]
        some = in_row.float() @ in_col.float().T > 0
        return some, torch.zeros_like(some)

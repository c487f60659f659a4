"""Documents packed into one sequence, which do not see each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.block_mask import pack
from fastattn.masks.base import Mask, register
from fastattn.masks.space import MaskShape, Pairs, check_batch, check_device, describe, is_integer, lookup
from fastattn.masks.tiles import Tiler, TileRows, Tiles, tile_bounds
from fastattn.spec import dtype_name


def documents(q_ids: Tensor, k_ids: Tensor | None = None) -> Mask:
    """Pairs with q_ids[b, i] == k_ids[b, j]: equal ids see each other.

    Args:
        q_ids: int [B, Lq] (B may be 1) or [Lq]. Ids that do not decrease along a sequence build fastest.
        k_ids: int [B, Lk] or [Lk]; None for q_ids.

    Raises:
        TypeError: not integer tensors.
        ValueError: other dimensions, or, when used, sizes that do not fit the call.

    Example: `causal() & documents(torch.tensor([0, 0, 1]))` is [[1, 0, 0], [1, 1, 0], [0, 0, 1]].
    """
    for name, ids in (("q_ids", q_ids), ("k_ids", k_ids)):
        if ids is None and name == "k_ids":
            continue
        if not isinstance(ids, Tensor):
            raise TypeError(f"documents {name} must be an integer tensor, got {type(ids).__name__}")
        if not is_integer(ids):
            raise TypeError(f"documents {name} must be an integer tensor, got {dtype_name(ids.dtype)}")
        if ids.dim() not in (1, 2):
            raise ValueError(f"documents {name} must have 1 or 2 dimensions, got shape {list(ids.shape)}")
    return Documents(q_ids, k_ids)


@register
@dataclass(frozen=True, eq=False, repr=False)
class Documents(Mask):
    """Equal ids see each other."""

    q_ids: Tensor
    k_ids: Tensor | None

    def _ids(self, shape: MaskShape, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids [B|1, Lq] and [B|1, Lk]."""
        result = []
        for name, ids, length in (
            ("q_ids", self.q_ids, shape.seqlen_q),
            ("k_ids", self.q_ids if self.k_ids is None else self.k_ids, shape.seqlen_k),
        ):
            check_device(f"documents {name}", ids, device)
            ids = ids[None] if ids.dim() == 1 else ids
            check_batch(f"documents {name}", ids.shape[0], shape.batch)
            if ids.shape[1] != length:
                given = (
                    " (q_ids, since no k_ids were given)" if name == "k_ids" and self.k_ids is None else ""
                )
                raise ValueError(f"documents {name} must have length {length}, got {ids.shape[1]}{given}")
            result.append(ids)
        return result[0], result[1]

    def _visible(self, at: Pairs) -> Tensor:
        q_ids, k_ids = self._ids(at.shape, at.j.device)
        return lookup(q_ids, at.b, at.i) == lookup(k_ids, at.b, at.j)

    def _tiler(self, shape: MaskShape, device: torch.device) -> Tiler:
        return _DocumentsTiler(*self._ids(shape, device))

    def _check(self, shape: MaskShape, device: torch.device) -> None:
        self._ids(shape, device)

    def _varies(self, shape: MaskShape, device: torch.device) -> tuple[bool, bool]:
        return any(ids.shape[0] > 1 for ids in self._ids(shape, device)), False

    def __repr__(self) -> str:
        k_ids = "" if self.k_ids is None else f", {describe(self.k_ids)}"
        return f"documents({describe(self.q_ids)}{k_ids})"


class _DocumentsTiler(Tiler):
    """Tiles by the smallest and largest id of their rows and columns: disjoint ranges share no id."""

    def __init__(self, q_ids: Tensor, k_ids: Tensor) -> None:
        self.q_ids, self.k_ids = q_ids, k_ids
        self.q_bounds, self.k_bounds = tile_bounds(q_ids), tile_bounds(k_ids)

    def classify(self, rows: TileRows) -> tuple[Tensor, Tensor]:
        q_min, q_max = (lookup(bound, rows.b, rows.row) for bound in self.q_bounds)
        k_min, k_max = (lookup(bound, rows.b, rows.col) for bound in self.k_bounds)
        some = (q_min <= k_max) & (k_min <= q_max)
        every = (q_min == k_max) & (k_min == q_max)
        return some, every

    def words(self, tiles: Tiles) -> Tensor:
        q_ids, k_ids = lookup(self.q_ids, tiles.b, tiles.i), lookup(self.k_ids, tiles.b, tiles.j)
        # A lone id has lost its dimension in the lookup.
        q_ids, k_ids = (ids.expand(tiles.i.shape) for ids in (q_ids, k_ids))
        return pack(q_ids[:, :, None] == k_ids[:, None, :])

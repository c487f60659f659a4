"""Keys up to a query's, by numbers that each of them has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.block_mask import pack
from fastattn.masks.base import Mask, register
from fastattn.masks.space import MaskShape, Pairs, describe, lookup
from fastattn.masks.tiles import Tiler, TileRows, Tiles, tile_bounds


@register
@dataclass(frozen=True, eq=False, repr=False)
class Ordered(Mask):
    """k_values[b, j] <= q_values[b, i]: a causal mask by position in packed sequences, for example.

    Args:
        q_values: int64 [B|1, Lq].
        k_values: int64 [B|1, Lk].
    """

    q_values: Tensor
    k_values: Tensor

    def _visible(self, at: Pairs) -> Tensor:
        return lookup(self.k_values, at.b, at.j) <= lookup(self.q_values, at.b, at.i)

    def _tiler(self, shape: MaskShape, device: torch.device) -> Tiler:
        return _OrderedTiler(self.q_values, self.k_values)

    def _varies(self, shape: MaskShape, device: torch.device) -> tuple[bool, bool]:
        return self.q_values.shape[0] > 1 or self.k_values.shape[0] > 1, False

    def __repr__(self) -> str:
        return f"Ordered({describe(self.q_values)}, {describe(self.k_values)})"


class _OrderedTiler(Tiler):
    """Tiles by the smallest and largest number of their rows and columns."""

    def __init__(self, q_values: Tensor, k_values: Tensor) -> None:
        self.q_values, self.k_values = q_values, k_values
        self.q_bounds, self.k_bounds = tile_bounds(q_values), tile_bounds(k_values)

    def classify(self, rows: TileRows) -> tuple[Tensor, Tensor]:
        q_min, q_max = (lookup(bound, rows.b, rows.row) for bound in self.q_bounds)
        k_min, k_max = (lookup(bound, rows.b, rows.col) for bound in self.k_bounds)
        return k_min <= q_max, k_max <= q_min

    def words(self, tiles: Tiles) -> Tensor:
        queries, keys = lookup(self.q_values, tiles.b, tiles.i), lookup(self.k_values, tiles.b, tiles.j)
        # A lone number has lost its dimension in the lookup.
        queries, keys = (numbers.expand(tiles.i.shape) for numbers in (queries, keys))
        return pack(keys[:, None, :] <= queries[:, :, None])

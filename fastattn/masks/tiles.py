"""Build a BlockMask: classify 64x64 tiles as empty, full or unknown, and evaluate only the unknown ones.

A mask gives a `Tiler`: what it knows of whole tiles, and the bits of single ones. Tilers compose as masks do.
Everything works on strips of tile rows, so that memory beyond the result stays bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.block_mask import TILE, BlockMask, pack
from fastattn.masks.space import Align, MaskShape, Pairs

# Tiles classified at once: a few MB of temporaries, enough to hide the cost of launching torch operations.
STRIP_TILES = 1 << 18
# Unknown tiles evaluated at once: 2048 * 4096 pairs, 8 MB as bool.
BATCH_TILES = 2048
# Odd 64-bit constants with well spread bits (from the golden ratio, and from splitmix64), for hashing.
_ODD_A = 0x1E3779B97F4A7C15
_ODD_B = 0x3F58476D1CE4E5B9


@dataclass(frozen=True, eq=False)
class TileRows:
    """A strip of R rows of tiles, each against all nk key tiles; first and last are inclusive."""

    shape: MaskShape
    b: Tensor  # int64 [R, 1]
    h: Tensor  # int64 [R, 1]
    row: Tensor  # int64 [R, 1]  tile index
    col: Tensor  # int64 [1, nk]
    i_first: Tensor  # int64 [R, 1]
    i_last: Tensor  # int64 [R, 1]
    j_first: Tensor  # int64 [1, nk]
    j_last: Tensor  # int64 [R|1, nk]

    @staticmethod
    def make(shape: MaskShape, b: Tensor, h: Tensor, row: Tensor, cols: int) -> TileRows:
        col = torch.arange(cols, device=row.device)[None]
        i_last = clamp_max(row * TILE + TILE - 1, shape.length_q(b) - 1)
        j_last = clamp_max(col * TILE + TILE - 1, shape.length_k(b) - 1)
        return TileRows(shape, b, h, row, col, row * TILE, i_last, col * TILE, j_last)

    def position(self, align: Align) -> tuple[Tensor, Tensor]:
        """Key positions of the first and last row: [R, 1] each."""
        offset = self.shape.offset(align, self.b)
        return self.i_first + offset, self.i_last + offset


@dataclass(frozen=True, eq=False)
class Tiles:
    """T single tiles; rows and columns are clamped into the index space, so that any lookup is in bounds."""

    shape: MaskShape
    b: Tensor  # int64 [T, 1]
    h: Tensor  # int64 [T, 1]
    row: Tensor  # int64 [T, 1]  tile index
    col: Tensor  # int64 [T, 1]
    i: Tensor  # int64 [T, 64]
    j: Tensor  # int64 [T, 64]

    @staticmethod
    def make(shape: MaskShape, b: Tensor, h: Tensor, row: Tensor, col: Tensor) -> Tiles:
        step = torch.arange(TILE, device=row.device)[None]
        i = (row * TILE + step).clamp_(max=shape.seqlen_q - 1)
        j = (col * TILE + step).clamp_(max=shape.seqlen_k - 1)
        return Tiles(shape, b, h, row, col, i, j)

    def position(self, align: Align) -> Tensor:
        """Key position of each row: int64 [T, 64]."""
        return self.i + self.shape.offset(align, self.b)

    def pairs(self) -> Pairs:
        """Indices of every pair: b, h [T,1,1,1], i [T,1,64,1], j [T,1,1,64]."""
        b, h = self.b[..., None, None], self.h[..., None, None]
        return Pairs(self.shape, b, h, self.i[:, None, :, None], self.j[:, None, None, :])

    def inside(self) -> Tensor:
        """Words of the pairs that exist: int64 [T, 64]."""
        step = torch.arange(TILE, device=self.row.device)[None]
        stop = self.shape.length_k(self.b) - self.col * TILE
        rows = self.row * TILE + step < self.shape.length_q(self.b)
        return torch.where(rows, low_words(stop), 0)


class Tiler:
    """What a mask knows about tiles: this one knows nothing of whole tiles and asks the mask pair by pair."""

    def __init__(self, visible: Callable[[Pairs], Tensor]) -> None:
        self.visible = visible

    def classify(self, rows: TileRows) -> tuple[Tensor, Tensor]:
        """(some, every), bool, broadcastable to [R, nk].

        `some` False: no pair of the tile is visible. `every` True: all of them are. Otherwise unknown.
        """
        unknown = torch.ones(1, 1, dtype=torch.bool, device=rows.row.device)
        return unknown, ~unknown

    def words(self, tiles: Tiles) -> Tensor:
        """Visible columns of each row as bits: int64, broadcastable to [T, 64]."""
        visible = self.visible(tiles.pairs())
        return pack(visible.expand(tiles.row.shape[0], 1, TILE, TILE)[:, 0])


def clamp_max(value: Tensor, bound: int | Tensor) -> Tensor:
    return torch.minimum(value, bound) if isinstance(bound, Tensor) else value.clamp(max=bound)


def low_words(count: Tensor) -> Tensor:
    """Words whose lowest `count` bits are set, count clamped to [0, 64]."""
    # A shift by 64 is undefined, hence two shifts of at most 63 and 1.
    count = count.clamp(0, TILE)
    shift = (count - 1).clamp_(min=0)
    return torch.where(count > 0, ~((-2) << shift), 0)


def range_words(first: Tensor, stop: Tensor) -> Tensor:
    """Words of the columns first <= c < stop."""
    return low_words(stop) & ~low_words(first)


def tile_bounds(values: Tensor) -> tuple[Tensor, Tensor]:
    """Minima and maxima of the runs of 64 along the last dimension: [..., n] to [..., ceil(n / 64)] each."""
    length = values.shape[-1]
    count = -(-length // TILE)
    index = torch.arange(count * TILE, device=values.device).clamp_(max=max(length - 1, 0))
    runs = values[..., index].unflatten(-1, (count, TILE))
    if count == 0:
        return runs.sum(-1), runs.sum(-1)
    return runs.amin(-1), runs.amax(-1)


def build_block_mask(
    tiler: Tiler, shape: MaskShape, device: torch.device, varies: tuple[bool, bool]
) -> BlockMask:
    """Lists of the tiles in which a mask lets some pair through.

    Args:
        tiler: of the whole mask.
        shape: the index space.
        device: where the lists go.
        varies: whether the mask depends on the batch entry, and on the head.
    """
    batch = shape.batch if varies[0] or shape.is_ragged else 1
    heads = shape.heads if varies[1] else 1
    # Declared lengths may exceed every sequence's; of the empty tiles beyond, only pointers need to tell.
    rows = -(-_longest(shape.seqlen_q, shape.seqlens_q) // TILE)
    cols = -(-_longest(shape.seqlen_k, shape.seqlens_k) // TILE)
    # Tensors of an empty batch have no entry that could stand for all, and there is nothing to look at.
    total = batch * heads * rows if cols and shape.batch and shape.heads else 0
    strips = []
    step = max(1, STRIP_TILES // max(cols, 1))
    for start in range(0, total, step):
        flat = torch.arange(start, min(start + step, total), device=device)
        strips.append(_build_strip(tiler, shape, flat, heads, rows, cols))
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    flat, tile = (torch.cat([strip[n] for strip in strips] or [empty]) for n in (0, 1))
    words, index = _merge_bits([(strip[2], strip[3]) for strip in strips], device)
    row_ptr = _pad(_pointers(flat, batch, heads, rows), -(-shape.seqlen_q // TILE))
    # Stable, so that query tiles stay ascending within each key tile.
    column = flat.div(max(rows, 1), rounding_mode="floor") * cols + tile
    column, order = torch.sort(column, stable=True)
    return BlockMask(
        row_ptr=row_ptr,
        row_tiles=tile.to(torch.int32),
        row_bits=index.to(torch.int32),
        col_ptr=_pad(_pointers(column, batch, heads, cols), -(-shape.seqlen_k // TILE)),
        col_tiles=(flat % max(rows, 1))[order].to(torch.int32),
        col_bits=index[order].to(torch.int32),
        bits=words.view(torch.int32).view(-1, TILE, 2),
        seqlen_q=shape.seqlen_q,
        seqlen_k=shape.seqlen_k,
    )


def _build_strip(
    tiler: Tiler, shape: MaskShape, flat: Tensor, heads: int, rows: int, cols: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(flat row [n], key tile [n], bit index [n] or -1, words [t, 64]) of one strip of tile rows."""
    row = flat[:, None]
    group = row.div(rows, rounding_mode="floor")
    at = TileRows.make(
        shape, group.div(heads, rounding_mode="floor"), group % heads, row - group * rows, cols
    )
    some, every = tiler.classify(at)
    exists = (at.i_first <= at.i_last) & (at.j_first <= at.j_last)
    kept, tile = (some & exists).nonzero(as_tuple=True)
    every = every.expand(flat.shape[0], cols)[kept, tile]
    index = torch.full_like(tile, -1)
    pending = (~every).nonzero().squeeze(1)
    found: list[tuple[Tensor, Tensor]] = []
    for chosen in pending.split(BATCH_TILES) if pending.numel() else ():
        where = kept[chosen]
        tiles = Tiles.make(shape, at.b[where], at.h[where], at.row[where], tile[chosen][:, None])
        inside = tiles.inside()
        words = tiler.words(tiles) & inside
        is_full = (words == inside).all(1)
        # -1 full, -2 empty, otherwise an index into this batch's distinct words.
        is_empty = (words == 0).all(1)
        partial = (~(is_full | is_empty)).nonzero().squeeze(1)
        local = torch.where(is_empty, -2, -1)
        distinct, inverse = _distinct(words[partial])
        local[partial] = inverse
        found.append((local, distinct))
    if found:
        words, local = _merge_bits(found, flat.device)
        index[pending] = local
    else:
        words = torch.zeros(0, TILE, dtype=torch.int64, device=flat.device)
    live = (index != -2).nonzero().squeeze(1)
    return flat[kept[live]], tile[live], index[live], words


def _merge_bits(parts: list[tuple[Tensor, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Join parts (index [n], words [t, 64]) into one deduplicated (words, index); negative indices stay."""
    if not parts:
        return torch.zeros(0, TILE, dtype=torch.int64, device=device), torch.zeros(
            0, dtype=torch.int64, device=device
        )
    if len(parts) == 1:
        return parts[0][1], parts[0][0]
    shifted, base = [], 0
    for index, words in parts:
        shifted.append(torch.where(index >= 0, index + base, index))
        base += words.shape[0]
    joined = torch.cat(shifted)
    if base == 0:
        return parts[0][1], joined
    distinct, inverse = _distinct(torch.cat([words for _, words in parts]))
    return distinct, torch.where(joined >= 0, inverse[joined.clamp(min=0)], joined)


def _distinct(words: Tensor) -> tuple[Tensor, Tensor]:
    """Unique rows of int64 [n, 64], and for each row its index among them.

    Rows are compared by a 64-bit hash, then it is checked that equal hashes meant equal rows.
    """
    if words.shape[0] == 0:
        return words, words.new_zeros(0)
    step = torch.arange(1, TILE + 1, device=words.device)
    # Each word is scrambled so that no bit is lost at the top, then weighted by its row's own odd number.
    mixed = words * _ODD_A
    mixed ^= mixed >> 32
    mixed *= (step * _ODD_B) | 1
    codes = mixed.sum(1)
    _, inverse = torch.unique(codes, return_inverse=True)
    count = int(inverse.max()) + 1
    chosen = torch.zeros(count, dtype=torch.int64, device=words.device)
    chosen.scatter_(0, inverse, torch.arange(words.shape[0], device=words.device))
    distinct = words[chosen]
    if torch.equal(distinct[inverse], words):
        return distinct, inverse
    distinct, inverse = torch.unique(words, dim=0, return_inverse=True)
    return distinct, inverse


def _longest(declared: int, lengths: Tensor | None) -> int:
    """The longest length where they are given, at most the declared one."""
    if lengths is None or lengths.numel() == 0:
        return declared
    return max(0, min(declared, int(lengths.max())))


def _pad(pointers: Tensor, rows: int) -> Tensor:
    """Pointers of further, empty rows after those there are."""
    missing = rows + 1 - pointers.shape[2]
    if missing == 0:
        return pointers
    return torch.cat([pointers, pointers[:, :, -1:].expand(-1, -1, missing)], 2)


def _pointers(sorted_rows: Tensor, batch: int, heads: int, rows: int) -> Tensor:
    """Offsets int32 [batch, heads, rows + 1] of each row's run in a sorted list of flat row numbers."""
    groups = batch * heads
    bounds = torch.searchsorted(sorted_rows, torch.arange(groups * rows + 1, device=sorted_rows.device))
    first = torch.arange(groups, device=bounds.device)[:, None] * rows
    index = first + torch.arange(rows + 1, device=bounds.device)
    return bounds[index].to(torch.int32).view(batch, heads, rows + 1)

"""Masks against definitions written out pair by pair, in every form that kernels read."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch._dynamo.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import fastattn
from fastattn.masks import (
    LoweredMask,
    Mask,
    MaskShape,
    blocks,
    causal,
    dense,
    documents,
    global_tokens,
    links,
    padding,
    predicate,
    prefix,
    window,
)

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pair:
    """Where a definition is evaluated: indices and the sequence's own lengths."""

    b: int
    h: int
    i: int
    j: int
    len_q: int
    len_k: int

    def position(self, align: str) -> int:
        return self.i + (self.len_k - self.len_q if align == "bottom_right" else 0)


Definition = Callable[[Pair], bool]


def by_definition(definition: Definition, shape: MaskShape) -> Tensor:
    """Dense bool [B, H, Lq, Lk], one Python call a pair."""
    lens_q = [shape.seqlen_q] * shape.batch if shape.seqlens_q is None else shape.seqlens_q.tolist()
    lens_k = [shape.seqlen_k] * shape.batch if shape.seqlens_k is None else shape.seqlens_k.tolist()
    result = torch.zeros(shape.batch, shape.heads, shape.seqlen_q, shape.seqlen_k, dtype=torch.bool)
    for b in range(shape.batch):
        for h in range(shape.heads):
            rows = [
                [definition(Pair(b, h, i, j, lens_q[b], lens_k[b])) for j in range(lens_k[b])]
                for i in range(lens_q[b])
            ]
            if lens_q[b] and lens_k[b]:
                result[b, h, : lens_q[b], : lens_k[b]] = torch.tensor(rows)
    return result


def expand(lowered: LoweredMask, shape: MaskShape) -> Tensor:
    """What a kernel would make of a lowered mask: dense bool [B, H, Lq, Lk]."""
    lens_q = torch.full((shape.batch,), shape.seqlen_q) if shape.seqlens_q is None else shape.seqlens_q
    lens_k = torch.full((shape.batch,), shape.seqlen_k) if shape.seqlens_k is None else shape.seqlens_k
    i = torch.arange(shape.seqlen_q)[:, None]
    j = torch.arange(shape.seqlen_k)[None]
    result = torch.ones(shape.batch, shape.heads, shape.seqlen_q, shape.seqlen_k, dtype=torch.bool)
    for b in range(shape.batch):
        offset = int(lens_k[b]) - int(lens_q[b])
        visible = (i < lens_q[b]) & (j < lens_k[b])
        for lo, hi, at in (
            (lowered.lo_top, lowered.hi_top, 0),
            (lowered.lo_bottom, lowered.hi_bottom, offset),
        ):
            visible &= torch.tensor(True) if lo is None else j >= i + at + lo
            visible &= torch.tensor(True) if hi is None else j <= i + at + hi
        for bound, keeps in ((lowered.key_starts, torch.ge), (lowered.key_ends, torch.lt)):
            if bound is not None:
                assert bound.dtype == torch.int32 and bound.is_contiguous()
                visible &= keeps(j, bound.expand(shape.batch, shape.seqlen_q)[b][:, None])
        result[b] &= visible
    if lowered.dense is not None:
        assert lowered.dense.dtype == torch.bool and lowered.dense.dim() == 4
        result &= lowered.dense
    if lowered.block is not None:
        check_block(lowered, shape)
        # Full tiles are clipped to a sequence's own lengths, as kernels do.
        result &= lowered.block.to_dense()
    return result


def check_block(lowered: LoweredMask, shape: MaskShape) -> None:
    """Both lists say the same, ascending; no tile is kept in a form that a cheaper one could have."""
    block = lowered.block
    assert block is not None
    assert all(x.dtype == torch.int32 for x in pytree.tree_leaves(block))
    assert all(getattr(lowered, name) is None for name in vars(lowered) if name != "block")
    batch, heads, rows = block.row_ptr.shape[0], block.row_ptr.shape[1], block.row_ptr.shape[2] - 1
    cols = block.col_ptr.shape[2] - 1
    assert (rows, cols) == (-(-shape.seqlen_q // 64), -(-shape.seqlen_k // 64))
    assert batch in (1, shape.batch) and heads in (1, shape.heads)
    by_row, by_col = set(), set()
    row_ptr, col_ptr = block.row_ptr.flatten(0, 1).tolist(), block.col_ptr.flatten(0, 1).tolist()
    row_tiles, row_bits = block.row_tiles.tolist(), block.row_bits.tolist()
    col_tiles, col_bits = block.col_tiles.tolist(), block.col_bits.tolist()
    for group in range(batch * heads):
        for row in range(rows):
            span = slice(row_ptr[group][row], row_ptr[group][row + 1])
            assert row_tiles[span] == sorted(set(row_tiles[span]))
            by_row |= {(group, row, *item) for item in zip(row_tiles[span], row_bits[span], strict=True)}
        for col in range(cols):
            span = slice(col_ptr[group][col], col_ptr[group][col + 1])
            assert col_tiles[span] == sorted(set(col_tiles[span]))
            by_col |= {
                (group, tile, col, bits) for tile, bits in zip(col_tiles[span], col_bits[span], strict=True)
            }
    assert by_row == by_col and len(by_row) == len(row_tiles) == len(col_tiles)
    used = {bits for _, _, _, bits in by_row if bits >= 0}
    assert used == set(range(block.bits.shape[0]))
    assert len({tuple(tile) for tile in block.bits.flatten(1).tolist()}) == block.bits.shape[0]
    assert all(any(tile) for tile in block.bits.flatten(1).tolist())


def check(mask: Mask, definition: Definition, shape: MaskShape) -> None:
    """Definition, dense form and kernel form agree."""
    want = by_definition(definition, shape)
    full = (shape.batch, shape.heads, shape.seqlen_q, shape.seqlen_k)
    assert torch.equal(mask.to_dense(shape, CPU).expand(full), want)
    assert torch.equal(expand(mask.lower(shape, CPU), shape), want)


# --- random masks -------------------------------------------------------------------------------------------


@st.composite
def shapes(draw: st.DrawFn) -> MaskShape:
    large = draw(st.booleans())
    batch, heads = draw(st.sampled_from([(1, 1), (2, 1)] if large else [(1, 1), (2, 1), (1, 3), (3, 2)]))
    length = st.integers(60, 140) if large else st.integers(0, 12)
    seqlen_q, seqlen_k = draw(length), draw(length)
    ragged = draw(st.sampled_from(["no", "no", "varlen", "caches"]))
    lens_q = lens_k = None
    if ragged == "varlen":
        lens_q = torch.tensor([draw(st.integers(0, seqlen_q)) for _ in range(batch)], dtype=torch.int32)
    if ragged != "no":
        lens_k = torch.tensor([draw(st.integers(0, seqlen_k)) for _ in range(batch)], dtype=torch.int32)
    return MaskShape(batch, heads, seqlen_q, seqlen_k, lens_q, lens_k)


aligns = st.sampled_from(["bottom_right", "top_left"])


def draw_tensor(draw: st.DrawFn, sizes: list[int], low: int, high: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(low, high + 1, sizes, generator=generator)


def draw_causal(draw: st.DrawFn, shape: MaskShape) -> tuple[Mask, Definition]:
    align = draw(aligns)
    return causal(align=align), lambda p: p.j <= p.position(align)


def draw_window(draw: st.DrawFn, shape: MaskShape) -> tuple[Mask, Definition]:
    align = draw(aligns)
    side = st.none() | st.integers(0, 80)
    left, right = draw(side), draw(side)

    def definition(p: Pair) -> bool:
        after = left is None or p.position(align) - left <= p.j
        return after and (right is None or p.j <= p.position(align) + right)

    return window(left, right, align=align), definition


def draw_padding(draw: st.DrawFn, shape: MaskShape) -> tuple[Mask, Definition]:
    def bound() -> tuple[Tensor, list[list[int]]]:
        batch = draw(st.sampled_from([1, shape.batch]))
        per_query = draw(st.booleans())
        sizes = [batch, draw(st.sampled_from([1, shape.seqlen_q]))] if per_query else [batch]
        value = draw_tensor(draw, sizes, 0, shape.seqlen_k + 1)
        table = value.reshape(batch, -1).expand(shape.batch, shape.seqlen_q).tolist()
        return value.to(draw(st.sampled_from([torch.int64, torch.int32]))), table

    lengths, end = bound()
    if draw(st.booleans()):
        return padding(lengths), lambda p: p.j < end[p.b][p.i]
    starts, start = bound()
    return padding(lengths, starts), lambda p: start[p.b][p.i] <= p.j < end[p.b][p.i]


def draw_documents(draw: st.DrawFn, shape: MaskShape) -> tuple[Mask, Definition]:
    def ids(length: int) -> tuple[Tensor, list[list[int]]]:
        batch = draw(st.sampled_from([1, shape.batch]))
        value = draw_tensor(draw, [batch, length], -1, 3)
        if draw(st.booleans()):
            value = value.sort(dim=1).values
        table = value.expand(shape.batch, length).tolist()
        return value[0] if batch == 1 and draw(st.booleans()) else value, table

    q_ids, q_table = ids(shape.seqlen_q)
    if shape.seqlen_q == shape.seqlen_k and draw(st.booleans()):
        return documents(q_ids), lambda p: q_table[p.b][p.i] == q_table[p.b][p.j]
    k_ids, k_table = ids(shape.seqlen_k)
    return documents(q_ids, k_ids), lambda p: q_table[p.b][p.i] == k_table[p.b][p.j]


def draw_prefix(draw: st.DrawFn, shape: MaskShape) -> tuple[Mask, Definition]:
    lengths = draw_tensor(draw, [draw(st.sampled_from([1, shape.batch]))], 0, shape.seqlen_k)
    table = lengths.expand(shape.batch).tolist()
    return prefix(lengths), lambda p: p.j < table[p.b]


def draw_global_tokens(draw: st.DrawFn, shape: MaskShape) -> tuple[Mask, Definition]:
    align = draw(aligns)
    if draw(st.booleans()):
        index = draw(st.lists(st.integers(0, shape.seqlen_k + 2), max_size=3))
        given_index = index if draw(st.booleans()) else torch.tensor(index, dtype=torch.int64)
        return (
            global_tokens(given_index, align=align),
            lambda p: p.j in index or p.position(align) in index,
        )
    flags = draw_tensor(draw, [draw(st.sampled_from([1, shape.batch])), shape.seqlen_k], 0, 9) == 0
    table = flags.expand(shape.batch, shape.seqlen_k).tolist()

    def definition(p: Pair) -> bool:
        at = p.position(align)
        return table[p.b][p.j] or (0 <= at < shape.seqlen_k and table[p.b][at])

    return global_tokens(flags, align=align), definition


def draw_links(draw: st.DrawFn, shape: MaskShape) -> tuple[Mask, Definition]:
    align = draw(aligns)
    pair = st.tuples(st.integers(0, shape.seqlen_q + 2), st.integers(0, shape.seqlen_k + 2))
    pairs = draw(st.lists(pair, max_size=6))
    given_pairs = pairs if draw(st.booleans()) else torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return links(given_pairs, align=align), lambda p: (p.position(align), p.j) in pairs


def draw_blocks(draw: st.DrawFn, shape: MaskShape) -> tuple[Mask, Definition]:
    size = draw(st.sampled_from([1, 3, 16, 32, 50, 64, 100, 128]))
    batch, heads = draw(st.sampled_from([1, shape.batch])), draw(st.sampled_from([1, shape.heads]))
    counts = [-(-shape.seqlen_q // size), -(-shape.seqlen_k // size)]
    layout = draw_tensor(draw, [batch, heads, *counts], 0, draw(st.integers(1, 3))) == 0
    table = layout.expand(shape.batch, shape.heads, *counts).tolist()
    given_layout = layout[0, 0] if batch == heads == 1 and draw(st.booleans()) else layout
    return blocks(given_layout, size), lambda p: table[p.b][p.h][p.i // size][p.j // size]


def draw_dense(draw: st.DrawFn, shape: MaskShape) -> tuple[Mask, Definition]:
    if shape.seqlens_q is not None:
        return draw_causal(draw, shape)
    full = [shape.batch, shape.heads, shape.seqlen_q, shape.seqlen_k]
    sizes = [draw(st.sampled_from([1, size])) for size in full]
    value = draw_tensor(draw, sizes, 0, 3) > 0
    table = value.expand(full).tolist()
    while value.dim() > 1 and value.shape[0] == 1 and draw(st.booleans()):
        value = value[0]
    return dense(value), lambda p: table[p.b][p.h][p.i][p.j]


def draw_predicate(draw: st.DrawFn, shape: MaskShape) -> tuple[Mask, Definition]:
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return predicate(lambda b, h, i, j: (i - j) % 4 == 0), lambda p: (p.i - p.j) % 4 == 0
    if kind == 1:
        return predicate(lambda b, h, i, j: (b + i + j) % 3 == 0), lambda p: (p.b + p.i + p.j) % 3 == 0
    if kind == 2:
        return predicate(lambda b, h, i, j: j < 70), lambda p: p.j < 70
    table = draw_tensor(draw, [shape.heads, max(shape.seqlen_q, 1)], 0, 1) == 0
    rows = table.tolist()
    return predicate(lambda b, h, i, j: table[h, i] | (j == 0)), lambda p: rows[p.h][p.i] or p.j == 0


KINDS = {
    "causal": draw_causal,
    "window": draw_window,
    "padding": draw_padding,
    "documents": draw_documents,
    "prefix": draw_prefix,
    "global_tokens": draw_global_tokens,
    "links": draw_links,
    "blocks": draw_blocks,
    "dense": draw_dense,
    "predicate": draw_predicate,
}


def draw_expression(draw: st.DrawFn, shape: MaskShape, depth: int) -> tuple[Mask, Definition]:
    operation = draw(st.sampled_from(["leaf", "and", "or", "not"])) if depth else "leaf"
    if operation == "leaf":
        return KINDS[draw(st.sampled_from(sorted(KINDS)))](draw, shape)
    one, first = draw_expression(draw, shape, depth - 1)
    if operation == "not":
        return ~one, lambda p: not first(p)
    two, second = draw_expression(draw, shape, depth - 1)
    if operation == "and":
        return one & two, lambda p: first(p) and second(p)
    return one | two, lambda p: first(p) or second(p)


examples = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@pytest.mark.parametrize("kind", sorted(KINDS))
@settings(examples, max_examples=20)
@given(data=st.data())
def test_each_kind(kind: str, data: st.DataObject) -> None:
    shape = data.draw(shapes())
    mask, definition = KINDS[kind](data.draw, shape)
    check(mask, definition, shape)
    # `x | nothing` and `~` have block lists whatever x has.
    check(mask | ~causal() & causal(), definition, shape)
    check(~mask, lambda p: not definition(p), shape)


@settings(examples, max_examples=120)
@given(data=st.data())
def test_compositions(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    mask, definition = draw_expression(data.draw, shape, 3)
    check(mask, definition, shape)


def test_long_rows() -> None:
    """More unknown tiles than one batch of the builder holds, and distinct ones in each batch."""
    shape = MaskShape(1, 1, 4100, 4100)
    mask = predicate(lambda b, h, i, j: (i * 7 + j * j) % 11 < 3) & ~causal()
    assert torch.equal(expand(mask.lower(shape), shape), mask.to_dense(shape))


def test_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastattn.masks.tiles.STRIP_TILES", 4)
    monkeypatch.setattr("fastattn.masks.tiles.BATCH_TILES", 3)
    generator = torch.Generator().manual_seed(0)
    shape = MaskShape(2, 3, 300, 500)
    mask = dense(torch.rand(2, 3, 300, 500, generator=generator) < 0.01) | window(5, 100)
    assert torch.equal(expand(mask.lower(shape), shape), mask.to_dense(shape))


def test_hash_collisions_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastattn.masks.tiles._ODD_A", 0)
    mask = predicate(lambda b, h, i, j: (i + j // 64) % 3 == 0)
    shape = MaskShape(1, 1, 200, 200)
    assert torch.equal(expand(mask.lower(shape), shape), mask.to_dense(shape))


# --- worked examples ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "sizes", "want"),
    [
        (causal(), (2, 3), "110 111"),
        (causal(), (3, 2), "00 10 11"),
        (causal(align="top_left"), (2, 3), "100 110"),
        (window(1, 0), (3, 3), "100 110 011"),
        (window(0, 1), (2, 4), "0011 0001"),
        (window(None, 1, align="top_left"), (2, 4), "1100 1110"),
        (padding(2), (2, 3), "110 110"),
        (padding(3, 1), (2, 4), "0110 0110"),
        (padding(torch.tensor([[1, 3]])), (2, 4), "1000 1110"),
        (causal() | prefix(2), (3, 3), "110 110 111"),
        (causal() & documents(torch.tensor([0, 0, 1])), (3, 3), "100 110 001"),
        (global_tokens([0]), (3, 3), "111 100 100"),
        (global_tokens([2]), (2, 3), "001 111"),
        (global_tokens([0]), (2, 3), "100 100"),
        (global_tokens([0], align="top_left"), (2, 3), "111 100"),
        (global_tokens(torch.tensor([True, False, False])), (3, 3), "111 100 100"),
        (blocks(torch.eye(2, dtype=torch.bool), 2), (3, 3), "110 110 001"),
        (predicate(lambda b, h, i, j: (i - j) % 2 == 0) & causal(), (4, 4), "1000 0100 1010 0101"),
        (~causal(), (2, 2), "01 00"),
        (~causal() | window(0, 0) & padding(1), (2, 2), "11 00"),
        (links([(1, 0), (2, 2)]), (3, 3), "000 100 001"),
        (links([(2, 0)]), (2, 3), "000 100"),
        (links([(1, 0)], align="top_left"), (2, 3), "000 100"),
        (causal() & ~links(torch.tensor([[1, 0]])), (2, 2), "10 01"),
        (causal() & (window(1, 0) | global_tokens([0])), (4, 4), "1000 1100 1110 1011"),
        (dense(torch.tensor([True, False])), (2, 2), "10 10"),
    ],
    ids=repr,
)
def test_worked_example(mask: Mask, sizes: tuple[int, int], want: str) -> None:
    shape = MaskShape(1, 1, *sizes)
    assert torch.equal(mask.to_dense(shape).expand(1, 1, *sizes), expand(mask.lower(shape), shape))
    got = mask.to_dense(shape).expand(1, 1, *sizes)[0, 0].int().tolist()
    assert " ".join("".join(map(str, row)) for row in got) == want


def test_hugging_face_window() -> None:
    """`sliding_window=W` sees W keys, itself included."""
    shape = MaskShape(1, 1, 9, 9)
    assert (causal() & window(3, 0)).to_dense(shape).sum(-1).max() == 4


# --- forms --------------------------------------------------------------------------------------------------


def test_analytic_masks_stay_analytic() -> None:
    shape = MaskShape(2, 3, 5, 7)
    user = torch.ones(2, 1, 7, 5, dtype=torch.bool).transpose(2, 3)
    mask = causal() & window(9, 4, align="top_left") & window(3, None) & padding([5, 6]) & prefix(6) & user
    lowered = mask.lower(shape)
    assert (lowered.lo_top, lowered.hi_top, lowered.lo_bottom, lowered.hi_bottom) == (-9, 4, -3, 0)
    assert lowered.key_ends.tolist() == [[5], [6]] and lowered.key_starts is None and lowered.block is None
    assert lowered.dense.data_ptr() == user.data_ptr() and lowered.dense.stride() == user.stride()
    assert (~causal()).lower(shape).lo_bottom == 1
    assert not mask.needs_blocks and (mask | causal()).needs_blocks


def test_bool_tensors_combine_without_blocks() -> None:
    shape = MaskShape(1, 1, 3, 4)
    one, two = torch.rand(3, 1) < 0.5, torch.rand(1, 4) < 0.5
    assert torch.equal((dense(one) & two).lower(shape).dense[0, 0], one & two)
    assert torch.equal((one | dense(two)).lower(shape).dense[0, 0], one | two)
    assert torch.equal((~dense(one)).lower(shape).dense[0, 0], ~one)
    assert (causal() & (dense(one) | dense(two))).lower(shape).block is None


def test_large_lengths_do_not_wrap() -> None:
    shape = MaskShape(1, 1, 2, 3)
    assert padding(torch.tensor([2**40])).lower(shape).key_ends.tolist() == [[2**31 - 1]]


def test_batch_and_heads_broadcast() -> None:
    shape = MaskShape(4, 6, 100, 100)
    assert (causal() | prefix(3)).lower(shape).block.row_ptr.shape[:2] == (1, 1)
    assert (causal() | prefix([3, 4, 5, 6])).lower(shape).block.row_ptr.shape[:2] == (4, 1)
    heads = predicate(lambda b, h, i, j: i % 6 == h)
    assert heads.lower(shape).block.row_ptr.shape[:2] == (1, 6)
    assert (heads | prefix([3, 4, 5, 6])).lower(shape).block.row_ptr.shape[:2] == (4, 6)


def test_bits_of_a_tile() -> None:
    """The words of a causal tile: row r has bits 0 to r."""
    block = (causal() | prefix(0)).lower(MaskShape(1, 1, 128, 128)).block
    assert block.bits.shape == (1, 64, 2)
    for row, (low, high) in enumerate(block.bits[0].tolist()):
        assert (low & 0xFFFFFFFF) | ((high & 0xFFFFFFFF) << 32) == (1 << (row + 1)) - 1
    assert block.row_tiles.tolist() == [0, 0, 1] and block.row_bits.tolist() == [0, -1, 0]
    assert block.col_tiles.tolist() == [0, 1, 1] and block.col_bits.tolist() == [0, -1, 0]
    assert repr(block) == "BlockMask(128x128, batch=1, heads=1, tiles=3, bit_tiles=1)"


def test_predicate_shapes() -> None:
    seen = []

    def fn(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen.append([x.shape for x in (b, h, i, j)])
        assert all(x.dtype == torch.int64 for x in (b, h, i, j))
        assert i.max() < 70 and j.max() < 130
        return i + b + h >= j

    shape = MaskShape(2, 3, 70, 130)
    predicate(fn).lower(shape)
    count = 2 * 3 * 2 * 3
    assert seen[-1] == [(count, 1, 1, 1), (count, 1, 1, 1), (count, 1, 64, 1), (count, 1, 1, 64)]
    predicate(fn).to_dense(shape)
    assert seen[-1] == [(2, 1, 1, 1), (1, 3, 1, 1), (1, 1, 70, 1), (1, 1, 1, 130)]


# --- size and speed -----------------------------------------------------------------------------------------


def large_masks(length: int) -> dict[str, Mask]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (1, length), generator=generator).sort().values
    tokens = torch.randint(0, length, (16,), generator=generator)
    return {
        "window": causal() & (window(255, 0) | global_tokens([0, 1, 2, 3])),
        "scattered": window(255, 255) | global_tokens(tokens),
        "documents": causal() & documents(ids),
        "blocks": blocks(torch.rand(length // 64, length // 64, generator=generator) < 0.1, 64),
        "small blocks": blocks(torch.rand(length // 32, length // 32, generator=generator) < 0.1, 32),
        "prefix": causal() | prefix(1000),
    }


@pytest.mark.parametrize("name", sorted(large_masks(64)))
def test_builds_quickly(name: str) -> None:
    """At 32k; the goal is half a second on two quiet cores, the bound leaves room for a busy machine."""
    mask = large_masks(32768)[name]
    start = time.perf_counter()
    block = mask.lower(MaskShape(1, 1, 32768, 32768)).block
    took = time.perf_counter() - start
    assert took < 5, took
    tiles, bits = block.row_tiles.numel(), block.bits.shape[0]
    assert block.nbytes == 4 * (block.row_ptr.numel() + block.col_ptr.numel() + 4 * tiles + 128 * bits)
    assert bits < 1000


def test_memory_of_the_builder() -> None:
    """A mask at 64k builds within memory that a list of tiles explains, not a matrix of 4 billion pairs."""
    code = """
import resource, torch
from fastattn.masks import MaskShape, causal, documents, global_tokens, window
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
mask = causal() & (window(255, 0) | global_tokens([0, 5000])) & documents(torch.arange(65536)[None] // 4096)
(causal() | window(3, 3)).lower(MaskShape(1, 1, 512, 512))
before = peak()
mask.lower(MaskShape(1, 1, 65536, 65536))
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 200, run.stdout


# --- reuse --------------------------------------------------------------------------------------------------


def test_last_result_is_kept() -> None:
    ids = torch.zeros(1, 80, dtype=torch.int64)
    mask, shape = documents(ids), MaskShape(2, 1, 80, 80)
    first = mask.lower(shape)
    assert mask.lower(MaskShape(2, 1, 80, 80), "cpu") is first
    assert mask.lower(MaskShape(3, 1, 80, 80)) is not first
    first = mask.lower(shape)
    ids[0, 40:] = 1
    assert torch.equal(expand(mask.lower(shape), shape)[:1], mask.to_dense(shape))


def test_last_result_depends_on_lengths() -> None:
    mask, lens = causal() | prefix(2), torch.tensor([3, 5])
    shape = MaskShape(2, 1, 1, 8, None, lens)
    first = mask.lower(shape)
    assert mask.lower(MaskShape(2, 1, 1, 8, None, lens.clone())) is first
    lens += 1
    assert torch.equal(expand(mask.lower(shape), shape), mask.to_dense(shape))
    assert mask.lower(MaskShape(2, 1, 1, 8)) is not first


@pytest.mark.parametrize("compose", [lambda m: m, lambda m: ~m, lambda m: causal() & (m | prefix(1))])
def test_what_a_predicate_captures_may_change(compose: Callable[[Mask], Mask]) -> None:
    reach = [1]
    mask, shape = compose(predicate(lambda b, h, i, j: (i - j).abs() <= reach[0])), MaskShape(1, 1, 9, 9)
    before = expand(mask.lower(shape), shape)
    built = mask.build(9, 9)
    reach[0] = 5
    assert torch.equal(expand(mask.lower(shape), shape), mask.to_dense(shape))
    assert torch.equal(expand(built.lower(shape), shape), before)
    assert not torch.equal(mask.to_dense(shape), before)


def test_signatures_that_serve_a_predicate() -> None:
    def several(*index: torch.Tensor) -> torch.Tensor:
        return index[2] >= index[3]

    for fn in (several, functools.partial(several), lambda b, h, i, j, reach=1: i - j <= reach):
        assert predicate(fn).to_dense(MaskShape(1, 1, 3, 3)).dtype == torch.bool


def test_numpy_ints() -> None:
    import numpy

    one = numpy.int64(1)
    assert repr(window(one, one)) == "window(1, 1)"
    assert causal().build(one, one).lower(MaskShape(1, 1, 1, 1)).hi_bottom == 0


def test_inference_tensors() -> None:
    with torch.inference_mode():
        mask = documents(torch.zeros(1, 9, dtype=torch.int64))
        assert mask.lower(MaskShape(1, 1, 9, 9)) is mask.lower(MaskShape(1, 1, 9, 9))


def test_built_mask() -> None:
    mask = causal() | prefix([2, 3])
    built = mask.build(70, 70, batch=2)
    shape = MaskShape(2, 5, 70, 70)
    assert built.lower(shape) is built.lower(MaskShape(2, 1, 70, 70))
    assert torch.equal(expand(built.lower(shape), shape)[:, :1], built.to_dense(shape))
    assert built.build(70, 70, batch=2).source is mask
    assert (built & causal()).masks[0] is mask and (~built).mask is mask
    assert repr(built) == "(causal() | prefix((2, 3))).build(70, 70)"
    anyone = (causal() | prefix(2)).build(70, 70)
    assert anyone.lower(MaskShape(9, 4, 70, 70)).block is not None
    assert causal().build(3, 4).lower(MaskShape(2, 2, 3, 4)).hi_bottom == 0
    assert built.to("cpu").lower(shape).block is not None


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (MaskShape(3, 1, 70, 70), r"mask was built for .* = \(2, any, 70, 70\), got \(3, 1, 70, 70\)"),
        (MaskShape(2, 1, 70, 71), r"got \(2, 1, 70, 71\)"),
        (MaskShape(2, 1, 70, 70, None, torch.tensor([3, 4])), "mask must not be a built one where sequences"),
    ],
    ids=["batch", "seqlen_k", "ragged"],
)
def test_built_mask_elsewhere(shape: MaskShape, message: str) -> None:
    built = (causal() | prefix([2, 3])).build(70, 70, batch=2)
    with pytest.raises(ValueError, match=message):
        built.lower(shape)
    with pytest.raises(ValueError, match=message):
        built.to_dense(shape)


def test_built_predicate_knows_what_it_depends_on() -> None:
    by_batch = predicate(lambda b, h, i, j: i >= j + b).build(9, 9, batch=1)
    with pytest.raises(ValueError, match="mask was built for"):
        by_batch.lower(MaskShape(2, 1, 9, 9))
    predicate(lambda b, h, i, j: i >= j).build(9, 9).lower(MaskShape(2, 3, 9, 9))


# --- as objects ---------------------------------------------------------------------------------------------

ZOO = [
    causal(align="top_left"),
    window(3, None),
    padding(torch.tensor([3, 4]), torch.tensor([0, 1])),
    padding([3, 4]),
    documents(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.int64)),
    prefix(2),
    global_tokens(torch.tensor([0, 1])),
    links([(1, 2)]),
    links(torch.tensor([[1, 2]])),
    blocks(torch.ones(1, 1, dtype=torch.bool), 64),
    dense(torch.ones(5, 6, dtype=torch.bool)),
    predicate(lambda b, h, i, j: i >= j),
    causal() & (window(2, 2) | ~prefix(1)) | padding(torch.tensor([2])),
    (causal() | prefix(torch.tensor([1]))).build(5, 6),
    causal().build(5, 6),
]


@pytest.mark.parametrize("mask", ZOO, ids=repr)
def test_pytree_round_trip(mask: Mask) -> None:
    leaves, spec = pytree.tree_flatten(mask)
    again = pytree.tree_unflatten(leaves, spec)
    assert type(again) is type(mask) and repr(again) == repr(mask)
    assert pytree.tree_flatten(again)[1] == spec
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    shape = MaskShape(2, 1, 5, 6)
    assert torch.equal(again.to_dense(shape), mask.to_dense(shape))
    assert pytree.tree_map(lambda leaf: None, mask) is not None


@pytest.mark.parametrize("mask", [mask for mask in ZOO if "predicate" not in repr(mask)], ids=repr)
def test_copies(mask: Mask) -> None:
    shape = MaskShape(2, 1, 5, 6)
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask.to("cpu")):
        assert torch.equal(other.to_dense(shape), mask.to_dense(shape))
        other.lower(shape)


def test_equality() -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert causal() == causal() and hash(causal()) == hash(causal())
    assert causal() != causal(align="top_left") and causal() != 1
    assert causal() & documents(ids) == causal() & documents(ids)
    assert hash(causal() | documents(ids)) == hash(causal() | documents(ids))
    assert documents(ids) != documents(ids.clone())
    assert causal() & prefix(1) != causal() | prefix(1)
    assert ~~prefix(1) == prefix(1)
    assert causal() & window(1, 0) & prefix(1) == causal() & (window(1, 0) & prefix(1))


def test_repr() -> None:
    ids = torch.zeros(1, 4, dtype=torch.int32)
    mask = causal() & (window(255, 0) | global_tokens([0, 1])) & ~documents(ids)
    assert repr(mask) == "causal() & (window(255, 0) | global_tokens([0, 1])) & ~documents(int32[1, 4])"
    assert repr(~(causal(align="top_left") & prefix(3))) == "~(causal(align='top_left') & prefix(3))"
    assert repr(padding([1, 2], torch.tensor([0, 1]))) == "padding((1, 2), key_starts=int64[2])"
    assert repr(~causal()) == "~causal()" and repr(~window(3, None)) == "~window(3, None)"
    assert repr(window(1, 2, align="top_left")) == "window(1, 2, align='top_left')"
    assert repr(blocks(torch.ones(2, 2, dtype=torch.bool), 8)) == "blocks(bool[2, 2], 8)"
    assert repr(causal() & prefix(1) | window(0, 0)) == "(causal() & prefix(1)) | window(0, 0)"


def test_immutable() -> None:
    with pytest.raises(AttributeError):
        causal().hi = 3  # type: ignore[attr-defined]


def test_tensors_compose_from_either_side() -> None:
    tensor, shape = torch.rand(3, 3) < 0.5, MaskShape(1, 1, 3, 3)
    assert torch.equal((tensor & causal()).to_dense(shape)[0, 0], tensor & torch.ones(3, 3).tril().bool())
    assert torch.equal((causal() | tensor).to_dense(shape)[0, 0], tensor | torch.ones(3, 3).tril().bool())


# --- errors -------------------------------------------------------------------------------------------------

BOOLS = torch.ones(2, 2, dtype=torch.bool)
FLOATS = torch.ones(2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: causal(align="left"),
            ValueError,
            r"align must be one of \('bottom_right', 'top_left'\), got 'left'",
        ),
        (lambda: window(-1, 0), ValueError, "window left must be >= 0 or None, got -1"),
        (lambda: window(0, -2), ValueError, "window right must be >= 0 or None, got -2"),
        (lambda: window(0.5, 0), TypeError, "window left must be an int or None, got float"),
        (lambda: window(1, 0, align=0), ValueError, "align must be one of .*, got 0"),
        (
            lambda: padding(FLOATS),
            TypeError,
            "padding key_lengths must be an integer tensor, got float32",
        ),
        (lambda: padding(BOOLS), TypeError, "padding key_lengths must be an integer tensor, got bool"),
        (lambda: padding([0.5]), TypeError, "padding key_lengths must be .* a sequence of ints, got list"),
        (lambda: padding([-1, 3]), ValueError, "padding key_lengths must be >= 0, got -1"),
        (lambda: padding([1], [-2]), ValueError, "padding key_starts must be >= 0, got -2"),
        (lambda: prefix(-3), ValueError, "prefix lengths must be >= 0, got -3"),
        (lambda: window("a", 0), TypeError, "window left must be an int or None, got str"),
        (
            lambda: predicate(lambda i, j: i >= j),
            TypeError,
            r"predicate fn must take \(b, h, i, j\), got .*<lambda>\(i, j\)",
        ),
        (lambda: causal().build(6.5, 7), TypeError, "seqlen_q must be an int, got float"),
        (lambda: causal().build(-6, 7), ValueError, "seqlen_q must be >= 0, got -6"),
        (lambda: causal().build(6, 7, batch=None), TypeError, "batch must be an int, got NoneType"),
        (lambda: causal().to_dense(6), TypeError, "shape must be a fastattn.masks.MaskShape, got int"),
        (
            lambda: (causal() | prefix([1, 2, 3])).build(6, 7),
            ValueError,
            r"prefix lengths must have batch size 1, got 3; in build\(\), pass batch=3",
        ),
        (
            lambda: blocks(torch.ones(1, 2, 1, 1) > 0, 9).build(6, 7),
            ValueError,
            r"blocks layout must have 1 heads, got 2; in build\(\), pass heads=2",
        ),
        (lambda: padding([1], FLOATS), TypeError, "padding key_starts must be an integer tensor"),
        (
            lambda: padding(torch.tensor(3)),
            ValueError,
            r"padding key_lengths must have 1 or 2 dim.*, got shape \[\]",
        ),
        (lambda: prefix(torch.ones(2, 2).int()), ValueError, r"prefix lengths must have 1 dim.* \[2, 2\]"),
        (lambda: documents([0, 1]), TypeError, "documents q_ids must be an integer tensor, got list"),
        (
            lambda: documents(FLOATS),
            TypeError,
            "documents q_ids must be an integer tensor, got float32",
        ),
        (
            lambda: documents(torch.arange(3), 3),
            TypeError,
            "documents k_ids must be an integer tensor, got int",
        ),
        (
            lambda: documents(torch.ones(1, 1, 1).int()),
            ValueError,
            r"documents q_ids must have 1 or 2 .*\[1, 1, 1\]",
        ),
        (lambda: global_tokens([-1]), ValueError, "global_tokens index_or_bool must be >= 0, got -1"),
        (lambda: global_tokens(FLOATS), TypeError, "global_tokens index_or_bool must be an integer tensor"),
        (
            lambda: global_tokens(BOOLS[None]),
            ValueError,
            "global_tokens index_or_bool must have 1 or 2 dimensions",
        ),
        (lambda: global_tokens([0], align="x"), ValueError, "align must be one of"),
        (lambda: links([(1, -1)]), ValueError, "links key must be >= 0, got -1"),
        (
            lambda: links([(1, 2, 3)]),
            ValueError,
            r"links pairs must be \(query, key\) positions, got \(1, 2, 3\)",
        ),
        (lambda: links([3]), ValueError, r"links pairs must be \(query, key\) positions, got 3"),
        (lambda: links([(1.0, 2)]), TypeError, "links query must be an int, got float"),
        (lambda: links(3), TypeError, "links pairs must be a tensor or a sequence of pairs, got int"),
        (lambda: links(FLOATS), TypeError, "links pairs must be integers, got float32"),
        (lambda: links(torch.tensor([1, 2])), ValueError, r"links pairs must have shape \[N, 2\], got \[2\]"),
        (lambda: links([(0, 0)], align="x"), ValueError, "align must be one of"),
        (lambda: blocks(FLOATS, 3), TypeError, r"blocks layout must be a bool tensor, got float32\[2\]"),
        (lambda: blocks(BOOLS[None], 3), ValueError, "blocks layout must have 2 or 4 dimensions"),
        (lambda: blocks(BOOLS, 0), ValueError, "blocks block_size must be >= 1, got 0"),
        (lambda: blocks(BOOLS, 1.5), TypeError, "blocks block_size must be an int, got float"),
        (
            lambda: dense(FLOATS),
            TypeError,
            r"mask must be a bool tensor \(True = attend\), got float32",
        ),
        (lambda: dense(3), TypeError, "mask must be a fastattn.masks.Mask or a bool tensor, got int"),
        (lambda: dense(BOOLS[None, None, None]), ValueError, "mask must have at most 4 dimensions"),
        (lambda: causal() & 3, TypeError, "mask must be a fastattn.masks.Mask or a bool tensor, got int"),
        (lambda: predicate(3), TypeError, "predicate fn must be callable, got int"),
        (lambda: causal() and window(1, 0), TypeError, "a mask has no truth value: compose masks with &"),
    ],
)
def test_errors_of_constructors(make: Callable[[], Mask], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (padding([1, 2, 3]), ValueError, r"padding key_lengths must have batch size 2 \(or 1\), got 3"),
        (padding([1], [1, 2, 3]), ValueError, r"padding key_starts must have batch size 2 \(or 1\), got 3"),
        (
            padding(torch.ones(2, 5).int()),
            ValueError,
            r"one entry per query in dimension 1, 4 \(or 1\), got 5",
        ),
        (prefix([1, 2, 3]), ValueError, r"prefix lengths must have batch size 2 \(or 1\), got 3"),
        (documents(torch.zeros(3, 4).int()), ValueError, "documents q_ids must have batch size 2"),
        (documents(torch.zeros(5).int()), ValueError, "documents q_ids must have length 4, got 5"),
        (documents(torch.zeros(4).int()), ValueError, r"documents k_ids must have length 6, got 4 \(q_ids"),
        (global_tokens(BOOLS), ValueError, "global_tokens index_or_bool must have length 6, got 2"),
        (links(torch.tensor([[0, -3]])), ValueError, "links pairs must be >= 0, got -3"),
        (global_tokens(torch.tensor([-3])), ValueError, "global_tokens index_or_bool must be >= 0, got -3"),
        (
            global_tokens(torch.ones(3, 6) > 0),
            ValueError,
            "global_tokens index_or_bool must have batch size 2",
        ),
        (blocks(BOOLS, 2), ValueError, r"must have \[2, 3\] blocks of 2 for 4x6, got \[2, 2\]"),
        (blocks(torch.ones(3, 1, 1, 1) > 0, 9), ValueError, "blocks layout must have batch size 2"),
        (
            blocks(torch.ones(1, 2, 1, 1) > 0, 9),
            ValueError,
            r"blocks layout must have 3 heads \(or 1\), got 2",
        ),
        (dense(BOOLS), ValueError, r"mask must broadcast to \[2, 3, 4, 6\], got \[2, 2\]"),
        (
            predicate(lambda b, h, i, j: i - j),
            TypeError,
            "predicate fn must return a bool tensor, got int64",
        ),
        (predicate(lambda b, h, i, j: True), TypeError, "predicate fn must return a bool tensor, got bool"),
        (
            predicate(lambda b, h, i, j: BOOLS),
            ValueError,
            "predicate fn must return a tensor broadcastable to",
        ),
        (
            padding(torch.ones(2, device="meta").int()),
            ValueError,
            "must be on the call's device cpu, got meta",
        ),
        (dense(BOOLS.to("meta")), ValueError, "mask must be on the call's device cpu, got meta"),
        (
            documents(torch.zeros(4, device="meta").int()),
            ValueError,
            "documents q_ids must be on the call's dev",
        ),
        (blocks(BOOLS.to("meta"), 3), ValueError, "blocks layout must be on the call's device cpu, got meta"),
        (
            global_tokens(torch.ones(6, device="meta") > 0),
            ValueError,
            "global_tokens .* device cpu, got meta",
        ),
    ],
)
def test_errors_in_use(mask: Mask, error: type[Exception], message: str) -> None:
    shape = MaskShape(2, 3, 4, 6)
    for use in (
        mask.to_dense,
        mask.lower,
        (mask | causal()).lower,
        (mask & causal()).lower,
        (~mask).to_dense,
    ):
        with pytest.raises(error, match=message):
            use(shape, CPU)


def test_dense_masks_have_no_place_in_packed_calls() -> None:
    shape = MaskShape(2, 1, 2, 2, torch.tensor([1, 2]), torch.tensor([1, 2]))
    for mask in (dense(BOOLS), causal() & BOOLS, causal() | BOOLS):
        for use in (mask.to_dense, mask.lower):
            with pytest.raises(NotImplementedError, match="dense masks have no meaning in a packed"):
                use(shape, CPU)


# --- compile ------------------------------------------------------------------------------------------------


def test_analytic_masks_trace_without_breaks_for_any_length() -> None:
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def ends(q: Tensor, lengths: Tensor, mask: Mask) -> Tensor:
        shape = MaskShape(q.shape[0], q.shape[1], q.shape[2], q.shape[2])
        lowered = (causal() & window(5, 0) & padding(lengths) & mask).lower(shape, q.device)
        return lowered.key_ends + lowered.lo_bottom + lowered.hi_bottom + q.sum()

    for length in (8, 9, 20, 33):
        q = torch.zeros(2, 3, length, 4)
        got = ends(q, torch.tensor([3, 4]), padding(torch.tensor([9, 2])))
        assert got.tolist() == [[3 - 5], [2 - 5]]
    assert counter.frame_count == 1


def test_built_masks_trace() -> None:
    def count(q: Tensor, mask: Mask) -> Tensor:
        lowered = mask.lower(MaskShape(1, 1, q.shape[0], q.shape[0]), q.device)
        return lowered.block.row_tiles.sum() + q.sum().long()

    q, mask = torch.zeros(100), causal() | prefix(3)
    built = mask.build(100, 100)
    assert torch.compile(count, fullgraph=True, backend="eager")(q, built) == count(q, built)
    with pytest.raises(Exception, match="build it before the compiled region"):
        torch.compile(count, fullgraph=True, backend="eager")(q, mask)
    torch._dynamo.reset()
    # Without fullgraph the builder runs in eager.
    assert torch.compile(count, backend="eager")(q, causal() | prefix(3)) == count(q, built)


@pytest.mark.parametrize(
    "make",
    [
        lambda zeros: ~padding(zeros(7)[:, 0]),
        lambda zeros: causal() | padding(zeros(5), zeros(5)),
        lambda zeros: causal() | prefix(zeros(7)[:, 0]),
        lambda zeros: documents(zeros(5), zeros(7)),
        lambda zeros: global_tokens(zeros(7).bool()) & window(3, None),
    ],
)
def test_masks_of_an_empty_batch(make):
    mask = make(lambda length: torch.zeros(0, length, dtype=torch.int64))
    q, k = torch.zeros(0, 2, 5, 8), torch.zeros(0, 2, 7, 8)
    assert fastattn.attention(q, k, k, mask=mask).shape == q.shape
    assert mask.lower(MaskShape(0, 2, 5, 7)).block.row_tiles.numel() == 0

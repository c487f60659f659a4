"""Masks against definitions written out pair by pair, in every form that kernels read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mask_support import Definition, Pair, check, expand
from torch import Tensor

from fastattn.masks import (
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


# Worked examples


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

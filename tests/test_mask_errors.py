"""Each rule on masks has a message that names the argument, the rule and the value got."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mask_support import CPU

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

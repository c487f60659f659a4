"""Masks as Python objects: pytrees, copies, equality, printing, in compiled code."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils import _pytree as pytree

import fastattn
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


# Compile


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

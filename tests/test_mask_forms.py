"""The forms that kernels read: what they are, how quickly and in what memory they are built, when again."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from mask_support import expand
from torch import Tensor

from fastattn.masks import (
    Mask,
    MaskShape,
    blocks,
    causal,
    dense,
    documents,
    global_tokens,
    padding,
    predicate,
    prefix,
    window,
)


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


# Size and speed


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


# Reuse


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

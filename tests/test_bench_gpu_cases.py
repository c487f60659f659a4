"""Which cases `make bench-gpu` has, and which of PyTorch's paths take part in each."""

from __future__ import annotations

import pytest
import torch
from bench_gpu_support import PACKED, tiny

from fastattn import masks
from fastattn.bench.contenders import ours, sdpa
from fastattn.bench.flex import band_mod, mask_mod, score_mod
from fastattn.bench.gpu import contenders
from fastattn.bench.padded import padded
from fastattn.bench.work import additive
from fastattn.testing.cases import alibi, always, tensor_bias
from fastattn.testing.gpu_bench_cases import (
    CAUSAL_MASK,
    GPU_BENCH_CASES,
    TOKENS,
    causal_documents,
    is_compiled,
)
from fastattn.testing.inputs import make_inputs


def test_cases_cover_what_is_promised():
    names = [case.name for case in GPU_BENCH_CASES]
    assert len(set(names)) == len(names)
    on_grid = [case for case in GPU_BENCH_CASES if case.group.split()[0] in ("full", "causal")]
    assert {case.case.head_dim for case in on_grid} == {64, 128, 256}
    assert {case.case.queries for case in on_grid} == {512, 1024, 2048, 4096, 8192, 16384, 32768}
    assert all(case.case.batch * case.case.queries == max(TOKENS, case.case.queries) for case in on_grid)
    groups = {case.group.rsplit(" ", 1)[0] for case in GPU_BENCH_CASES}
    wanted = {
        "full",
        "causal",
        "gqa",
        "window 1024",
        "documents",
        "varlen",
        "bias",
        "alibi",
        "softcap",
        "dropout 0.1",
    }
    assert groups == wanted | {"host"}
    for group in wanted:
        assert {case.timed for case in GPU_BENCH_CASES if case.group.startswith(group)} == {
            "forward",
            "backward",
        }
    assert all(case.case.dtype == torch.bfloat16 for case in GPU_BENCH_CASES)
    # What the goals are about comes first: a run that ends early has it.
    assert [case.group for case in GPU_BENCH_CASES[:4]] == [
        "full forward", "causal forward", "full backward", "causal backward",
    ]  # fmt: skip
    assert any(case.quick for case in GPU_BENCH_CASES)


def test_compiled_paths_take_part_at_some_lengths_of_the_grid_and_everywhere_else():
    compiled = {case.name for case in GPU_BENCH_CASES if is_compiled(case)}
    assert {
        "full-forward-16x16384x128",
        "causal-backward-64x4096x128",
        "full-forward-32x16384x64",
    } <= compiled
    assert not {"full-forward-512x512x128", "full-forward-128x4096x64"} & compiled
    assert {case.name for case in GPU_BENCH_CASES if case.group.startswith("gqa")} <= compiled


def test_documents_are_the_packed_sequences():
    """The same lengths as a mask and packed: as many visible pairs, without the causal half."""
    case = tiny("documents", mask=causal_documents).case
    mask = make_inputs(case).mask
    dense = mask.to_dense(masks.MaskShape(1, 2, 16, 16))
    assert dense.diagonal(dim1=-2, dim2=-1).all()
    assert 16 <= int(dense.sum()) < 16 * 17 // 2


def test_moved_inputs_keep_numbers_strides_and_surroundings():
    from fastattn.testing.cases import CASES

    for name in ("layout-sliced", "layout-expanded_kv", "bool-strided", "mask-padding-causal", "varlen-blhd"):
        [case] = [case for case in CASES if case.name == name]
        inputs = make_inputs(case)
        there = inputs.on("cpu")
        for leaf, moved in zip(inputs.leaves.values(), there.leaves.values(), strict=True):
            assert torch.equal(leaf, moved)
            assert (leaf.stride(), leaf.storage_offset()) == (moved.stride(), moved.storage_offset())
            assert moved.data_ptr() != leaf.data_ptr()
        assert len(there.fixed) == len(inputs.fixed)
    assert there.mask is None
    assert all(leaf.device.type == "meta" for leaf in inputs.on("meta").leaves.values())


@pytest.mark.parametrize(
    "mask",
    [masks.causal(), masks.window(3, None), masks.window(2, 1), masks.causal() & masks.window(4, 4),
     masks.causal() & masks.documents(torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]))],
    ids=str,
)  # fmt: skip
def test_flex_masks_say_the_same(mask):
    i, j = torch.arange(8)[:, None], torch.arange(8)
    seen = mask_mod(mask)(torch.tensor(0), torch.tensor(0), i, j).expand(8, 8)
    assert torch.equal(seen, mask.to_dense(masks.MaskShape(1, 1, 8, 8))[0, 0].expand(8, 8))


def test_flex_says_which_masks_and_scores_it_has_no_function_for():
    assert mask_mod(masks.causal() | masks.window(1, 1)) is None
    assert mask_mod(masks.causal() & masks.prefix(torch.tensor([2]))) is None
    assert bool(band_mod(None, None)(*map(torch.tensor, (0, 0, 1, 5))))
    capped = tiny("softcap", softcap=2.0, bias=alibi())
    with pytest.raises(ValueError, match="a bias or a softcap, not both"):
        score_mod(make_inputs(capped.case))


@pytest.mark.parametrize(
    "options",
    [{}, {"mask": CAUSAL_MASK}, {"mask": causal_documents}, {"bias": tensor_bias("h", "q", "k")},
     {"bias": alibi(), "mask": CAUSAL_MASK}, {"softcap": 2.0}, {"heads_kv": 1}, PACKED],
    ids=["full", "causal", "documents", "bias", "alibi", "softcap", "gqa", "varlen"],
)  # fmt: skip
def test_flex_is_a_path_for_each_option(options):
    """Not compiled, which computes the same in PyTorch's plain operations."""
    bench = tiny("x", **options)
    inputs = make_inputs(bench.case)
    function = contenders.flex(inputs, compiled=False)
    q, k, v = (inputs.leaves[name] for name in "qkv")
    torch.testing.assert_close(function(q, k, v), ours(inputs)(q, k, v), atol=1e-5, rtol=1e-4)


def test_flex_has_no_dropout_and_not_every_mask():
    assert contenders.flex(make_inputs(tiny("x", dropout_p=0.1).case), True) is None
    other = always(masks.causal() | masks.window(1, 1))
    assert contenders.flex(make_inputs(tiny("x", mask=other).case), False) is None


@pytest.mark.parametrize(
    "options",
    [{"mask": CAUSAL_MASK}, {"mask": causal_documents}, {"bias": tensor_bias("h", "q", "k")},
     {"bias": alibi(), "mask": CAUSAL_MASK}, PACKED],
    ids=["causal", "documents", "bias", "alibi", "varlen"],
)  # fmt: skip
def test_what_pytorch_is_given_lies_on_the_device(options):
    """A device without numbers plays the GPU: its tensors do not mix with one left on the CPU."""
    inputs = make_inputs(tiny("x", **options).case).on("meta")
    if inputs.case.op == "varlen":
        inputs = padded(inputs)
        assert inputs.mask.device.type == "meta"
    else:
        assert additive(inputs).device.type == "meta"
    q, k, v = (inputs.leaves[name] for name in "qkv")
    assert sdpa(inputs)(q, k, v).device.type == "meta"

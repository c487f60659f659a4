"""Scores other than scale q·k on the Triton kernels: additive, and kernels of the distance."""

from __future__ import annotations

import math

import pytest
import torch
from score_support import call_definition, call_kernels, expected, leaves_of, results
from triton_support import needs_triton

import fastattn
from fastattn import masks
from fastattn.spec import SCORES
from fastattn.testing import check_all
from fastattn.testing.inputs import poisoned_memory

pytestmark = needs_triton

PAIRS = SCORES[1:]
BOOL = torch.rand(2, 1, 18, 20, generator=torch.Generator().manual_seed(3)) < 0.6
BOOL[:, :, ::7] = False
MASKS = {
    "causal": masks.causal(),
    "window": masks.window(5, 2, align="top_left") & masks.padding([20, 7]),
    "per query": masks.padding(torch.arange(36).view(2, 18) % 21, torch.arange(18).view(1, 18) // 2),
    "bool": BOOL,
    "documents": masks.documents(torch.arange(18)[None] // 8, torch.arange(20)[None] // 9) | masks.prefix(3),
}


def on_triton(score, leaves, **options):
    return call_kernels(score, leaves, backend="triton", **options)


def check(score: str, leaves: list[torch.Tensor], **options) -> None:
    exact, native = expected(score, leaves, **options)
    with poisoned_memory():
        got = results(on_triton, score, leaves, **options)
    check_all(got, exact, native, leaves[0].dtype)


# Shapes are (batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v).
@pytest.mark.parametrize("score", PAIRS)
def test_each_score(score):
    check(score, leaves_of(score, (2, 2, 1, 5, 13, 5, 3)))


@pytest.mark.parametrize("score", ["additive", "triangular"])
def test_one_query_and_one_key(score):
    check(score, leaves_of(score, (1, 1, 1, 1, 1, 1, 1)))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_dtypes(dtype):
    check("additive", leaves_of("additive", (1, 1, 1, 17, 17, 40, 20), dtype))


@pytest.mark.parametrize(
    "mask",
    [pytest.param(mask, marks=[pytest.mark.slow] * (name == "window")) for name, mask in MASKS.items()],
    ids=MASKS,
)
def test_masks(mask):
    check("additive", leaves_of("additive", (2, 1, 1, 18, 20, 6, 4)), mask=mask)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["causal", "documents"])
@pytest.mark.parametrize("score", PAIRS)
def test_many_tiles(score, mask):
    """Block masks have tiles of 64 x 64, which these kernels take in smaller ones."""
    rows, keys = torch.arange(70)[None], torch.arange(150)[None]
    documents = masks.documents(rows // 30, keys // 40) | masks.prefix(3)
    chosen = masks.causal() if mask == "causal" else documents
    check(score, leaves_of(score, (1, 2, 1, 70, 150, 6, 4)), mask=chosen)


def test_sinks_dropout_and_large_scores():
    """An lse beyond 64 is rounded visibly in float32, which the backward pass makes good."""
    leaves = leaves_of("additive", (1, 2, 1, 5, 21, 6, 4))
    leaves[3] *= 50
    exact, _ = expected("additive", leaves)
    assert exact["lse"].max() > 64
    sinks = torch.randn(2, generator=torch.Generator().manual_seed(0))
    check("additive", leaves, sinks=sinks, dropout_p=0.3, dropout_seed=torch.tensor([5]))


@pytest.mark.parametrize("score", ["additive", "triangular"])
def test_what_no_row_sees_changes_nothing(score):
    leaves = leaves_of(score, (1, 2, 1, 9, 19, 6, 4))
    visible = torch.rand(1, 1, 9, 19, generator=torch.Generator().manual_seed(1)) < 0.7
    visible[..., [3, 12, 18]] = False
    visible[:, :, 4] = False
    clean = results(on_triton, score, leaves, mask=visible)
    dirty = [t.clone() for t in leaves]
    dirty[0][:, :, 4] = math.nan
    dirty[1][:, :, [3, 12]] = math.nan
    dirty[2][:, :, 12:13] = math.inf
    dirty[2][:, :, 18] = math.nan
    for name, value in results(on_triton, score, dirty, mask=visible).items():
        assert torch.equal(value, clean[name]), name


@pytest.mark.parametrize("target", [0, 1, 2])
def test_a_visible_nan_reaches_what_the_definition_says(target):
    leaves = leaves_of("additive", (1, 2, 1, 9, 19, 6, 4))
    leaves[target][0, 0, 7, 2] = math.nan
    want = results(call_definition, "additive", leaves, mask=masks.causal())
    for name, value in results(on_triton, "additive", leaves, mask=masks.causal()).items():
        assert torch.equal(value.isnan(), want[name].isnan()), name


def test_a_nan_gradient_reaches_the_keys_that_its_row_sees():
    q, k, v, w = (t.requires_grad_() for t in leaves_of("additive", (1, 1, 1, 9, 19, 6, 4)))
    out, _ = on_triton("additive", [q, k, v, w], mask=masks.causal(align="top_left"))
    upstream = torch.ones_like(out)
    upstream[0, 0, 5] = math.nan
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), upstream)
    assert dq.isnan().any(-1)[0, 0].nonzero().flatten().tolist() == [5]
    for gradient in (dk, dv):
        assert gradient.isnan().all(-1)[0, 0].nonzero().flatten().tolist() == list(range(6))
        assert gradient[0, 0, 6:].isfinite().all()


def test_additive_attention_by_name():
    q, k, v, w = (t[0] if t.dim() == 4 else t for t in leaves_of("additive", (1, 2, 2, 4, 6, 8, 3)))
    options = {"mask": masks.padding([4, 6]), "return_lse": True}
    got, lse = fastattn.additive_attention(q, k, v, w, **options, backend="triton")
    want, want_lse = fastattn.additive_attention(q, k, v, w, **options, backend="reference")
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(lse, want_lse)


def test_a_bias_has_no_gradient_beside_another_score():
    leaves = leaves_of("additive", (1, 1, 1, 3, 5, 4, 4))
    bias = torch.zeros(1, 1, 3, 5)
    with pytest.raises(NotImplementedError, match="no gradients of a bias beside the additive score"):
        results(on_triton, "additive", leaves, bias=bias)
    out, _ = on_triton("additive", leaves, bias=bias.clone().index_fill_(3, torch.tensor([2]), -math.inf))
    keep = torch.tensor([0, 1, 3, 4])
    want, _ = on_triton("additive", [leaves[0], leaves[1][:, :, keep], leaves[2][:, :, keep], leaves[3]])
    torch.testing.assert_close(out, want)

"""Scores other than scale q . k on the kernels: additive, and kernels of the distance."""

from __future__ import annotations

import math

import pytest
import torch
from call_support import NATIVE
from score_support import DTYPES, ISAS, call_definition, call_kernels, expected, leaves_of, results

from fastattn import masks
from fastattn.spec import DISTANCE_SCORES, SCORES
from fastattn.testing import check_all
from fastattn.testing.inputs import poisoned_memory

pytestmark = pytest.mark.skipif(not NATIVE, reason="the native core is not built")

PAIRS = SCORES[1:]
# (batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v)
SHAPES = {
    "one": (1, 1, 1, 1, 1, 1, 1),
    "primes": (2, 3, 1, 7, 13, 5, 3),
    "few queries": (1, 2, 2, 3, 290, 17, 9),
    "many tiles": (1, 2, 1, 150, 330, 24, 8),
}
BOOL = torch.rand(2, 1, 70, 90, generator=torch.Generator().manual_seed(3)) < 0.6
BOOL[:, :, ::7] = False
MASKS = {
    "causal": masks.causal(),
    "window": masks.window(9, 4, align="top_left") & masks.padding([90, 31]),
    "per query": masks.padding(torch.arange(140).view(2, 70) % 91, torch.arange(70).view(1, 70) // 2),
    "bool": BOOL,
    "documents": masks.documents(torch.arange(70)[None] // 20, torch.arange(90)[None] // 25)
    | masks.prefix(3),
}


def check(score: str, leaves: list[torch.Tensor], **options) -> None:
    exact, native = expected(score, leaves, **options)
    with poisoned_memory():
        got = results(call_kernels, score, leaves, **options)
    check_all(got, exact, native, leaves[0].dtype)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", PAIRS)
def test_shapes_and_dtypes(score, dtype, shape):
    # A coordinate in half precision is exact, so that both sides agree on who is within reach.
    leaves = leaves_of(score, shape, dtype)
    if dtype in (torch.bfloat16, torch.float16) and score != "additive":
        exact, _ = expected(score, leaves)
        got = results(call_kernels, score, leaves)
        wide = results(call_kernels, score, [t.float() for t in leaves])
        for name, value in got.items():
            limit = 4 * torch.finfo(dtype).eps * exact[name].nan_to_num(0, 0, 0).abs().max()
            torch.testing.assert_close(value.float(), wide[name].float(), rtol=0, atol=float(limit))
        return
    check(score, leaves)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("score", PAIRS)
def test_masks(score, mask):
    check(score, leaves_of(score, (2, 2, 1, 70, 90, 6, 4)), mask=mask)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("score", PAIRS)
def test_each_isa(score, dtype, isa, use_isa):
    use_isa(isa)
    check(score, leaves_of(score, (1, 2, 1, 37, 133, 19, 10), dtype), mask=MASKS["causal"])


@pytest.mark.parametrize("score", PAIRS)
def test_sinks_bias_and_dropout(score):
    """What comes before and after the score is the same for all of them."""
    leaves = leaves_of(score, (2, 2, 1, 40, 70, 6, 4))
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(1, 2, 40, 70, generator=generator)
    bias[..., 5] = -math.inf
    options = {"bias": bias, "dropout_p": 0.3, "dropout_seed": torch.tensor([5])}
    sinks = {"sinks": torch.randn(2, generator=generator)}
    exact = results(call_definition, score, [t.double() for t in leaves], **options, **sinks)
    got = results(call_kernels, score, leaves, **options, **sinks)
    for name, value in got.items():
        atol = 3e-5 * float(exact[name].nan_to_num(0, 0, 0).abs().max())
        torch.testing.assert_close(value.double(), exact[name], rtol=0, atol=atol)


@pytest.mark.parametrize("score", PAIRS)
def test_any_number_of_threads(score, use_threads):
    leaves = leaves_of(score, (2, 2, 1, 200, 600, 9, 8))
    use_threads(1)
    want = results(call_kernels, score, leaves, mask=masks.causal())
    for threads in (2, 5):
        use_threads(threads)
        for name, value in results(call_kernels, score, leaves, mask=masks.causal()).items():
            assert torch.equal(value, want[name]), name


@pytest.mark.parametrize("score", PAIRS)
def test_a_batch_equals_its_elements_alone(score):
    leaves = leaves_of(score, (3, 2, 2, 70, 300, 9, 8))
    together = results_with_ones(score, leaves)
    for b in range(3):
        alone = results_with_ones(score, [t[b : b + 1] if t.dim() == 4 else t for t in leaves])
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert torch.equal(together[name][b], alone[name][0]), name


def results_with_ones(score, leaves):
    leaves = [t.detach().requires_grad_() for t in leaves]
    out, lse = call_kernels(score, leaves)
    loss = out.sum() + lse.masked_fill(lse == -math.inf, 0).sum()
    grads = torch.autograd.grad(loss, leaves)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=False))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mask", ["bool", "causal", "window"])
@pytest.mark.parametrize("score", PAIRS)
def test_what_no_row_sees_changes_nothing(score, mask, bad):
    leaves = leaves_of(score, (2, 1, 1, 70, 90, 6, 4))
    visible = masks.as_mask(MASKS[mask]).to_dense(masks.MaskShape(2, 1, 70, 90)).expand(2, 1, 70, 90).clone()
    hidden = torch.tensor([3, 64, 89])
    visible[..., hidden] = False
    clean = results(call_kernels, score, leaves, mask=visible)
    dirty = [t.clone() for t in leaves]
    dirty[1][:, :, hidden[:2]] = bad
    dirty[2][:, :, hidden[1:]] = bad
    got = results(call_kernels, score, dirty, mask=visible)
    for name, value in got.items():
        atol = 2e-6 * float(clean[name].nan_to_num(0, 0, 0).abs().max())
        torch.testing.assert_close(
            value, clean[name], rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("target", [0, 1, 2])
@pytest.mark.parametrize("score", PAIRS)
def test_a_visible_nan_reaches_what_the_definition_says(score, target):
    leaves = leaves_of(score, (1, 2, 1, 40, 70, 6, 4), torch.float64)
    leaves[target][0, 0, 21, 2] = math.nan
    want = results(call_definition, score, leaves, mask=masks.causal())
    got = results(call_kernels, score, leaves, mask=masks.causal())
    for name, value in got.items():
        assert torch.equal(value.isnan(), want[name].isnan()), name


@pytest.mark.parametrize("score", DISTANCE_SCORES[1:])
def test_out_of_reach_is_hidden(score):
    """A query far from all keys is an empty row; a NaN value out of reach is not seen."""
    leaves = leaves_of(score, (1, 1, 1, 20, 80, 3, 4), torch.float64, spread=0.2)
    leaves[0][0, 0, 5] += 100
    leaves[1][0, 0, 70] -= 100
    leaves[2][0, 0, 70] = math.nan
    got = results(call_kernels, score, leaves)
    assert got["out"].isfinite().all() and got["dk"].isfinite().all() and got["dq"].isfinite().all()
    assert got["out"][0, 0, 5].count_nonzero() == 0 and got["lse"][0, 0, 5] == -math.inf
    assert got["dq"][0, 0, 5].count_nonzero() == 0
    assert got["dk"][0, 0, 70].count_nonzero() == 0 and got["dv"][0, 0, 70].count_nonzero() == 0


@pytest.mark.parametrize("score", PAIRS)
def test_empty_tensors(score):
    for shape in ((2, 1, 1, 0, 5, 3, 2), (2, 1, 1, 5, 0, 3, 2), (0, 1, 1, 5, 5, 3, 2), (1, 1, 1, 4, 5, 0, 2)):
        leaves = (
            leaves_of(score, shape)
            if shape[5]
            else [torch.randn(1, 1, n, d) for n, d in ((4, 0), (5, 0), (5, 2))]
        )
        if shape[5] == 0 and score == "additive":
            leaves.append(torch.zeros(0))
        got = results(call_kernels, score, leaves)
        assert got["out"].shape == (*shape[:2], shape[3], 2) and got["out"].isfinite().all()
        if shape[5] == 0:  # every pair is alike: the mean
            torch.testing.assert_close(got["out"], leaves[2].mean(2, keepdim=True).expand(1, 1, 4, 2))


def test_hand_worked_kernels():
    """One query at 0; keys at 0.5, 0.8, 1 and 3 with values that name them."""
    q, k = (
        torch.zeros(1, 1, 1, 1, dtype=torch.float64),
        torch.tensor([0.5, 0.8, 1.0, 3.0], dtype=torch.float64),
    )
    k, v = k.view(1, 1, 4, 1), torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64).view(1, 1, 4, 1)
    want = {
        "boxcar": (1 + 10 + 100) / 3,
        "epanechnikov": (0.75 * 1 + 0.36 * 10) / (0.75 + 0.36),
        "triangular": (0.5 * 1 + 0.2 * 10) / (0.5 + 0.2),
    }
    gauss = [math.exp(-x * x / 2) for x in (0.5, 0.8, 1.0, 3.0)]
    want["gaussian"] = sum(g * x for g, x in zip(gauss, (1, 10, 100, 1000), strict=True)) / sum(gauss)
    for score, value in want.items():
        out, lse = call_kernels(score, [q, k, v])
        assert out.item() == pytest.approx(value, rel=1e-14)
    assert lse.item() == pytest.approx(math.log(sum(gauss)), rel=1e-14)


@pytest.mark.parametrize("score", PAIRS)
def test_finite_differences(score):
    leaves = [t.requires_grad_() for t in leaves_of(score, (1, 2, 1, 3, 5, 2, 2), torch.float64, spread=0.4)]
    assert torch.autograd.gradcheck(lambda *t: call_kernels(score, list(t)), leaves)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
@pytest.mark.parametrize("queries, keys", [(4000, 255), (1500, 1500)])
def test_gradients_over_many_pairs(queries, keys, isa, native, use_isa):
    """Millions of pairs add to each element of dw: what a tile's row adds goes to a sum in double."""
    if isa not in native.info()["isas"]:
        pytest.skip(f"cpu: this machine and build have {native.info()['isas']}, not {isa}")
    use_isa(isa)
    check("additive", leaves_of("additive", (1, 1, 1, queries, keys, 4, 3), torch.float32))

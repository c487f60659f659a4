"""attention_weights: the weights that attention gives, for chosen queries and keys."""

from __future__ import annotations

import pytest
import torch
from call_support import EXACT, NATIVE, grads, qkv, randn

import fastattn
from fastattn import reference
from fastattn.biases import ALiBi, RelativePosition
from fastattn.masks import causal, documents, padding, predicate, prefix, window

OPTIONS = {
    "plain": {},
    "scale": {"scale": -0.5, "softcap": 2.0},
    "sinks": {"sinks": randn(4)},
    "causal": {"mask": causal()},
    "window": {"mask": window(1, 1, align="top_left")},
    "padding": {"mask": padding([3, 0])},
    "documents": {"mask": documents(torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[0, 1, 1, 1, 2, 2, 0]]))},
    "prefix": {"mask": causal() | prefix([2, 4])},
    "built": {"mask": (causal() | prefix(2)).build(5, 7)},
    "predicate": {"mask": predicate(lambda b, h, i, j: (i + j + h) % 2 == 0)},
    "bool": {"mask": randn(2, 1, 5, 7) > 0},
    "bool of keys": {"mask": randn(7) > 0},
    "bias": {"bias": randn(4, 5, 7)},
    "bias of keys": {"bias": randn(7).masked_fill(torch.arange(7) == 2, -torch.inf)},
    "bias of rows": {"bias": randn(2, 1, 5, 1)},
    "alibi": {"bias": ALiBi(randn(4)), "mask": causal()},
    "alibi of the batch": {"bias": ALiBi(randn(2, 4), align="top_left")},
    "relative": {"bias": RelativePosition(randn(8, 4))},
}
CHOICES = {
    "all": {},
    "rows": {"rows": [3, 0, 3]},
    "cols": {"cols": torch.tensor([6, 1])},
    "both": {"rows": slice(1, 4), "cols": [0, -1]},
    "one": {"rows": -1, "cols": 2},
    "none": {"rows": [], "cols": []},
    "no cols": {"cols": []},
}


def chosen(weights, rows=None, cols=None):
    rows = [rows] if isinstance(rows, int) else (slice(None) if rows is None else rows)
    cols = [cols] if isinstance(cols, int) else (slice(None) if cols is None else cols)
    return weights[:, :, rows][:, :, :, cols]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_chosen_weights(options, choice):
    q, k, _ = qkv(2, 4, 2, 5, 7, grad=True)
    got, got_grads = grads(lambda q, k: fastattn.attention_weights(q, k, **choice, **options), [q, k])
    want, want_grads = grads(
        lambda q, k: chosen(reference.attention_weights(q, k, **options), **choice), [q, k]
    )
    for a, b in zip(got + got_grads, want + want_grads, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_they_are_the_weights_of_the_call(options):
    q, k, v = qkv(2, 4, 2, 5, 7)
    weights = fastattn.attention_weights(q, k, **options)
    got = weights @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(got, fastattn.attention(q, k, v, **options), **EXACT)


@pytest.mark.parametrize("choice", [{"rows": [1, 4]}, {"cols": [0, 3]}], ids=["rows", "cols"])
def test_gradients_of_biases_and_sinks(choice):
    q, k, _ = qkv(2, 4, 2, 5, 7)
    learned = [randn(4, 5, 1, grad=True), randn(4, grad=True), randn(4, seed=3, grad=True)]

    def call(function, bias, slopes, sinks, choice):
        first = function(q, k, bias=bias, sinks=sinks, **choice)
        return first, function(q, k, bias=ALiBi(slopes), **choice)

    got = grads(lambda *t: call(fastattn.attention_weights, *t, choice), learned)[1]
    want = grads(
        lambda *t: [chosen(w, **choice) for w in call(reference.attention_weights, *t, {})], learned
    )[1]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.skipif(not NATIVE, reason="the native core is not built")
@pytest.mark.parametrize("choice", [{"rows": [4]}, {"cols": [1]}, {}], ids=["rows", "cols", "all"])
def test_nothing_leaks_from_what_is_masked(choice):
    q, k, _ = qkv(1, 2, 2, 5, grad=True)
    clean = fastattn.attention_weights(q, k, mask=padding([4]), **choice)
    dirty_k = k.detach().clone()
    dirty_k[:, :, 4] = torch.nan
    dirty_k.requires_grad_()
    dirty = fastattn.attention_weights(q, dirty_k, mask=padding([4]), **choice)
    torch.testing.assert_close(dirty, clean, **EXACT)
    got = torch.autograd.grad((dirty * dirty).sum(), (q, dirty_k))
    want = torch.autograd.grad((clean * clean).sum(), (q, k))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("options", ["causal", "padding", "built", "predicate", "bool"])
def test_in_a_row_of_nan_hidden_pairs_weigh_nothing(options):
    q, k, _ = qkv(2, 4, 2, 5, 7)
    hidden = reference.attention_weights(q, k, **OPTIONS[options]) == 0
    q[:, :, 3] = torch.nan
    for choice in CHOICES.values():
        got, rows = fastattn.attention_weights(q, k, **OPTIONS[options], **choice), chosen(hidden, **choice)
        assert torch.equal(got == 0, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    q, k, _ = qkv(2, 4, 2, 5, 7, dtype=dtype)
    want = reference.attention_weights(q.double(), k.double())
    for choice in ({}, {"rows": [2]}, {"cols": [2]}):
        got = fastattn.attention_weights(q, k, **choice)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), chosen(want, **choice), rtol=0, atol=1e-6)


def test_columns_of_a_long_call_take_linear_memory():
    q, k, _ = qkv(1, 1, 1, 3000, 3000, 8, dtype=torch.float32)
    got = fastattn.attention_weights(q, k, cols=[5, 2999], mask=causal())
    assert got.shape == (1, 1, 3000, 2)
    want = fastattn.attention_weights(q, k, rows=[7, 2999], cols=[5, 2999], mask=causal())
    torch.testing.assert_close(got[:, :, [7, 2999]], want, rtol=1e-5, atol=1e-7)
    assert got[0, 0, 4, 0] == 0


def test_more_columns_than_one_pass_takes():
    q, k, _ = qkv(1, 4, 2, 40, 700, dtype=torch.float32)
    got = fastattn.attention_weights(q, k, cols=range(5, 695), mask=causal())
    torch.testing.assert_close(got, fastattn.attention_weights(q, k, mask=causal())[..., 5:695])


@pytest.mark.parametrize("choice", [{"rows": [0, 1]}, {"cols": [0, 3]}], ids=["rows", "cols"])
def test_rows_of_the_lowest_bias_stay_uniform(choice):
    q, k, _ = qkv(1, 2, 2, 2, 4, dtype=torch.float32)
    lowest = torch.full((2, 4), torch.finfo(torch.float32).min)
    got = fastattn.attention_weights(q, k, bias=lowest, **choice)
    torch.testing.assert_close(got, torch.full_like(got, 0.25))


def test_the_docstrings_example_by_hand():
    q = k = torch.eye(2).view(1, 1, 2, 2)
    mask = torch.tensor([[True, False], [True, True]])
    assert fastattn.attention_weights(q, k, rows=[1], mask=mask, scale=0.0).tolist() == [[[[0.5, 0.5]]]]


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_under_autocast_they_are_the_weights_of_the_rounded_call(choice):
    q, k, _ = qkv(2, 4, 2, 5, 7, dtype=torch.float32)
    want = fastattn.attention_weights(q.bfloat16(), k.bfloat16(), **choice)
    with torch.autocast("cpu", torch.bfloat16):
        got = fastattn.attention_weights(q, k, **choice)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_a_forced_backend_that_cannot_run_raises(choice):
    q, k, _ = qkv(2, 4, 2, 5, 7)
    with pytest.raises(ValueError, match="backend must be one of"):
        fastattn.attention_weights(q, k, backend="nope", **choice)
    with pytest.raises(NotImplementedError, match="backend 'cuda' cannot run"):
        fastattn.attention_weights(q, k, backend="cuda", **choice)

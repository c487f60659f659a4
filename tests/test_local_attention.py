"""nn.LocalAttention: Luong's local-m and local-p, and a window around the largest score."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from call_support import EXACT, NATIVE, randn
from score_support import ISAS

from fastattn import masks
from fastattn.nn import LocalAttention
from fastattn.testing.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, check

needs_native = pytest.mark.skipif(not NATIVE, reason="the native core is not built")
CENTRES = ("monotonic", "predictive", "argmax")
LENS = {"none": None, "1-D": [12, 5], "2-D": torch.arange(18).view(2, 9) % 13}


def make(centre, window=2, **keywords):
    torch.manual_seed(0)
    return LocalAttention(window, centre, 8, dtype=torch.float64, **keywords)


def inputs(grad=False):
    shapes = ((2, 9, 8), (2, 12, 8), (2, 12, 3))
    return [randn(*shape, seed=n, grad=grad) for n, shape in enumerate(shapes)]


def visible_of(lens, mask=None):
    lens = torch.tensor([12, 12]) if lens is None else torch.as_tensor(lens)
    lens = lens[:, None, None] if lens.dim() == 1 else lens[:, :, None]
    visible = (torch.arange(12) < lens).expand(2, 9, 12)
    return visible if mask is None else visible & mask, lens


def definition(layer, queries, keys, lens=None, mask=None):
    """The weights by the formula, with the whole matrix."""
    visible, lens = visible_of(lens, mask)
    scores = queries @ keys.mT / 8**0.5
    j, gauss = torch.arange(12, dtype=torch.float64), 1.0
    if layer.centre == "monotonic":
        centre = torch.arange(9, dtype=torch.float64)[:, None]
    elif layer.centre == "argmax":
        centre = scores.masked_fill(~visible, -math.inf).argmax(-1, keepdim=True)
    else:
        centre = lens * torch.sigmoid(layer.v_p(torch.tanh(layer.W_p(queries))))
        gauss = torch.exp(-((j - centre) ** 2) / (2 * (layer.window / 2) ** 2))
    near = (j - centre).abs() <= layer.window
    scores = scores.masked_fill(~(visible & near), -math.inf)
    weights = torch.where((visible & near).any(-1, keepdim=True), scores, 0.0).softmax(-1)
    return torch.where(visible & near, weights * gauss, 0.0)


@pytest.mark.parametrize("lens", LENS.values(), ids=LENS)
@pytest.mark.parametrize("centre", CENTRES)
def test_equals_its_formula(centre, lens):
    layer = make(centre)
    tensors = inputs(grad=True)
    queries, keys, values = tensors
    out = layer(queries, keys, values, lens)
    weights = definition(layer, queries, keys, lens)
    torch.testing.assert_close(out, weights @ values, **EXACT)
    torch.testing.assert_close(layer.attention_weights, weights.detach(), **EXACT)
    leaves = [*tensors, *layer.parameters()]
    got = torch.autograd.grad(out.square().sum(), leaves)
    want = torch.autograd.grad((weights @ values).square().sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("centre", CENTRES)
def test_masks_join_the_window(centre):
    layer = make(centre)
    queries, keys, values = inputs()
    mask = torch.rand(2, 9, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    out = layer(queries, keys, values, [12, 7], mask)
    want = definition(layer, queries, keys, [12, 7], mask)
    torch.testing.assert_close(out, want @ values, **EXACT)
    one_for_all = mask[0]
    want = definition(layer, queries, keys, None, one_for_all)
    torch.testing.assert_close(layer(queries, keys, values, mask=one_for_all), want @ values, **EXACT)
    causal = masks.causal(align="top_left")
    want = definition(layer, queries, keys, None, torch.ones(9, 12, dtype=torch.bool).tril())
    torch.testing.assert_close(layer(queries, keys, values, mask=causal), want @ values, **EXACT)


@pytest.mark.parametrize("centre", CENTRES)
def test_without_a_batch_and_copies(centre):
    layer = make(centre)
    queries, keys, values = inputs()
    want = layer(queries, keys, values, [7, 9])[0]
    torch.testing.assert_close(layer(queries[0], keys[0], values[0], 7), want, **EXACT)
    assert layer.attention_weights.shape == (9, 12)
    assert copy.deepcopy(layer).attention_weights is None


@pytest.mark.parametrize("centre", CENTRES)
def test_keys_outside_the_window_are_not_looked_at(centre):
    """Only to find the largest score is every key looked at."""
    layer = make(centre, window=1)
    queries, keys, values = inputs()
    out = layer(queries, keys, values, [12, 12])
    used = (layer.attention_weights > 0).any(1)
    assert not used.all()
    values = values.masked_fill(~used[..., None], math.nan)
    if centre != "argmax":
        keys = keys.masked_fill(~used[..., None], math.nan)
    torch.testing.assert_close(layer(queries, keys, values, [12, 12]), out, **EXACT)


def test_a_window_around_a_planted_key():
    """The key that the query names stands at 70: what is averaged are positions 68 to 72."""
    keys = torch.zeros(1, 100, 8)
    keys[0, 70, 0] = 100
    positions = torch.arange(100.0).view(1, 100, 1)
    layer = LocalAttention(2, "argmax", scale=0.0)
    query = torch.eye(1, 8)[None]
    with pytest.raises(AssertionError):  # with a scale of 0 all scores are equal: the first key
        torch.testing.assert_close(layer(query, keys, positions), torch.full((1, 1, 1), 70.0))
    layer = LocalAttention(2, "argmax", scale=1e-9)
    torch.testing.assert_close(layer(query, keys, positions), torch.full((1, 1, 1), 70.0))


@pytest.mark.parametrize("centre", CENTRES)
def test_lengths_of_zero(centre):
    layer = make(centre)
    queries, keys, values = inputs(grad=True)
    out = layer(queries, keys, values, [0, 3])
    assert (out[0] == 0).all()
    for gradient in torch.autograd.grad(out.sum(), (queries, keys, values)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: LocalAttention(2, "local-m"),
            ValueError,
            "centre must be one of monotonic, predictive, argmax, got 'local-m'",
        ),
        (lambda: LocalAttention(-1), ValueError, "window must be >= 0, got -1"),
        (lambda: LocalAttention(0, "predictive", 8), ValueError, "window must be >= 1, got 0"),
        (
            lambda: LocalAttention(2, "predictive"),
            ValueError,
            'query_size must be given with centre="predictive", got None',
        ),
        (
            lambda: make("predictive")(randn(2, 9, 7), randn(2, 12, 7), randn(2, 12, 3)),
            ValueError,
            "queries must have 8 features, got shape [2, 9, 7]",
        ),
        (
            lambda: make("monotonic")(randn(1, 2, 9, 8), randn(1, 2, 12, 8), randn(1, 2, 12, 3)),
            ValueError,
            "queries must be [L, D] without a batch, [B, L, D], got shape [1, 2, 9, 8]",
        ),
        (
            lambda: make("argmax")(randn(2, 9, 8), randn(2, 12, 7), randn(2, 12, 3)),
            ValueError,
            "keys must have queries's head_dim 8, got 7",
        ),
    ],
    ids=["centre", "window", "gaussian", "size", "features", "heads", "keys"],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()


@pytest.mark.parametrize("centre", CENTRES)
def test_under_transforms(centre):
    layer, x = make(centre, window=1), randn(3, 2, 5, 8)
    torch.testing.assert_close(
        torch.vmap(lambda x: layer(x, x, x))(x), torch.stack([layer(y, y, y) for y in x])
    )
    assert layer.attention_weights is not None, "the last call is the plain one"
    y = x[0].clone().requires_grad_()
    for options in ({}, {"mask": masks.causal()}):
        (want,) = torch.autograd.grad(layer(y, y, y, [5, 2], **options).square().sum(), y)
        found = torch.func.grad(lambda x, o=options: layer(x, x, x, [5, 2], **o).square().sum())(x[0])
        torch.testing.assert_close(found, want)


@needs_native
@pytest.mark.parametrize(
    "mask", [None, masks.causal(), torch.ones(5, 5).tril() > 0], ids=["", "mask", "bool"]
)
@pytest.mark.parametrize("centre", CENTRES)
def test_compiles(centre, mask):
    torch._dynamo.reset()  # its limit of 8 compilations is one for all that share a forward
    layer, x = make(centre), randn(2, 5, 8, grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    lens = torch.tensor([5, 3])
    got, want = compiled(x, x, x, lens, mask), layer(x, x, x, lens, mask)
    torch.testing.assert_close(got, want, **EXACT)
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), x) for o in (got, want)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def long_inputs(seqlen_q=700, seqlen_k=1500):
    """A layer whose centres lie all over the keys, in no order."""
    torch.manual_seed(1)
    layer = LocalAttention(5, "predictive", 8, dtype=torch.float64)
    torch.nn.init.normal_(layer.v_p.weight, std=4)
    shapes = ((1, seqlen_q, 8), (1, seqlen_k, 8), (1, seqlen_k, 4))
    return layer, [randn(*shape, seed=n) for n, shape in enumerate(shapes)]


def luong(layer, queries, keys, values):
    """Equations 9 and 10 with the whole matrix, in the dtype of what is given."""
    centres = keys.shape[1] * torch.sigmoid(layer.v_p(torch.tanh(layer.W_p(queries))))
    return luong_at(centres, layer.window, queries, keys, values)


def luong_at(centres, window, queries, keys, values):
    j = torch.arange(keys.shape[1]).to(queries.dtype)
    near = (j - centres).abs() <= window
    weights = (queries @ keys.mT / 8**0.5).masked_fill(~near, -math.inf).softmax(-1)
    return (weights * torch.exp(-((j - centres) ** 2) / (2 * (window / 2) ** 2))) @ values


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_centres_far_along_are_as_exact_as_any(isa, native, use_isa):
    if isa not in native.info()["isas"]:
        pytest.skip(f"cpu: this machine and build have {native.info()['isas']}, not {isa}")
    use_isa(isa)
    layer, exact_inputs = long_inputs()
    narrow = copy.deepcopy(layer).float()
    found = {}
    for name, model, run, dtype in (
        ("exact", layer, luong, torch.float64),
        ("eager", narrow, luong, torch.float32),
        ("ours", narrow, lambda layer, *x: layer(*x), torch.float32),
    ):
        leaves = [x.to(dtype).requires_grad_() for x in exact_inputs]
        out = run(model, *leaves)
        weight = randn(*out.shape, seed=9).to(dtype)
        gradients = torch.autograd.grad((out * weight).sum(), [*leaves, *model.parameters()])
        found[name] = [out.detach(), *gradients]
    names = ("out", "dq", "dk", "dv", *(f"d{name}" for name, _ in layer.named_parameters()))
    for name, exact, eager, ours in zip(names, *found.values(), strict=True):
        check(name, ours, exact, eager, FORWARD_FACTOR if name == "out" else GRADIENT_FACTOR)


@needs_native
def test_sorting_is_not_seen():
    layer, tensors = long_inputs()
    out = layer(*tensors)
    torch.testing.assert_close(out, luong(layer, *tensors), **EXACT)
    torch.testing.assert_close(layer.attention_weights @ tensors[2], out, **EXACT)
    mask = torch.rand(700, 1500, generator=torch.Generator().manual_seed(0)) < 0.7
    queries, keys, values = tensors
    some = layer(queries, keys, values, mask=mask)
    torch.testing.assert_close(layer.attention_weights @ values, some, **EXACT)
    assert (layer.attention_weights[0][~mask] == 0).all() and not torch.equal(some, out)


def run_and_check(layer, tensors, dtype):
    """The layer's output, if it is Luong's formula in float64 for the centres that it predicted itself."""
    centres, predict = [], layer._centres
    layer._centres = lambda *inputs: centres.append(predict(*inputs)) or centres[-1]
    out = layer(*tensors)
    queries, keys, values = (x.to(dtype).double() for x in tensors)
    want = luong_at(centres[0].double().unsqueeze(-1), layer.window, queries, keys, values)
    step = torch.finfo(dtype).eps * want.abs().max().item()
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2 * step)
    torch.testing.assert_close(layer.attention_weights.double() @ values, want, rtol=0, atol=2 * step)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_positions(dtype):
    layer, tensors = long_inputs(50, 300)
    assert run_and_check(layer.to(dtype), [x.to(dtype) for x in tensors], dtype).dtype == dtype


@needs_native
def test_autocast_rounds_no_position():
    layer, tensors = long_inputs(50, 300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run_and_check(layer.float(), [x.float() for x in tensors], torch.bfloat16)
    assert out.dtype == torch.bfloat16

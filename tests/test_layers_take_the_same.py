"""What all layers over queries, keys and values take: lengths, masks, shapes; and what they refuse."""

from __future__ import annotations

import re

import pytest
import torch

import fastattn
from fastattn import masks, nn

FEATURES, KEYS, QUERIES = 6, 7, 4
LAYERS = {
    "attention": nn.Attention,
    "additive": lambda: nn.AdditiveAttention(FEATURES, FEATURES, 8),
    "regression": nn.KernelRegression,
    "hard": lambda: nn.HardAttention("argmax"),
    "monotonic": lambda: nn.LocalAttention(9),
    "predictive": lambda: nn.LocalAttention(9, "predictive", FEATURES),
    "argmax": lambda: nn.LocalAttention(9, "argmax"),
}
# Layers of one sequence, and their calls.
SELF = {
    "single head": (
        lambda: nn.SingleHeadAttention(FEATURES, 3),
        lambda layer, x, lens: layer(x, None, lens)[0],
    ),
    "multi-head": (
        lambda: nn.MultiHeadSelfAttention(FEATURES, 2),
        lambda layer, x, lens: layer(x, None, lens)[0],
    ),
    "torch's": (
        lambda: nn.MultiheadAttention(FEATURES, 2, batch_first=True),
        lambda layer, x, lens: layer(x, valid_lens=lens)[0],
    ),
    "pooling": (lambda: nn.AttentionPooling(FEATURES), lambda layer, x, lens: layer(x, lens)),
    "sentence": (nn.SentenceEncoder, lambda layer, x, lens: layer(x, lens)),
}


def inputs(*lead):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*lead, n, FEATURES, generator=generator) for n in (QUERIES, KEYS, KEYS)]


@pytest.mark.parametrize("lens, got", [([8, 1], 8), ([3, -1], -1), (torch.tensor([[7, 7, 7, 9]] * 2), 9)])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_lengths_out_of_range_are_refused(make, lens, got):
    with pytest.raises(
        ValueError, match=f"valid_lens must be from 0 to the number of keys, {KEYS}, got {got}"
    ):
        make()(*inputs(2), lens)


@pytest.mark.parametrize("make, call", SELF.values(), ids=SELF)
def test_lengths_of_one_sequence_too(make, call):
    layer, x = make(), torch.randn(2, KEYS, FEATURES)
    for lens in ([8, 1], [3, -1]):
        with pytest.raises(ValueError, match=f"valid_lens must be from 0 to the number of keys, {KEYS}, got"):
            call(layer, x, lens)
    with pytest.raises(TypeError, match="valid_lens must be integers, got float32"):
        call(layer, x, [1.0, 2.0])
    assert call(layer, x, [0, KEYS]).isfinite().all()
    if not isinstance(layer, nn.MultiheadAttention):
        with pytest.raises(TypeError, match=r"x must be one of float32, .*, got int64"):
            call(layer, x.long(), None)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_what_a_mask_hides_lengths_hide(make):
    layer, tensors = make(), inputs(2)
    lens = torch.tensor([3, 7])
    hidden = (torch.arange(KEYS) < lens[:, None, None]).expand(2, QUERIES, KEYS)
    if getattr(layer, "centre", None) == "predictive":
        return  # its centres are a share of the lengths
    want = layer(*tensors, lens)
    for mask in (hidden, masks.padding(lens), masks.dense(hidden[:, None])):
        torch.testing.assert_close(layer(*tensors, None, mask), want)
    torch.testing.assert_close(layer(*tensors, lens[:, None].expand(2, QUERIES), hidden[1]), want)
    one = layer(*(t[0] for t in tensors), 3)
    torch.testing.assert_close(one, want[0])
    torch.testing.assert_close(layer(*(t[0] for t in tensors), [3] * QUERIES), want[0])


BAD_CALLS = {
    "list": (lambda q, k, v: (q.tolist(), k, v), TypeError, "queries must be a torch.Tensor, got list"),
    "none": (lambda q, k, v: (q, None, v), TypeError, "keys must be a torch.Tensor, got NoneType"),
    "rank": (
        lambda q, k, v: (q[0, 0], k, v),
        ValueError,
        "queries must be [L, D] without a batch, [B, L, D]",
    ),
    "ranks": (lambda q, k, v: (q, k[0], v), ValueError, "keys must be 3-D like queries, got shape [7, 6]"),
    "device": (
        lambda q, k, v: (q, k, v.to("meta")),
        ValueError,
        "values must be on queries's device cpu, got",
    ),
    "dtype": (
        lambda q, k, v: (q, k, v.double()),
        TypeError,
        "values must have queries's dtype float32, got float64",
    ),
    "length": (
        lambda q, k, v: (q, k, v[:, :5]),
        ValueError,
        "values must have keys's length 7, got shape [2, 5, 6]",
    ),
    "integers": (
        lambda q, k, v: (q.long(), k, v),
        TypeError,
        "queries must be one of float32, bfloat16, float16, float64, got int64",
    ),
    "mask for lens": (
        lambda q, k, v: (q, k, v, torch.ones(4, 7) > 0),
        TypeError,
        "valid_lens must be integers, got bool: a mask goes to mask=",
    ),
    "features": (lambda q, k, v: (q, k[..., :5], v), ValueError, "keys must have"),
    "float mask": (
        lambda q, k, v: (q, k, v, None, torch.zeros(4, 7)),
        TypeError,
        "mask must be bool (True = attend)",
    ),
    "no mask": (
        lambda q, k, v: (q, k, v, [1, 2], [[True]]),
        TypeError,
        "mask must be a fastattn.masks.Mask or",
    ),
    "mask": (lambda q, k, v: (q, k, v, None, torch.ones(4, 8) > 0), ValueError, "mask must broadcast to"),
    "lens": (
        lambda q, k, v: (q, k, v, [1, 2, 3]),
        ValueError,
        "valid_lens must be [B] or [B, Lq], here [2] or [2, 4]",
    ),
}


@pytest.mark.parametrize("change, kind, message", BAD_CALLS.values(), ids=BAD_CALLS)
@pytest.mark.parametrize("make", [m for name, m in LAYERS.items() if name != "attention"])
def test_wrong_arguments_are_named_as_the_layer_names_them(make, change, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        make()(*change(*inputs(2)))


LEARNED = {
    "bilinear": (lambda: nn.Attention("bilinear", query_size=FEATURES), "queries"),
    "additive score": (lambda: nn.Attention("additive", query_size=FEATURES), "queries"),
    "additive": (LAYERS["additive"], "queries"),
    "predictive": (LAYERS["predictive"], "queries"),
    "single head": (SELF["single head"][0], "x"),
    "multi-head": (SELF["multi-head"][0], "x"),
    "pooling": (SELF["pooling"][0], "x"),
    "hierarchical": (lambda: nn.HierarchicalAttention(FEATURES), "x"),
}


@pytest.mark.parametrize("make, name", LEARNED.values(), ids=LEARNED)
def test_another_dtype_than_the_layer_s_is_named(make, name):
    layer, tensors = make(), [t.double() for t in inputs(2)]
    if isinstance(layer, nn.HierarchicalAttention):
        tensors = [tensors[0][None]]
    arguments = tensors if name == "queries" else tensors[:1]
    with pytest.raises(TypeError, match=f"{name} must have the layer's dtype float32, got float64"):
        layer(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which sees to it
        layer(*(t.bfloat16() for t in arguments))
    layer.double()(*arguments)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_under_autocast_as_attention_is(make):
    layer, tensors = make(), [t.requires_grad_() for t in inputs(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(*tensors, [3, 7])
    distances = isinstance(layer, nn.KernelRegression)
    assert out.dtype == (torch.float32 if distances else torch.bfloat16)
    torch.testing.assert_close(out.float(), layer(*tensors, [3, 7]), rtol=0, atol=0.2)
    assert layer.attention_weights.shape == (2, QUERIES, KEYS)
    for gradient in torch.autograd.grad(out.float().sum(), tensors):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("score", ["gaussian", "boxcar", "epanechnikov", "triangular"])
def test_a_distance_is_not_capped(score):
    from fastattn import execution
    from fastattn.call import Call

    q, k, v = (t[:, None] for t in inputs(2))
    with pytest.raises(ValueError, match=f"softcap must be None with the score '{score}', got 5.0"):
        execution.run(Call("attention", q, k, v, softcap=5.0, score=score))
    assert fastattn.attention(q, k, v, softcap=5.0).shape == q.shape

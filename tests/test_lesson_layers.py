"""Self-attention as lessons write it, and sentences as one vector."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import masks
from fastattn.nn import (
    Attention,
    MultiheadAttention,
    MultiHeadSelfAttention,
    SentenceEncoder,
    SingleHeadAttention,
)
from fastattn.nn.sentence import weight_table

B, L, WIDTH = 2, 5, 12

FUTURE = torch.ones(L, L, dtype=torch.int64).triu(1)
BLOCKED = torch.stack([FUTURE, torch.zeros_like(FUTURE)])
BLOCKED[1, 2] = 1  # a row that sees nothing

MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "matrix": {"mask": FUTURE},
    "float": {"mask": BLOCKED.float()},
    "bool": {"mask": BLOCKED.bool()},
    "object": {"mask": masks.causal()},
    "lens": {"valid_lens": torch.tensor([3, 0])},
    "both": {"mask": FUTURE, "valid_lens": torch.tensor([[1, 2, 2, 2, 5], [0, 1, 2, 3, 4]])},
}


def blocked(options: dict[str, Any]) -> Tensor:
    """True where a pair is blocked, [B, 1, L, L]."""
    mask, lens = options.get("mask"), options.get("valid_lens")
    hidden = torch.zeros(B, 1, L, L, dtype=torch.bool)
    if isinstance(mask, Tensor):
        hidden |= (mask if mask.dim() == 2 else mask[:, None]) == 1
    elif mask is not None:
        hidden |= FUTURE == 1
    if lens is not None:
        hidden |= torch.arange(L) >= (lens if lens.dim() == 2 else lens[:, None])[:, None, :, None]
    return hidden


def softmax(scores: Tensor, hidden: Tensor) -> Tensor:
    """Rows of exp over their sum, with 0 in a row of nothing."""
    exp = torch.where(hidden, 0.0, scores.exp())
    return exp / exp.sum(-1, keepdim=True).where(~hidden.all(-1, keepdim=True), torch.tensor(1.0).double())


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_single_head_is_the_formula(options):
    layer = SingleHeadAttention(WIDTH, 4, dtype=torch.float64)
    assert [(n, list(p.shape)) for n, p in layer.named_parameters()] == [
        ("W_q.weight", [4, WIDTH]),
        ("W_k.weight", [4, WIDTH]),
        ("W_v.weight", [WIDTH, WIDTH]),
    ]
    x = torch.randn(B, L, WIDTH, dtype=torch.float64)
    output, weights = layer(x, **options)
    q, k, v = (x @ w.weight.T for w in (layer.W_q, layer.W_k, layer.W_v))
    want = softmax(q @ k.mT / math.sqrt(4), blocked(options)[:, 0])
    torch.testing.assert_close(weights, want, rtol=0, atol=1e-14)
    torch.testing.assert_close(output, want @ v, rtol=0, atol=1e-14)
    torch.testing.assert_close(layer.attention_weights, want, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        weights.sum(-1) + blocked(options)[:, 0].all(-1).double(), torch.ones(B, L).double()
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_multi_head_is_the_formula(options, bias):
    layer = MultiHeadSelfAttention(WIDTH, 3, bias, dtype=torch.float64)
    x = torch.randn(B, L, WIDTH, dtype=torch.float64)
    output, weights = layer(x, **options)
    assert weights.shape == (B, 3, L, L)
    q, k, v = (w(x).view(B, L, 3, 4).transpose(1, 2) for w in (layer.W_q, layer.W_k, layer.W_v))
    want = softmax(q @ k.mT / 2, blocked(options))
    torch.testing.assert_close(weights, want, rtol=0, atol=1e-14)
    joined = (want @ v).transpose(1, 2).reshape(B, L, WIDTH)
    torch.testing.assert_close(output, layer.W_o(joined), rtol=0, atol=1e-14)
    torch.testing.assert_close(layer.attention_weights, weights, rtol=0, atol=1e-14)


def test_masks_by_head():
    layer = MultiHeadSelfAttention(WIDTH, 3)
    x = torch.randn(B, L, WIDTH)
    hidden = torch.zeros(B, 3, L, L, dtype=torch.int64)
    hidden[0, 1, 2, 3] = hidden[1, 2, 0] = 1
    _, weights = layer(x, hidden)
    assert torch.equal(weights == 0, hidden == 1)


@pytest.mark.parametrize("kind", [lambda: SingleHeadAttention(6, 2), lambda: MultiHeadSelfAttention(6, 2)])
def test_gradients(kind):
    layer = kind().double()
    x = torch.randn(B, L, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, *layer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, BLOCKED), inputs, fast_mode=True)


def test_a_blocked_row_is_zero_where_minus_1e9_lets_the_hidden_through():
    """What the docstring says of the two forms."""
    layer = SingleHeadAttention(WIDTH, 4)
    x = torch.randn(1, L, WIDTH)
    mask = FUTURE.clone()
    mask[3] = 1
    output, weights = layer(x, mask)
    assert not weights[0, 3].any() and not output[0, 3].any()
    q, k, v = (w(x) for w in (layer.W_q, layer.W_k, layer.W_v))
    usual = torch.softmax(q @ k.mT / 2 + mask * -1e9, -1)
    torch.testing.assert_close(usual[0, 3], torch.full((L,), 1 / L), rtol=0, atol=1e-7)
    torch.testing.assert_close((usual @ v)[0, 3], v[0].mean(0))
    torch.testing.assert_close(usual[0, :3], weights[0, :3])  # elsewhere they agree


BAD = {
    "width": (
        lambda: SingleHeadAttention(8, 4)(torch.zeros(2, 3, 7)),
        ValueError,
        r"x must be \[B, L, 8\], got shape \[2, 3, 7\]",
    ),
    "rank": (
        lambda: MultiHeadSelfAttention(8, 4)(torch.zeros(3, 8)),
        ValueError,
        r"x must be \[B, L, 8\], got shape \[3, 8\]",
    ),
    "additive": (
        lambda: SingleHeadAttention(8, 4)(torch.zeros(2, 3, 8), FUTURE[:3, :3] * -1e9),
        ValueError,
        r"mask must hold 1 \(blocked\) and 0 \(visible\), got -1e\+09",
    ),
    "shape": (
        lambda: MultiHeadSelfAttention(8, 4)(torch.zeros(2, 3, 8), torch.zeros(2, 3)),
        ValueError,
        r"mask must broadcast to \[2, 4, 3, 3\], got \[2, 3\]",
    ),
    "heads": (
        lambda: MultiHeadSelfAttention(8, 3),
        ValueError,
        "d_model must be a multiple of num_heads=3, got 8",
    ),
    "d_k": (lambda: SingleHeadAttention(8, 0), ValueError, "d_k must be >= 1, got 0"),
}


@pytest.mark.parametrize("make, kind, message", BAD.values(), ids=BAD)
def test_errors(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


WORDS = ["the", "animal", "was", "tired"]
VECTORS = dict(zip(WORDS, torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), strict=True))


def test_a_sentence_becomes_one_vector_and_a_table(capsys):
    vector, weights = SentenceEncoder().encode(WORDS, VECTORS)
    x = torch.stack(list(VECTORS.values()))
    want = torch.softmax(x @ x.T / math.sqrt(6), -1)
    torch.testing.assert_close(weights, want)
    torch.testing.assert_close(vector, (want @ x).mean(0))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == WORDS
    for line, word, row in zip(printed[1:], WORDS, want, strict=True):
        assert line.split() == [word, *(f"{value:.3f}" for value in row.tolist())]
    assert len({len(line) for line in printed}) == 1  # columns stand below one another
    SentenceEncoder().encode(WORDS, VECTORS, show=False)
    assert not capsys.readouterr().out


def test_wide_characters_keep_the_columns():
    lines = weight_table(["我", "喜欢看书"], torch.eye(2)).splitlines()
    assert lines == ["            我 喜欢看书", "我       1.000    0.000", "喜欢看书 0.000    1.000"]


def test_a_learned_encoder_and_batches_of_sentences():
    encoder = SentenceEncoder(SingleHeadAttention(6, 3))
    x = torch.randn(3, 4, 6)
    lens = torch.tensor([4, 2, 0])
    out = encoder(x, lens)
    assert encoder.attention_weights.shape == (3, 4, 4)
    torch.testing.assert_close(out[0], encoder(x[:1])[0])
    torch.testing.assert_close(out[1], encoder(x[1:2, :2])[0])
    assert not out[2].any()
    vector, _ = encoder.encode(WORDS, VECTORS, show=False)
    vector.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in encoder.parameters())


def test_heads_are_averaged_in_the_table(capsys):
    _, weights = SentenceEncoder(MultiHeadSelfAttention(6, 2)).encode(WORDS, VECTORS)
    assert weights.shape == (2, 4, 4)
    first = capsys.readouterr().out.splitlines()[1]
    assert first.split() == ["the", *(f"{value:.3f}" for value in weights.mean(0)[0].tolist())]


@pytest.mark.parametrize("kind", [lambda: SingleHeadAttention(6, 2), lambda: MultiHeadSelfAttention(6, 2)])
def test_compiles(kind):
    layer = kind()
    x = torch.randn(B, L, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for found, want in zip(compiled(x, BLOCKED), layer(x, BLOCKED), strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("words, vectors, kind, message", [
    (["the", "dragon", "was", "elf"], VECTORS, KeyError, "got none for 'dragon', 'elf'"),
    ("the animal", VECTORS, TypeError, "words must be a sequence of words, got the string 'the animal'"),
    ([], VECTORS, ValueError, "words must hold at least one word, got none"),
    (None, VECTORS, TypeError, "words must be a sequence of strings, got None"),
    ([3], VECTORS, TypeError, r"words must be a sequence of strings, got \[3\]"),
    (["a"], None, TypeError, "word_vectors must map words to vectors, as a dict does, got NoneType"),
    (["a"], torch.ones(2, 3), TypeError, "word_vectors must map words to vectors, .* got Tensor"),
    (["a"], {"a": "x"}, TypeError, r"word_vectors\['a'\] must be a tensor or numbers .*, got 'x'"),
    (["a", "b"], {"a": [1.0, 2.0], "b": [1.0]}, ValueError, r"here 2, got shape \[1\] for 'b'"),
])  # fmt: skip
def test_sentence_errors(words, vectors, kind, message):
    with pytest.raises(kind, match=message):
        SentenceEncoder().encode(words, vectors)


def test_a_sentence_encoder_needs_a_layer_that_tells_its_weights():
    for attention, got in (("dot", "str"), (SingleHeadAttention, "type")):
        with pytest.raises(TypeError, match=f"attention must be a layer or None, got {got}"):
            SentenceEncoder(attention)
    encoder = SentenceEncoder(MultiheadAttention(2, 1, batch_first=True))
    assert encoder(torch.ones(1, 3, 2)).shape == (1, 2)
    with pytest.raises(TypeError, match=r"attention must have attention_weights, .* got MultiheadAttention"):
        encoder.encode(["a"], {"a": [1.0, 2.0]})


def test_a_mask_reaches_the_encoder_s_layer():
    x, past = torch.randn(2, L, WIDTH), masks.causal()
    for layer, mask in ((SingleHeadAttention(WIDTH, 4), FUTURE), (Attention(), past)):
        encoder = SentenceEncoder(layer)
        got = encoder(x, [L, 3], mask)
        assert not encoder.attention_weights.triu(1).any()
        want = layer(x, mask=mask)
        want = want[0] if isinstance(want, tuple) else want
        torch.testing.assert_close(got[0], want[0].mean(0))
        torch.testing.assert_close(got[1], want[1, :3].mean(0))


def test_sentences_of_the_wrong_shape_are_refused():
    encoder = SentenceEncoder()
    with pytest.raises(ValueError, match="x must be"):
        encoder(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"valid_lens must be \[1\]"):
        encoder(torch.ones(1, 3, 4), [[1, 2, 3]])
    assert torch.equal(encoder(torch.ones(1, 0, 4)), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="valid_lens must be from 0 to the number of keys, 3, got 7"):
        encoder(torch.ones(1, 3, 4), [7])

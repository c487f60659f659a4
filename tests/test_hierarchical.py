"""Pooling by a learned query, at two levels, on ragged documents."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from fastattn.nn import AttentionPooling, HierarchicalAttention, pad_documents

WIDTH = 6
LENGTHS = [[3, 1, 5], [2], [4, 4]]  # words of each sentence of each document


def documents() -> list[list[Tensor]]:
    torch.manual_seed(0)
    return [[torch.randn(n, WIDTH).double() for n in sentences] for sentences in LENGTHS]


def build() -> HierarchicalAttention:
    torch.manual_seed(1)
    return HierarchicalAttention(WIDTH, hidden_size=4, attention_size=3).double()


@torch.no_grad()
def pooled(pool: AttentionPooling, x: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's equations 5 to 7 on one sequence [L, d]."""
    u = torch.stack([torch.tanh(pool.project.weight @ row + pool.project.bias) for row in x])
    exp = torch.stack([torch.exp(row @ pool.query) for row in u])
    weights = exp / exp.sum()
    return (weights[:, None] * x).sum(0), weights


@torch.no_grad()
def one_by_one(layer: HierarchicalAttention, document: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
    """A document by the definition, without padding."""
    vectors, word_weights = [], []
    for sentence in document:
        states = layer.word_encoder(sentence[None])[0][0]
        vector, weights = pooled(layer.word_pooling, states)
        vectors.append(vector)
        word_weights.append(weights)
    states = layer.sentence_encoder(torch.stack(vectors)[None])[0][0]
    vector, sentence_weights = pooled(layer.sentence_pooling, states)
    return vector, word_weights, sentence_weights


def test_ragged_documents_are_each_as_if_alone():
    layer, texts = build(), documents()
    x, lens = pad_documents(texts)
    assert lens.tolist() == [[3, 1, 5], [2, 0, 0], [4, 4, 0]] and x.shape == (3, 3, 5, WIDTH)
    out = layer(x, lens)
    words, sentences = layer.attention_weights
    for b, text in enumerate(texts):
        vector, word_weights, sentence_weights = one_by_one(layer, text)
        torch.testing.assert_close(out[b], vector, rtol=0, atol=1e-13)
        torch.testing.assert_close(sentences[b, : len(text)], sentence_weights, rtol=0, atol=1e-13)
        assert not sentences[b, len(text) :].any()
        for s, weights in enumerate(word_weights):
            torch.testing.assert_close(words[b, s, : len(weights)], weights, rtol=0, atol=1e-13)
            assert not words[b, s, len(weights) :].any()
    noise = torch.where(x == 0, 1e3, x)
    assert torch.equal(layer(noise, lens), out), "what stands in the padding does not matter"


def test_gradients():
    layer = build()
    x, lens = pad_documents(documents()[:2])
    inputs = (x.requires_grad_(), *layer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, lens), inputs, fast_mode=True)


def test_lens_of_documents_and_masks():
    layer = build()
    x = torch.randn(2, 3, 4, WIDTH).double()
    whole = layer(x)
    torch.testing.assert_close(layer(x, torch.tensor([3, 3])), whole)
    torch.testing.assert_close(layer(x, torch.tensor([2, 3]))[0], layer(x[:1, :2])[0])
    torch.testing.assert_close(layer(x, None, torch.ones(2, 3, 4, dtype=torch.bool)), whole)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[0, 1, 2] = mask[1, 0] = False
    layer(x, None, mask)
    words, sentences = layer.attention_weights
    assert torch.equal(words == 0, ~mask)
    assert sentences[1, 0] == 0 and (sentences[0] > 0).all()
    nothing = layer(x, torch.tensor([[0, 0, 0], [1, 0, 2]]))
    assert not nothing[0].any() and nothing[1].any()
    assert not layer(x, torch.zeros(2, 3, dtype=torch.int64)).any()


@pytest.mark.parametrize(
    "options", [{}, {"valid_lens": [2, 0, 5]}, {"mask": torch.arange(15).view(3, 5) % 2 == 0}]
)
def test_pooling_is_the_formula(options):
    pool = AttentionPooling(WIDTH).double()
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    assert pool.attention_weights is None
    out = pool(x, **options)
    seen = options.get("mask", torch.arange(5) < torch.tensor(options.get("valid_lens", [5] * 3))[:, None])
    for b in range(3):
        if not seen[b].any():
            assert not out[b].any() and not pool.attention_weights[b].any()
            continue
        vector, weights = pooled(pool, x[b, seen[b]])
        torch.testing.assert_close(out[b], vector, rtol=0, atol=1e-14)
        torch.testing.assert_close(pool.attention_weights[b, seen[b]], weights, rtol=0, atol=1e-14)


def test_it_learns_which_vector_tells():
    """The class is the sign of one feature of the one vector that another feature marks."""
    torch.manual_seed(0)
    pool, head = AttentionPooling(WIDTH), nn.Linear(WIDTH, 1)
    x = torch.randn(300, 12, WIDTH)
    rows, at = torch.arange(300), torch.randint(12, (300,))
    x[..., 0] = 0
    x[rows, at, 0] = 3
    label = (x[rows, at, 1] > 0).float()
    optimizer = torch.optim.Adam([*pool.parameters(), *head.parameters()], lr=0.05)
    for _ in range(100):
        loss = nn.functional.binary_cross_entropy_with_logits(head(pool(x))[:, 0], label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ((head(pool(x))[:, 0] > 0) == label.bool()).float().mean() > 0.95
    assert (pool.attention_weights.argmax(1) == at).float().mean() > 0.95


def test_weights_are_those_of_the_call_though_the_query_learns():
    pool, x = AttentionPooling(8), torch.randn(2, 5, 8)
    out = pool(x)
    weights = pool.attention_weights
    out.square().sum().backward()
    torch.optim.SGD(pool.parameters(), lr=10.0).step()
    assert torch.equal(pool.attention_weights, weights)


def test_copies_and_repr():
    layer = build()
    x, lens = pad_documents(documents())
    out = layer(x, lens)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.attention_weights is None
        assert torch.equal(twin(x, lens), out)
    indices, lens = pad_documents([[torch.tensor([1, 2]), torch.tensor([3])]])
    assert indices.tolist() == [[[1, 2], [3, 0]]] and lens.tolist() == [[2, 1]]


BAD = {
    "rank": (lambda layer, x: layer(x[0]), ValueError, r"x must be \[B, S, W, 6\], got shape \[3, 4, 6\]"),
    "width": (lambda layer, x: layer(x[..., :5]), ValueError, r"x must be \[B, S, W, 6\], got shape"),
    "lens": (lambda layer, x: layer(x, torch.ones(1, 2).int()), ValueError, r"\[2, 3\], got \[1, 2\]"),
    "long": (
        lambda layer, x: layer(x, torch.tensor([4, 1])),
        ValueError,
        "from 0 to the number of sentences, 3, got 4",
    ),
    "float": (lambda layer, x: layer(x, torch.ones(2)), TypeError, "must be integers, got float32"),
    "mask": (
        lambda layer, x: layer(x, None, x[0, 0] > 0),
        ValueError,
        r"mask must be \[2, 3, 4\], got shape \[4, 6\]",
    ),
    "none": (lambda *_: pad_documents([[]]), ValueError, "documents must hold at least one sentence"),
    "tensor": (lambda *_: pad_documents(torch.ones(2, 3, 4)), TypeError, "sequence of documents, got Tensor"),
    "text": (
        lambda *_: pad_documents([["a b"]]),
        TypeError,
        r"documents\[0\]\[0\] must be a torch.Tensor, got str",
    ),
    "flat": (
        lambda *_: pad_documents([torch.ones(2, 3)]),
        TypeError,
        r"documents\[0\] must be a sequence of sent",
    ),
    "word": (
        lambda *_: pad_documents([[torch.tensor(1)]]),
        ValueError,
        r"documents\[0\]\[0\] must be \[words",
    ),
    "mixed": (
        lambda *_: pad_documents([[torch.ones(1, 3), torch.ones(1, 4)]]),
        ValueError,
        r"got \[3\] and \[4\]",
    ),
    "pool mask": (
        lambda *_: AttentionPooling(2)(torch.ones(1, 3, 2), mask=[[True] * 3]),
        TypeError,
        "got list",
    ),
    "pool ints": (
        lambda *_: AttentionPooling(2)(torch.ones(1, 3, 2), mask=torch.ones(1, 3)),
        TypeError,
        "be bool",
    ),
    "pool width": (
        lambda *_: AttentionPooling(2)(torch.ones(1, 3, 4)),
        ValueError,
        r"x must be \[B, L, 2\], got",
    ),
    "pool lens": (
        lambda *_: AttentionPooling(2)(torch.ones(1, 3, 2), "a"),
        TypeError,
        "valid_lens must be a tensor",
    ),
    "size": (lambda *_: AttentionPooling(0), ValueError, "input_size must be >= 1, got 0"),
    "pool": (lambda *_: AttentionPooling(2)(torch.zeros(1, 3)), ValueError, r"x must be \[B, L, 2\], got"),
}


@pytest.mark.parametrize("call, kind, message", BAD.values(), ids=BAD)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call(build(), torch.zeros(2, 3, 4, WIDTH).double())

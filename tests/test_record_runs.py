"""Which calls of a record make up a run: steps of one decoding, layers under one path."""

from __future__ import annotations

import pytest
import torch
from record_support import small_transformer
from torch import nn

import fastattn
from fastattn.inspect import AttentionSummary, Record, RecordedCall, record
from fastattn.masks import causal
from fastattn.models import greedy


@pytest.fixture
def transformer():
    return small_transformer()


def calls(*positions: tuple[int, ...]) -> Record:
    """Of one path: (first query, queries, keys) and the sequence, if there are several."""
    found = []
    for first, queries, keys, *sequence in positions:
        rows = torch.zeros(1, 1, queries)
        summary = AttentionSummary(rows, rows, rows.long(), torch.zeros(1, 1, keys), rows, rows)
        found.append(RecordedCall("layer", summary, None, first, *sequence))
    return Record(found)


def places(record: Record) -> list[list[int]]:
    return [[record.calls.index(call) for call in run] for run in record.runs("layer")]


PREFILL, STEP, NEXT = (0, 4, 4), (4, 1, 5), (5, 1, 6)


@pytest.mark.parametrize(
    ("positions", "runs"),
    [
        ([PREFILL, STEP, NEXT], [[0, 1, 2]]),
        ([PREFILL, STEP, PREFILL, STEP], [[0, 1], [2, 3]]),  # two decodings
        ([PREFILL, PREFILL, STEP, NEXT], [[0], [1, 2, 3]]),  # a pass ahead of a decoding
        ([PREFILL, PREFILL, STEP, STEP, NEXT, NEXT], [[0, 2, 4], [1, 3, 5]]),  # two layers
        ([PREFILL, STEP, NEXT, NEXT, (6, 1, 7)], [[0, 1, 2], [3, 4]]),  # a step taken back
        ([PREFILL, STEP, STEP], [[0, 1], [2]]),
        ([STEP, (7, 1, 8)], [[0], [1]]),
        ([(0, 2, 2), (2, 2, 4), (4, 2, 6)], [[0, 1, 2]]),  # a prefill in chunks
        ([(*PREFILL, 0), (0, 3, 3, 1), (*STEP, 0), (3, 1, 4, 1)], [[0, 2], [1, 3]]),  # entries of a cache
        ([(0, 0, 0), (0, 0, 0)], [[0], [1]]),
    ],
)
def test_runs(positions, runs):
    assert places(calls(*positions)) == runs


class Decoder(nn.Module):
    """Layers that join their keys themselves, by plain calls of `attention`."""

    def __init__(self, layers: int):
        super().__init__()
        torch.manual_seed(0)
        self.projections = nn.ModuleList(nn.Linear(8, 24) for _ in range(layers))

    def forward(self, x, keys):
        for n, layer in enumerate(self.projections):
            q, k, v = layer(x).unflatten(-1, (2, 12)).transpose(1, 2).chunk(3, -1)
            keys[n] = (
                [torch.cat(pair, 2) for pair in zip(keys[n], (k, v), strict=True)] if n in keys else [k, v]
            )
            x = x + fastattn.attention(q, *keys[n], mask=causal()).transpose(1, 2).flatten(2)
        return x


@pytest.mark.parametrize("layers", [1, 3])
@torch.no_grad()
def test_decoding_without_a_model(layers):
    """Each layer's steps are the matrix that one pass has, and rows have the texts of their tokens."""
    model, x, keys = Decoder(layers), torch.randn(1, 6, 8), {}
    with record(model) as whole:
        model(x, {})
    with record(tokens=list("abcdef")) as steps:
        for part in x.split([3, 1, 1, 1], 1):
            model(part, keys)
    assert [len(run) for run in steps.runs("")] == [4] * layers
    for n in range(layers):
        torch.testing.assert_close(steps.weights("", run=n), whole.weights("", run=n))
        assert steps.texts("", run=n) == (list("abcdef"), list("abcdef"))
    assert steps.calls[layers].first_query == 3


class Shared(nn.Module):
    """One attention module that stands in two layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attn = fastattn.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, caches):
        for cache in caches:
            x = x + self.attn(x, mask=causal(), need_weights=False, cache=cache)[0]
        return x


@torch.no_grad()
def test_a_module_in_two_layers():
    model, x = Shared(), torch.randn(1, 5, 8)
    with record(model) as whole:
        model(x, [None, None])
    with record(model) as steps:
        caches = [fastattn.nn.KVCache(), fastattn.nn.KVCache()]
        for part in x.split([2, 1, 2], 1):
            model(part, caches)
    for run in range(2):
        torch.testing.assert_close(steps.weights("attn", run=run), whole.weights("attn", run=run))


def test_decoding_steps_join_into_one_matrix(transformer):
    """What greedy looked at token by token is what one pass over its tokens looks at."""
    src = torch.randint(20, (1, 7))
    with record(transformer) as rec:
        found = greedy(transformer, src, bos_index=1, eos_index=2, max_len=6)
    read = torch.cat([torch.tensor([[1]]), found.tokens], 1)[:, :-1]
    with torch.no_grad(), record(transformer) as whole:
        transformer(src, read)
    for path in whole.paths:
        assert len(rec.runs(path)) == 1
        torch.testing.assert_close(rec.weights(path), whole.weights(path))
        torch.testing.assert_close(rec.received(path), whole.received(path))
        torch.testing.assert_close(rec.entropy(path), whole.entropy(path))
    steps = rec["decoder.layers.1.cross_attn"]
    assert [call.first_query for call in steps] == list(range(read.shape[1]))
    with record(transformer) as twice:
        for _ in range(2):
            greedy(transformer, src, bos_index=1, eos_index=2, max_len=6)
    assert len(twice.runs("decoder.layers.1.cross_attn")) == 2


def test_a_shrinking_batch_is_not_put_together(transformer):
    with record(transformer) as rec:
        transformer.eval()
        memory, cache = transformer.encode(torch.randint(20, (2, 4))), transformer.new_cache()
        with torch.no_grad():
            transformer.decode(torch.tensor([[1], [1]]), memory, cache=cache)
            cache.reorder(torch.tensor([1]))
            transformer.decode(torch.tensor([[4]]), cache=cache)
    with pytest.raises(ValueError, match=r"must have one batch size to be put together, got \[1, 2\]"):
        rec.weights("decoder.layers.0.self_attn")

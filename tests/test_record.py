"""inspect.record: what is kept of a model's calls, for how long, in how much memory, and what is refused."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from record_support import (
    HEADS,
    LENGTH,
    TRIANGLE,
    Block,
    hooks_of,
    inputs,
    small_transformer,
    softmax_weights,
)
from torch import nn

import fastattn
from fastattn.inspect import record
from fastattn.masks import causal


@pytest.fixture
def x():
    return inputs()


@pytest.fixture
def transformer():
    return small_transformer()


def test_layers_chosen_by_name(transformer):
    src, tgt = torch.randint(20, (1, 7)), torch.randint(20, (1, 5))
    with torch.no_grad(), record(transformer, layers=["*.cross_attn", "encoder.layers.1"]) as rec:
        transformer(src, tgt)
    assert rec.paths == [
        "encoder.layers.1.self_attn",
        "decoder.layers.0.cross_attn",
        "decoder.layers.1.cross_attn",
    ]


def test_long_calls_have_summaries_only(x):
    model = Block(fastattn.attention)
    with record(model, weights_up_to=LENGTH) as short, record(model, weights_up_to=LENGTH - 1) as long:
        model(x)
    assert short.calls[0].weights is not None and long.calls[0].weights is None
    torch.testing.assert_close(long.received("", batch=1), short.weights("", batch=1).sum(1))
    with pytest.raises(ValueError, match="weights of '' are not in the record, since its calls are longer"):
        long.weights("")
    with pytest.raises(RuntimeError, match="needs q and k"):
        long.calls[0].summary.weights()


def test_memory_is_bounded_and_what_is_missing_is_told(x):
    model = Block(fastattn.attention)
    with record(model) as rec:
        model(x)
    one = rec.nbytes
    with pytest.warns(UserWarning) as caught:
        with record(model, max_bytes=3 * one - 1) as rec:
            for _ in range(5):
                model(x)
    assert rec.nbytes < 3 * one
    assert [call.weights is None for call in rec] == [False, False, True]
    assert rec.missed == {"for which max_bytes left no room": 2}
    assert [str(each.message) for each in caught] == [
        "record lacks 2 attention calls, for which max_bytes left no room",
        "record has only summaries of 1 calls, for which max_bytes left no room for their weights",
    ]
    assert "not recorded: 2 calls, for which max_bytes left no room" in str(rec)


def test_no_call_at_all_is_told(x):
    stock = nn.MultiheadAttention(16, HEADS, batch_first=True)
    with pytest.warns(
        UserWarning, match=r"record found no attention call: .*replace_modules and override_sdpa"
    ):
        with record(stock):
            stock(x, x, x)


def test_graphs_are_kept_on_request(x):
    model = Block(lambda q, k, v: fastattn.attention(q, k, v, mask=causal()))
    with record(model, keep_graph=True) as rec:
        model(x)
    q, k, _ = model.heads(x)
    weights = softmax_weights(q, k, TRIANGLE)
    logs = weights.masked_fill(~TRIANGLE, 1).log()
    for ours, theirs in (
        (rec.entropy("").sum(), -(weights * logs).sum(3).mean((0, 2)).sum()),
        (rec.weights("")[0, 3, 1], weights[0, 0, 3, 1]),
    ):
        got = torch.autograd.grad(ours, model.qkv.weight, retain_graph=True)[0]
        want = torch.autograd.grad(theirs, model.qkv.weight, retain_graph=True)[0]
        assert want.any()
        torch.testing.assert_close(got, want)


def test_checkpointed_layers_keep_no_graph(x):
    model = Block(fastattn.attention)
    outer = nn.Module()
    outer.inner = model
    outer.forward = lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    with pytest.raises(NotImplementedError, match="keep_graph must be False where layers are checkpointed"):
        with record(outer, keep_graph=True):
            outer(x)
    with torch.no_grad(), record(outer, keep_graph=True) as rec:
        outer(x)
    assert len(rec) == 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t), record(model, keep_graph=True):
        model(x)


def test_the_model_is_left_as_it_was(x, transformer):
    before = hooks_of(transformer)
    with pytest.raises(RuntimeError, match="stop"):
        with record(transformer):
            raise RuntimeError("stop")
    assert hooks_of(transformer) == before
    model = Block(fastattn.attention)
    with record(model) as rec:
        model(x)
    model(x)
    assert len(rec) == 1


def test_threads_record_for_themselves(x):
    model, started, recs = Block(fastattn.attention), threading.Barrier(2), {}

    def work(n):
        with record(model) as rec:
            started.wait()
            for _ in range(20):
                model(x[:, : n + 3])
            started.wait()
        recs[n] = rec

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(2):
        assert [call.shape for call in recs[n]] == [(2, HEADS, n + 3, n + 3)] * 20
    assert hooks_of(model) == [(0, 0), (0, 0)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"tokens": "some text"},
            TypeError,
            "tokens must be a list of strings, got str: split it into tokens",
        ),
        (
            {"tokens": [1, 2]},
            TypeError,
            "tokens must be strings, or a list of them for each batch entry, got 1",
        ),
        ({"target_tokens": ["a"]}, TypeError, "target_tokens must come with tokens"),
        ({"layers": "nowhere"}, ValueError, "layers must name modules of the model, got 'nowhere'"),
        ({"layers": "layers.0.self_atn"}, ValueError, r"\(did you mean 'layers.0.self_attn'"),
        ({"weights_up_to": -1}, ValueError, "weights_up_to must be >= 0, got -1"),
        ({"max_bytes": 1.5}, TypeError, "max_bytes must be an int, got float"),
        ({"top_k": -1}, ValueError, "top_k must be >= 0, got -1"),
        ({"pool": (1, 2, 3)}, ValueError, "pool must be"),
        ({"keep_graph": 1}, TypeError, "keep_graph must be a bool, got int"),
    ],
)
def test_bad_arguments(arguments, error, message):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4), 1, enable_nested_tensor=False)
    with pytest.raises(error, match=message):
        with record(model, **arguments):
            pass
    assert hooks_of(model) == [(0, 0)] * len(hooks_of(model))


def test_a_path_that_is_not_there(x):
    model = Block(fastattn.attention)
    with record(model) as rec:
        model(x)
    with pytest.raises(KeyError, match="no call of 'attn' was recorded, only of ''"):
        rec["attn"]
    with pytest.raises(IndexError, match="run must be less than the 1 runs of '', got 1"):
        rec.weights("", run=1)
    with pytest.raises(IndexError, match="batch must be from 0 to 1, got 2"):
        rec.weights("", batch=2)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        with record([model]):
            pass


def test_no_warnings_where_all_is_well(x):
    model = Block(fastattn.attention)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with record(model) as rec:
            model(x)
    assert repr(replace(rec.calls[0], weights=None)).endswith("summary only)")


def test_calls_without_numbers_take_memory_too():
    """A record that is left on while small calls go by does not grow without end."""
    empty, tiny = torch.zeros(1, 2, 0, 8), torch.zeros(1, 1, 1, 4)
    for q in (empty, tiny):
        with pytest.warns(UserWarning, match="max_bytes left no room"):
            with record(max_bytes=50_000) as rec:
                for _ in range(50):
                    fastattn.attention(q, q, q)
        assert 0 < len(rec) < 20 and rec.nbytes <= 50_000


MEMORY = """
    import torch, fastattn
    from fastattn.inspect import record

    def resident():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024

    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 40, 8)
    with record() as rec:  # what is loaded and allocated once
        fastattn.attention(q, k, k)
    before = resident()
    with record(max_bytes=32 * 2**20) as rec:
        while not rec.missed:
            fastattn.attention(q, k, k)
    print(resident() - before, rec.nbytes / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.slow
def test_a_full_record_takes_the_memory_that_it_says():
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(MEMORY)]
    done = subprocess.run(command, timeout=300, capture_output=True, text=True, check=True)
    grown, counted = map(float, done.stdout.split())
    assert 31 < counted <= 32
    assert grown < 1.25 * counted

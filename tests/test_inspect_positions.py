"""Records and knockouts of decoding: with transformers' caches, and with keys that a model joins itself."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import fastattn
from fastattn.inspect import knockout, record
from fastattn.masks import causal

EDGES = [(6, 2), (3, 1)]


def llama(**options):
    transformers = pytest.importorskip("transformers")
    import fastattn.integrations.transformers as integration

    integration.register()
    kind = "Mistral" if "sliding_window" in options else "Llama"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.set_attn_implementation("fastattn")
    return model


def generated(model, **options):
    ids = torch.arange(3, 8)[None]
    return model.generate(
        ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=49, **options
    )


@pytest.mark.parametrize("kind", ["dynamic", "fast", "static"])
@torch.no_grad()
def test_generate_equals_one_pass(kind):
    model = llama()
    options = {"cache_implementation": "static"} if kind == "static" else {}
    if kind == "fast":
        from fastattn.integrations.transformers import FastCache

        options = {"past_key_values": FastCache(config=model.config)}
    with knockout(model, edges=EDGES), record(model) as rec:
        ids = generated(model, **options)
    with knockout(model, edges=EDGES), record(model) as whole:
        model(ids[:, :-1])
    for path in whole.paths:
        (run,) = rec.runs(path)
        assert [call.first_query for call in run] == [0, 5, 6, 7, 8]
        weights, expected = rec.weights(path), whole.weights(path)
        torch.testing.assert_close(weights[..., :9], expected, atol=1e-5, rtol=1e-4)
        assert weights[:, 6, 2].abs().max() == 0 and weights[:, 3, 1].abs().max() == 0
        assert weights[:, 6, 3].min() > 0


@torch.no_grad()
def test_a_cache_that_the_model_makes_within():
    """No cache is given for the first pass: of that each layer sees what those before it added."""
    model, ids = llama(), torch.arange(3, 8)[None]
    with record(model) as rec:
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :2], past_key_values=cache)
    assert [[call.first_query for call in rec[path]] for path in rec.paths] == [[0, 5]] * 2


@torch.no_grad()
def test_sliding_caches_count_keys_they_forgot():
    model = llama(sliding_window=4)
    with knockout(model, edges=[(8, 6)]), record(model) as rec:
        generated(model)
    for path in rec.paths:
        last = rec[path][-1]
        seen = last.weights[0, :, 0] > 0  # of query 8: keys 5 to 8
        assert last.first_query == 8 and seen[:, -4:].tolist() == [[True, False, True, True]] * 4


@torch.no_grad()
def test_encoder_decoder_cache():
    transformers = pytest.importorskip("transformers")
    import fastattn.integrations.transformers as integration

    integration.register()
    config = transformers.BartConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(config).eval()
    model.set_attn_implementation("fastattn")
    source, edges = torch.arange(3, 10)[None], {"*.encoder_attn": [(2, 5)], "*decoder*.self_attn": [(3, 1)]}
    with knockout(model, edges=edges), record(model) as rec:
        ids = model.generate(source, max_new_tokens=5, min_new_tokens=5, num_beams=1, do_sample=False)
    with knockout(model, edges=edges), record(model) as whole:
        model(source, decoder_input_ids=ids[:, :-1])
    for path in whole.paths:
        torch.testing.assert_close(rec.weights(path), whole.weights(path), atol=1e-5, rtol=1e-4)
        if "encoder_attn" in path:
            assert rec.weights(path)[:, 2, 5].abs().max() == 0


class Growing(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.seen, self.mask = [], mask

    def forward(self, q):
        self.seen.append(q)
        keys = torch.cat(self.seen, 2)
        return fastattn.attention(q, keys, keys, mask=self.mask)


@pytest.mark.parametrize("mask", [None, causal()])
def test_keys_that_a_model_joins(mask):
    torch.manual_seed(0)
    model = Growing(mask)
    with record(model) as rec, knockout(model, edges=[(2, 0), (3, 1)]):
        for length in (1, 1, 1, 2):
            model(torch.randn(1, 2, length, 4))
    assert [call.first_query for call in rec] == [0, 1, 2, 3] and len(rec.runs("")) == 1
    expected = torch.ones(5, 5).tril()
    expected[3, 4] = float(mask is None)
    expected[2, 0] = expected[3, 1] = 0
    assert torch.equal((rec.weights("")[0] > 0).float(), expected)


def test_keys_of_another_sequence_start_at_0():
    class Cross(nn.Module):
        def forward(self, q, k):
            return fastattn.attention(q, k, k)

    model = Cross()
    with record(model) as rec, knockout(model, edges=[(1, 4)]):
        for _ in range(2):
            model(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 6, 4))
    assert [call.first_query for call in rec] == [0, 0]
    assert (rec.weights("")[:, 1, 4] == 0).all() and (rec.weights("")[:, 2, 4] > 0).all()


def test_edges_outside_every_call_are_told():
    layer, x = fastattn.nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(1, 3, 8)
    with pytest.warns(UserWarning, match=r"edges \[\(5, 0\), \(0, 3\)\] of '' removed nothing: every call"):
        with knockout(layer, edges=[(1, 0), (5, 0), (0, 3)]):
            layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with knockout(layer, edges=[(1, 0), (2, 2)]):
            layer(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": {"": []}}, "heads of '' must have at least one number, got none"),
        ({"edges": {"": []}}, "edges of '' must have at least one .query, key. pair, got none"),
        ({"edges": []}, "heads or edges must name something to remove, got neither"),
    ],
)
def test_empty_lists_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        with knockout(fastattn.nn.MultiheadAttention(8, 2), **arguments):
            pass


def test_shared_modules_have_all_their_names():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = fastattn.nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.b(self.a(x)[0])[0]

    model = Shared()
    with record(model, layers="b") as rec, knockout(model, heads={"b": [1]}):
        model(torch.randn(1, 3, 8))
    assert rec.paths == ["a"] and rec.weights("a")[1].abs().max() == 0

"""Texts of tokens in records: whose they are, and when they may come."""

from __future__ import annotations

import pytest
import torch
from record_support import small_transformer

from fastattn.inspect import record
from fastattn.models import greedy


@pytest.fixture
def transformer():
    return small_transformer()


def test_tokens_of_an_encoder_decoder(transformer):
    src, tgt = torch.randint(20, (2, 3)), torch.randint(20, (2, 2))
    with torch.no_grad(), record(transformer, tokens=["a", "b", "c"], target_tokens=["x", "y"]) as rec:
        transformer(src, tgt)
    assert rec.texts("encoder.layers.0.self_attn") == (["a", "b", "c"], ["a", "b", "c"])
    assert rec.texts("decoder.layers.0.self_attn") == (["x", "y"], ["x", "y"])
    assert rec.texts("decoder.layers.1.cross_attn") == (["x", "y"], ["a", "b", "c"])
    rec.attach([["a", "b", "c"], ["d"]], [["x"], ["y", "z"]])
    assert rec.texts("decoder.layers.1.cross_attn", batch=1) == (["y", "z"], ["d", "", ""])
    rec.attach({"*.cross_attn": (["p", "q"], ["r", "s", "t"]), "encoder": ["u"]})
    assert rec.texts("decoder.layers.1.cross_attn") == (["p", "q"], ["r", "s", "t"])
    assert rec.texts("encoder.layers.0.self_attn") == (["0", "1", "2"], ["0", "1", "2"])
    rec.attach(["a"])
    with pytest.raises(ValueError, match="must be at least the 3 queries there are, got 1"):
        rec.texts("encoder.layers.0.self_attn")


def test_tokens_of_decoding_come_later(transformer):
    with record(transformer, layers="decoder") as rec:
        greedy(transformer, torch.randint(3, 20, (1, 3)), bos_index=1, eos_index=2, max_len=4)
    count = len(rec["decoder.layers.0.self_attn"])
    rec.attach(list("abc"), list("wxyz"))
    assert rec.texts("decoder.layers.0.cross_attn") == (list("wxyz")[:count], list("abc"))
    assert rec.texts("decoder.layers.0.self_attn") == (list("wxyz")[:count],) * 2

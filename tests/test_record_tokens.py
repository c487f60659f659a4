"""Texts of tokens in records: whose they are, and when they may come."""

from __future__ import annotations

import pytest
import torch
from record_support import small_transformer

import fastattn
from fastattn.inspect import record
from fastattn.masks import causal
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


CU = torch.tensor([0, 3, 3, 5], dtype=torch.int32)  # three sequences, of which one is empty


def test_one_list_for_packed_sequences():
    q, k = torch.randn(5, 2, 4), torch.randn(5, 2, 4)
    with record(tokens=list("abcde")) as rec:
        fastattn.varlen_attention(q, k, k, CU, CU)
        fastattn.varlen_attention(q, k, k, CU, CU)  # another layer
    runs = rec.runs("")
    assert [run[0].sequence for run in runs] == [0, 1, 2, 0, 1, 2]
    expected = [list("abc"), [], list("de")] * 2
    assert [rec.texts("", run=n) for n in range(6)] == [(texts, texts) for texts in expected]
    rec.attach(list("abc"))  # the same text for all
    assert rec.texts("", run=2) == (list("ab"), list("ab"))
    rec.attach([list("abc"), [], list("de")])
    assert rec.texts("", run=2) == (list("de"), list("de"))
    rec.attach(list("abcdef"))
    with pytest.raises(ValueError, match="of the 3 packed sequences, or one list of all their 5 queries"):
        rec.texts("", run=0)


def test_one_list_for_packed_queries_and_another_for_their_keys():
    cu_k = torch.tensor([0, 1, 3, 7], dtype=torch.int32)
    q, k = torch.randn(5, 2, 4), torch.randn(7, 2, 4)
    with record(tokens={"": (list("abcde"), list("tuvwxyz"))}) as rec:
        fastattn.varlen_attention(q, k, k, CU, cu_k)
    assert [rec.texts("", run=n) for n in (0, 2)] == [(list("abc"), ["t"]), (list("de"), list("wxyz"))]


def test_one_list_for_a_packed_prompt_and_its_decoding():
    cu = torch.tensor([0, 3, 5], dtype=torch.int32)
    lengths = cu.diff()
    cache = torch.randn(2, 2, 8, 4)
    packed = torch.cat([cache[0, :, :3], cache[1, :, :2]], 1).transpose(0, 1)
    with record() as rec:
        fastattn.varlen_attention(packed, packed, packed, cu, cu, mask=causal())
        for step in (1, 2):
            fastattn.decode_attention(torch.randn(2, 2, 1, 4), cache, cache, lengths + step)
    rec.attach(list("abcde") + list("vwxy"))
    assert rec.texts("", run=0) == (list("abcde"),) * 2  # three of the prompt, two steps
    assert rec.texts("", run=1) == (list("vwxy"),) * 2
    assert rec.weights("", run=1).shape == (2, 4, 4)


def test_steps_alone_have_their_tokens():
    cache = torch.randn(2, 2, 8, 4)
    lengths = torch.tensor([4, 6], dtype=torch.int32)
    with record(tokens=list("abcd") + list("uvwxyz")) as rec:
        fastattn.decode_attention(torch.randn(2, 2, 1, 4), cache, cache, lengths)
    assert rec.texts("", run=0) == (["d"], list("abcd"))
    assert rec.texts("", run=1) == (["z"], list("uvwxyz"))

"""inspect.knockout against the same pairs masked by hand, on every route to a kernel."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn.inspect import knockout, record
from fastattn.integrations.torch import override_sdpa, replace_modules
from fastattn.masks import causal
from fastattn.models import Transformer, greedy

HEADS, LENGTH = 4, 9


def by_hand(removed_heads=(), edges=(), seqlen_q=LENGTH, seqlen_k=LENGTH, heads=HEADS):
    """bool [1, H, Lq, Lk], True = kept."""
    keep = torch.ones(1, heads, seqlen_q, seqlen_k, dtype=torch.bool)
    keep[:, list(removed_heads)] = False
    for query, key in edges:
        keep[:, :, query, key] = False
    return keep


class Block(nn.Module):
    """A model whose forward calls a function of the caller's choice on its heads."""

    def __init__(self, attend):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Module()
        self.inner.qkv = nn.Linear(16, 48)
        self.attend = attend

    def forward(self, x):
        q, k, v = self.inner.qkv(x).unflatten(-1, (3, HEADS, 4)).permute(2, 0, 3, 1, 4)
        return self.attend(q, k, v)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, LENGTH, 16)


@pytest.fixture
def layer():
    torch.manual_seed(2)
    return fastattn.nn.MultiheadAttention(16, HEADS, batch_first=True)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mask", [None, causal(), torch.rand(2, 1, LENGTH, LENGTH) > 0.4])
def test_module_equals_dense_mask(layer, x, mask, grad):
    keep = by_hand([1, 3], [(4, 2), (8, 8)])
    if mask is not None:
        visible = mask if isinstance(mask, torch.Tensor) else torch.ones(LENGTH, LENGTH).tril() > 0
        keep = keep & visible
    with torch.set_grad_enabled(grad):
        want, want_weights = layer(x, mask=keep, average_attn_weights=False)
        with knockout(layer, heads={"": [1, 3]}, edges=[(4, 2), (8, 8)]):
            got, weights = layer(x, mask=mask, average_attn_weights=False)
            without, _ = layer(x, mask=mask, need_weights=False)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(without, want)
    torch.testing.assert_close(weights, want_weights)
    assert not weights[:, [1, 3]].any() and not weights[:, :, 4, 2].any()
    if grad:
        ours = torch.autograd.grad(got.square().sum(), layer.in_proj_weight)[0]
        theirs = torch.autograd.grad(want.square().sum(), layer.in_proj_weight)[0]
        torch.testing.assert_close(ours, theirs)


def test_a_removed_head_gives_zero(x):
    for attend in (fastattn.attention, fastattn.scaled_dot_product_attention):
        model = Block(attend)
        before = model(x)
        with knockout(model, heads={"": 2}):
            out = model(x)
        assert not out[:, 2].any()
        kept = [0, 1, 3]
        torch.testing.assert_close(out[:, kept], before[:, kept])
        assert torch.equal(model(x), before)  # afterwards it is as it was


def test_overridden_calls(x):
    model = Block(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    keep = by_hand([0], [(5, 1)]) & (torch.ones(LENGTH, LENGTH).tril() > 0)
    q, k, v = model.inner.qkv(x).unflatten(-1, (3, HEADS, 4)).permute(2, 0, 3, 1, 4)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
    want[:, 0] = 0
    with override_sdpa(), knockout(model, heads={"": [0]}, edges=[(5, 1)]):
        torch.testing.assert_close(model(x), want)
    with knockout(model, heads={"": [0]}, edges=[(5, 1)]), override_sdpa():
        torch.testing.assert_close(model(x), want)


def test_replaced_modules(x):
    torch.manual_seed(3)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, HEADS, 32, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    with torch.no_grad(), replace_modules(model):
        plain = model(x)
        with knockout(model, edges={"layers.0": [(3, 0)]}):
            got = model(x)
        hidden = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
        hidden[3, 0] = True
        first = model.layers[0](x, src_mask=hidden)
        torch.testing.assert_close(got, model.layers[1](first))
        assert not torch.allclose(got, plain)


def test_packed_sequences(x):
    cu = torch.tensor([0, 4, LENGTH], dtype=torch.int32)

    def attend(q, k, v):
        packed = (t[0].transpose(0, 1) for t in (q, k, v))
        return fastattn.varlen_attention(*packed, cu, cu, mask=causal())

    model = Block(attend)
    with knockout(model, heads={"": [1]}, edges=[(2, 1)]):
        got = model(x)
    q, k, v = (t[:1] for t in model.inner.qkv(x).unflatten(-1, (3, HEADS, 4)).permute(2, 0, 3, 1, 4))
    for begin, end in ((0, 4), (4, LENGTH)):
        length = end - begin
        keep = by_hand([1], [(2, 1)], length, length) & (torch.ones(length, length).tril() > 0)
        part = fastattn.attention(*(t[:, :, begin:end] for t in (q, k, v)), mask=keep)
        torch.testing.assert_close(got[begin:end], part[0].transpose(0, 1))


def test_caches_count_from_their_own_end(x):
    lengths = torch.tensor([6, 9])

    def attend(q, k, v):
        return fastattn.decode_attention(q[:, :, -2:], k, v, lengths, mask=causal())

    model = Block(attend)
    with knockout(model, edges=[(5, 3), (8, 8)]):
        got = model(x)
    q, k, v = model.inner.qkv(x).unflatten(-1, (3, HEADS, 4)).permute(2, 0, 3, 1, 4)
    for b, length in enumerate(lengths.tolist()):
        keep = (torch.ones(LENGTH, LENGTH).tril() > 0)[length - 2 : length, :length].clone()
        for query, key in ((5, 3), (8, 8)):
            if length - 2 <= query < length:
                keep[query - length + 2, key] = False
        one = slice(b, b + 1)
        want = fastattn.attention(q[one, :, -2:], k[one, :, :length], v[one, :, :length], mask=keep)
        torch.testing.assert_close(got[one], want)


def small_transformer():
    torch.manual_seed(4)
    return Transformer(20, 20, d_model=16, num_layers=2, num_heads=HEADS, d_ff=32, dropout=0.0).eval()


def test_a_link_is_the_same_in_training_and_in_decoding():
    """Logits token by token with caches are those of one pass over the tokens, in both attentions."""
    model = small_transformer()
    src, tgt = torch.randint(20, (2, 7)), torch.randint(20, (2, 6))
    edges = {"*.self_attn": [(4, 1), (5, 5)], "*.cross_attn": [(3, 2), (0, 6)]}
    with torch.no_grad():
        plain = model(src, tgt)
        with knockout(model, {"decoder.layers.1.cross_attn": [0]}, edges):
            want = model(src, tgt)
            memory, cache = model.encode(src), model.new_cache()
            steps = [model.decode(tgt[:, t : t + 1], memory, cache=cache) for t in range(6)]
            cache = model.new_cache()  # the same in pieces of two, and a second time
            pairs = [model.decode(tgt[:, t : t + 2], memory, cache=cache) for t in range(0, 6, 2)]
    assert not torch.allclose(want, plain)
    torch.testing.assert_close(torch.cat(steps, 1), want)
    torch.testing.assert_close(torch.cat(pairs, 1), want)


def test_generation_runs_under_it():
    model = small_transformer()
    src = torch.randint(20, (2, 7))
    cross = {"*.cross_attn": range(HEADS)}
    with knockout(model, cross):
        found = greedy(model, src, bos_index=1, eos_index=2, max_len=4)
        other = greedy(model, torch.randint(20, (2, 7)), bos_index=1, eos_index=2, max_len=4)
    assert torch.equal(found.tokens, other.tokens)  # without cross-attention the source does not matter


def test_blocks_nest_and_end_in_any_order(x):
    model = Block(fastattn.attention)
    before = model(x)
    outer, inner = knockout(model, {"": [0]}), knockout(model, {"": [1]})
    with outer:
        with inner:
            out = model(x)
            assert not out[:, :2].any() and out[:, 2:].any()
        assert model(x)[:, 1].any()
    one, two = knockout(model, {"": [0]}), knockout(model, {"": [1]})
    one.__enter__()
    two.__enter__()
    model(x)
    one.__exit__(None, None, None)
    out = model(x)
    assert out[:, 0].any() and not out[:, 1].any()
    two.__exit__(None, None, None)
    assert torch.equal(model(x), before)


def hooks_of(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def test_the_model_is_left_as_it_was(x, layer):
    before = hooks_of(layer)
    with pytest.raises(RuntimeError, match="stop"):
        with knockout(layer, {"": [0]}):
            layer(x)
            raise RuntimeError("stop")
    assert hooks_of(layer) == before
    with pytest.raises(ValueError, match="mask must broadcast"):
        with knockout(layer, {"": [0]}):
            layer(x, mask=torch.ones(3, 3, dtype=torch.bool))
    assert hooks_of(layer) == before


def test_an_error_inside_the_model_loses_no_place(x):
    """A module that raises is left, so that later calls are still told apart."""
    model = small_transformer()
    src, tgt = torch.randint(20, (1, 5)), torch.randint(20, (1, 4))
    with torch.no_grad(), knockout(model, {"decoder.layers.0.self_attn": [0, 1, 2, 3]}):
        want = model(src, tgt)
        with pytest.raises(ValueError):
            model.decoder.layers[0].self_attn(torch.zeros(1, 2, 3))
        torch.testing.assert_close(model(src, tgt), want)


def test_other_threads_are_not_touched(x):
    model = Block(fastattn.attention)
    before, found = model(x), []
    with knockout(model, {"": [0]}):
        thread = threading.Thread(target=lambda: found.append(model(x)))
        thread.start()
        thread.join()
        assert not model(x)[:, 0].any()
    assert torch.equal(found[0], before)


def test_calls_outside_the_model_are_not_touched(x):
    model = Block(fastattn.attention)
    q = torch.randn(1, HEADS, 5, 4)
    want = fastattn.attention(q, q, q)
    with knockout(model, {"": [0]}):
        model(x)
        assert torch.equal(fastattn.attention(q, q, q), want)


@pytest.mark.parametrize(
    "block", [lambda model: knockout(model, {"": [0]}), record], ids=["knockout", "record"]
)
def test_blocks_within_a_compiled_function_say_that_they_cannot_be(x, block):
    model = Block(fastattn.attention)

    @torch.compile(backend="eager")
    def within(x):
        with block(model):
            return model(x)

    with pytest.raises(RuntimeError, match="must be entered outside of what"):
        within(x)
    compiled = torch.compile(model, backend="eager")
    before = compiled(x)
    with block(model), record(model) as rec:  # and later blocks are as ever
        compiled(x)
    assert len(rec) == 1
    assert torch.equal(compiled(x), before)


def test_compiled_models_run_uncompiled_within(x):
    model = Block(fastattn.attention)
    compiled = torch.compile(model, backend="eager")
    before = compiled(x)
    with knockout(model, {"": [0]}):
        assert not compiled(x)[:, 0].any()
        with knockout(compiled, {"": [1]}):
            assert not compiled(x)[:, :2].any()
    assert torch.equal(compiled(x), before)
    assert compiled(x)[:, 0].any()


def test_gradients_stop_at_removed_heads(x):
    model = Block(fastattn.attention)
    with knockout(model, {"": [0]}):
        out = model(x)
    gradient = torch.autograd.grad(out.sum(), model.inner.qkv.weight)[0].view(3, HEADS, 4, 16)
    assert not gradient[:, 0].any() and gradient[2, 1:].any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "heads or edges must name something to remove, got neither"),
        ({"heads": [0]}, TypeError, "heads must map module names to head numbers, got list"),
        (
            {"heads": {"decoder.layer.0": [0]}},
            ValueError,
            r"got 'decoder.layer.0' \(did you mean 'decoder.layers",
        ),
        ({"heads": {0: [0]}}, TypeError, "heads must name modules by strings, got 0"),
        ({"heads": {"": [-1]}}, ValueError, "heads of '' must be >= 0, got -1"),
        ({"heads": {"": [0.5]}}, TypeError, "heads of '' must be an int, got float"),
        ({"edges": [3]}, ValueError, r"edges must be \(query, key\) pairs, got 3"),
        ({"edges": 3}, TypeError, r"edges must be \(query, key\) pairs, or such pairs by module, got 3"),
        ({"edges": [(1, -2)]}, ValueError, "edges' key must be >= 0, got -2"),
        ({"edges": {"nowhere": [(1, 2)]}}, ValueError, "edges must name modules of the model, got 'nowhere'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        with knockout(small_transformer(), **arguments):
            pass


def test_a_head_that_is_not_there(x, layer):
    with knockout(layer, {"": [4]}):
        with pytest.raises(ValueError, match="heads of '' must be from 0 to 3, got 4"):
            layer(x)


def test_no_model():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        with knockout(lambda: None, {"": [0]}):
            pass


def test_learned_keys_cannot_lose_heads():
    layer = fastattn.nn.MultiheadAttention(16, HEADS, add_bias_kv=True)
    with pytest.raises(NotImplementedError, match="heads must be of modules without add_bias_kv"):
        with knockout(layer, {"": [0]}):
            pass
    x = torch.randn(5, 1, 16)
    with knockout(layer, edges=[(2, 1)]):
        _, weights = layer(x, x, x)
    assert weights[0, 2, 1] == 0 and weights[0, 2, 5] > 0


def test_what_removed_nothing_is_told(x):
    stock = nn.MultiheadAttention(16, HEADS, batch_first=True)
    with pytest.warns(UserWarning, match="knockout's heads of '' removed nothing: no attention call"):
        with knockout(stock, {"": [0]}):
            stock(x, x, x)
    model = small_transformer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with knockout(model, edges={"encoder": [(0, 0)]}):
            model.encode(torch.randint(20, (1, 5)))


@pytest.mark.parametrize("gradient", ["straight_through", "reinforce"])
@pytest.mark.parametrize("grad", [False, True])
def test_hard_attention(x, grad, gradient):
    """The key that a query would choose is out of its sight."""
    options = {"gradient": gradient, "return_index": True}
    model = Block(lambda q, k, v: fastattn.hard_attention(q, k, v, **options))
    edges = [(query, key) for query in range(LENGTH) for key in range(0, LENGTH, 2)]
    with torch.set_grad_enabled(grad), knockout(model, {"": [1]}, edges):
        *results, index = model(x)
    model.attend = lambda q, k, v: fastattn.hard_attention(q, k, v, mask=by_hand([1], edges), **options)
    *want, want_index = model(x)
    assert torch.equal(index, want_index) and (index[:, 1] == -1).all()
    for a, b in zip(results, want, strict=True):
        torch.testing.assert_close(a, b)

"""inspect.record on every route to a kernel: what it takes down of each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from record_support import HEADS, LENGTH, TRIANGLE, Block, inputs, small_transformer, softmax_weights
from torch import nn

import fastattn
from fastattn.inspect import knockout, record, summarize
from fastattn.integrations.torch import override_sdpa, replace_modules
from fastattn.masks import causal, documents, padding


@pytest.fixture
def x():
    return inputs()


@pytest.fixture
def transformer():
    return small_transformer()


def assert_summary_of(weights, call):
    """The call's numbers are those of these weights [B, H, Lq, Lk]."""
    torch.testing.assert_close(call.summary.received, weights.sum(2))
    torch.testing.assert_close(call.summary.entropy, -torch.special.xlogy(weights, weights).sum(3))
    torch.testing.assert_close(call.summary.max_weight, weights.amax(3))
    torch.testing.assert_close(call.summary.topk_weights, weights.sort(-1, descending=True)[0][..., :8])
    if call.weights is not None:
        torch.testing.assert_close(call.weights, weights)


ROUTES = {
    "attention": (fastattn.attention, None),
    "lse": (lambda q, k, v: fastattn.attention(q, k, v, return_lse=True)[0], None),
    "causal": (lambda q, k, v: fastattn.attention(q, k, v, mask=causal()), TRIANGLE),
    "reference": (lambda q, k, v: fastattn.attention(q, k, v, backend="reference"), None),
    "torch": (lambda q, k, v: fastattn.attention(q, k, v, mask=causal(), backend="torch"), TRIANGLE),
    "sdpa": (lambda q, k, v: fastattn.scaled_dot_product_attention(q, k, v, is_causal=True), TRIANGLE),
    "overridden": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), TRIANGLE),
    "operator": (torch.ops.aten.scaled_dot_product_attention, None),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("grad", [False, True])
def test_functions_in_a_forward(route, grad, x):
    attend, visible = ROUTES[route]
    model = Block(attend)
    with torch.set_grad_enabled(grad), override_sdpa():
        want = model(x)
        with record(model) as rec:
            got = model(x)
        q, k, _ = model.heads(x)
    assert torch.equal(got, want)
    (call,) = rec
    assert call.path == "" and call.shape == (2, HEADS, LENGTH, LENGTH)
    assert not call.weights.requires_grad and not call.summary.entropy.requires_grad
    assert_summary_of(softmax_weights(q, k, visible).detach(), call)


def test_module_weights_are_those_it_returns(x):
    layer = fastattn.nn.MultiheadAttention(16, HEADS, batch_first=True)
    for need_weights in (False, True):
        with record(layer) as rec:
            y, _ = layer(x, mask=causal(), need_weights=need_weights)
        want, weights = layer(x, mask=causal(), average_attn_weights=False)
        torch.testing.assert_close(y, want)
        (call,) = rec
        assert_summary_of(weights.detach(), call)


def test_transformer_by_layer(transformer):
    src, tgt = torch.randint(20, (2, 7)), torch.randint(20, (2, 5))
    with torch.no_grad(), record(transformer) as rec:
        got = transformer(src, tgt)
        want, cross = transformer(src, tgt, need_weights=True)
    torch.testing.assert_close(got, want)
    parts = ("encoder.layers.{}.self_attn",), ("decoder.layers.{}.self_attn", "decoder.layers.{}.cross_attn")
    assert rec.paths == [name.format(n) for names in parts for n in range(2) for name in names]
    for n in range(2):
        path = f"decoder.layers.{n}.cross_attn"
        assert [len(run) for run in rec.runs(path)] == [1, 1]  # two passes
        for run in range(2):
            for batch in range(2):
                torch.testing.assert_close(rec.weights(path, run=run, batch=batch), cross[n][batch])
        torch.testing.assert_close(rec.received(path, batch=1), cross[n][1].sum(1))
        torch.testing.assert_close(
            rec.entropy(path), -torch.special.xlogy(cross[n], cross[n]).sum(3).mean((0, 2))
        )


def test_replaced_modules_in_eval(x):
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, HEADS, 32, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    with torch.no_grad(), replace_modules(model):
        want = model(x)
        with record(model) as rec:
            got = model(x)
        _, weights = model.layers[0].self_attn(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(got, want)
    assert rec.paths == ["layers.0.self_attn", "layers.1.self_attn"]
    assert_summary_of(weights, rec["layers.0.self_attn"][0])


def test_torchs_own_layers_under_override(x):
    model = nn.TransformerEncoderLayer(16, HEADS, 32, batch_first=True).eval()
    with torch.no_grad(), override_sdpa(), record(model) as rec:
        model(x)
    _, weights = model.self_attn(x, x, x, average_attn_weights=False)
    assert_summary_of(weights.detach(), rec["self_attn"][0])


def test_packed_sequences_one_by_one(x):
    cu = torch.tensor([0, 4, 4, LENGTH], dtype=torch.int32)
    ids = torch.tensor([[0, 0, 1, 1, 1]])

    def attend(q, k, v):
        packed = (t[0].transpose(0, 1) for t in (q, k, v))
        return fastattn.varlen_attention(*packed, cu, cu, mask=causal() & documents(ids))

    model = Block(attend)
    with record(model) as rec:
        model(x)
    q, k, _ = (t[:1] for t in model.heads(x))
    assert [(call.sequence, call.shape) for call in rec] == [
        (0, (1, HEADS, 4, 4)),
        (1, (1, HEADS, 0, 0)),
        (2, (1, HEADS, 5, 5)),
    ]
    for call, (begin, end) in zip((rec.calls[0], rec.calls[2]), ((0, 4), (4, LENGTH)), strict=True):
        length = end - begin
        visible = (ids[:, :length, None] == ids[:, None, :length]) & TRIANGLE[:length, :length]
        weights = softmax_weights(q[:, :, begin:end], k[:, :, begin:end], visible).detach()
        torch.testing.assert_close(call.weights, weights)
        torch.testing.assert_close(
            call.summary.lse, summarize(q[:, :, begin:end], k[:, :, begin:end], mask=visible).lse
        )
    assert [len(run) for run in rec.runs("")] == [1, 1, 1]


@pytest.mark.parametrize("paged", [False, True])
def test_caches_entry_by_entry(x, paged):
    lengths = torch.tensor([6, 9])
    slopes = torch.rand(2, HEADS)

    def attend(q, k, v):
        options = {"mask": causal() & padding(lengths - 1), "bias": fastattn.biases.ALiBi(slopes)}
        table = None
        if paged:
            table = torch.tensor([[2, 0, 99], [1, 3, 5]], dtype=torch.int32)
            pages = torch.randn(2, 6, HEADS, 3, 4)
            for which, tensor in enumerate((k, v)):
                for b in range(2):
                    for n in range(-(-int(lengths[b]) // 3)):
                        pages[which, table[b, n]] = tensor[b, :, 3 * n : 3 * n + 3]
            k, v = pages
        return fastattn.decode_attention(q[:, :, -2:], k, v, lengths, block_table=table, **options)

    model = Block(attend)
    with torch.no_grad(), record(model) as rec:
        out = model(x)
        v = model.heads(x)[2]
    for call, b in zip(rec, range(2), strict=True):
        length = int(lengths[b])
        assert (call.sequence, call.first_query) == (b, length - 2)
        torch.testing.assert_close(call.weights[0] @ v[b, :, :length], out[b])
    assert rec.runs("")[0][0] is rec.calls[0]


def test_calls_outside_the_model_do_not_count(x):
    model, q = Block(fastattn.attention), torch.randn(1, 2, 5, 8)
    with record(model) as rec, record() as everything:
        fastattn.attention(q, q, q)
        model(x)
    assert [call.shape[0] for call in rec] == [2]
    assert [(call.path, call.shape[0]) for call in everything] == [("", 1), ("", 2)]


def test_knockouts_show(x):
    model = Block(fastattn.attention)
    for outer, inner in ((record(model), knockout(model, {"": [1]}, [(3, 2)])),):
        with outer as rec, inner:
            model(x)
    assert not rec.calls[0].weights[:, 1].any() and not rec.calls[0].weights[:, :, 3, 2].any()
    assert rec.entropy("")[1] == 0


def test_checkpointed_layers_count_once(x):
    model = Block(fastattn.attention)
    outer = nn.Module()
    outer.inner = model
    outer.forward = lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    with record(outer) as rec:
        outer(x).sum().backward()
    assert [call.path for call in rec] == ["inner"]


def test_transforms_are_told_apart(x):
    model = Block(fastattn.attention)
    with pytest.warns(UserWarning, match="record lacks 1 attention calls, made where a transform or a trace"):
        with record(model) as rec:
            got = torch.func.vmap(model)(x[:, None])
    torch.testing.assert_close(got[:, 0], model(x))
    assert len(rec) == 0


def test_forward_mode_is_left_alone(x):
    model = Block(lambda q, k, v: fastattn.attention(q, k, v, backend="reference"))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.warns(UserWarning, match="where a transform or a trace"),
    ):
        with record(model) as rec:
            out = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None
    assert len(rec) == 0


def test_autocast(x):
    model = Block(fastattn.attention)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x)
        with record(model) as rec:
            assert torch.equal(model(x), want)
        q, k, _ = model.heads(x)
    assert rec.calls[0].weights.dtype == torch.float32
    torch.testing.assert_close(rec.calls[0].weights, softmax_weights(q.float(), k.float()).detach())


def test_dropout_is_not_in_the_weights(x):
    layer = fastattn.nn.MultiheadAttention(16, HEADS, dropout=0.5, batch_first=True)
    torch.manual_seed(3)
    want, _ = layer(x, need_weights=False)
    torch.manual_seed(3)
    with record(layer) as rec:
        got, _ = layer(x, need_weights=False)
    torch.testing.assert_close(got, want)  # the same elements are dropped
    torch.testing.assert_close(rec.calls[0].weights.sum(3), torch.ones(2, HEADS, LENGTH))


def test_scores_that_are_no_products():
    """Said to be missing, rather than summarised as if they were products."""
    layer = fastattn.nn.AdditiveAttention(4, 4, 8, dropout=0.0)
    q, k, v = (torch.randn(2, 5, 4) for _ in range(3))
    with pytest.warns(UserWarning, match="record lacks 1 attention calls, whose scores are no products"):
        with record(layer) as rec:
            layer(q, k, v)
    assert not rec.calls


@pytest.mark.parametrize("gradient", ["straight_through", "reinforce"])
@pytest.mark.parametrize("grad", [False, True])
def test_hard_attention_is_recorded_by_its_probabilities(x, grad, gradient):
    """Once, with gradients or without, which have a soft call within."""
    found = []
    model = Block(lambda q, k, v: found.append(fastattn.hard_attention(q, k, v, gradient=gradient)))
    with torch.set_grad_enabled(grad), record(model) as rec:
        model(x)
    q, k, v = model.heads(x)
    (call,) = rec
    assert_summary_of(softmax_weights(q, k).detach(), call)
    want = fastattn.hard_attention(q, k, v, gradient=gradient)
    torch.testing.assert_close(found[0], want)

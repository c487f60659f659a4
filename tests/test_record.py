"""inspect.record: what it takes down on every route to a kernel, and what it leaves as it was."""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn.inspect import knockout, record, summarize
from fastattn.integrations.torch import override_sdpa, replace_modules
from fastattn.masks import causal, documents, padding
from fastattn.models import Transformer, greedy

HEADS, LENGTH = 4, 9


class Block(nn.Module):
    """A model whose forward calls a function of the caller's choice on its heads."""

    def __init__(self, attend):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(16, 48)
        self.attend = attend

    def heads(self, x):
        return self.qkv(x).unflatten(-1, (3, HEADS, 4)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        return self.attend(*self.heads(x))


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, LENGTH, 16)


@pytest.fixture
def transformer():
    torch.manual_seed(2)
    return Transformer(20, 20, d_model=16, num_layers=2, num_heads=HEADS, d_ff=32, dropout=0.0).eval()


def softmax_weights(q, k, visible=None):
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1)


def assert_summary_of(weights, call):
    """The call's numbers are those of these weights [B, H, Lq, Lk]."""
    torch.testing.assert_close(call.summary.received, weights.sum(2))
    torch.testing.assert_close(call.summary.entropy, -torch.special.xlogy(weights, weights).sum(3))
    torch.testing.assert_close(call.summary.max_weight, weights.amax(3))
    torch.testing.assert_close(call.summary.topk_weights, weights.sort(-1, descending=True)[0][..., :8])
    if call.weights is not None:
        torch.testing.assert_close(call.weights, weights)


TRIANGLE = torch.ones(LENGTH, LENGTH).tril() > 0
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


def test_knockouts_show(x):
    model = Block(fastattn.attention)
    for outer, inner in ((record(model), knockout(model, {"": [1]}, [(3, 2)])),):
        with outer as rec, inner:
            model(x)
    assert not rec.calls[0].weights[:, 1].any() and not rec.calls[0].weights[:, :, 3, 2].any()
    assert rec.entropy("")[1] == 0


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


def test_checkpointed_layers_count_once(x):
    model = Block(fastattn.attention)
    outer = nn.Module()
    outer.inner = model
    outer.forward = lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    with record(outer) as rec:
        outer(x).sum().backward()
    assert [call.path for call in rec] == ["inner"]


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


def hooks_of(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


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


# --- tokens -------------------------------------------------------------------------------------------------


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


def test_no_warnings_where_all_is_well(x):
    model = Block(fastattn.attention)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with record(model) as rec:
            model(x)
    assert repr(replace(rec.calls[0], weights=None)).endswith("summary only)")


def test_scores_that_are_no_products():
    """Said to be missing, rather than summarised as if they were products."""
    layer = fastattn.nn.AdditiveAttention(4, 4, 8, dropout=0.0)
    q, k, v = (torch.randn(2, 5, 4) for _ in range(3))
    with pytest.warns(UserWarning, match="record lacks 1 attention calls, whose scores are no products"):
        with record(layer) as rec:
            layer(q, k, v)
    assert not rec.calls

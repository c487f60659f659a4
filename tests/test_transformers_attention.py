"""The attention function: every argument that transformers' layers pass."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

from transformers.models.gemma2 import modeling_gemma2  # noqa: E402
from transformers.models.gpt_oss import modeling_gpt_oss  # noqa: E402

import fastattn  # noqa: E402
from fastattn import attention  # noqa: E402
from fastattn.integrations.transformers import arguments, register  # noqa: E402
from fastattn.integrations.transformers import position_bias as tables  # noqa: E402
from fastattn.integrations.transformers.attention import fastattn_attention  # noqa: E402
from fastattn.integrations.transformers.mask_function import fastattn_mask  # noqa: E402
from fastattn.masks import causal, window  # noqa: E402

register()

EXACT = {"rtol": 1e-10, "atol": 1e-10}
LAYER = SimpleNamespace(is_causal=False, num_key_value_groups=2, training=False)
DECODER = SimpleNamespace(is_causal=True)


def qkv(seqlen_q=9, seqlen_k=9, batch=2):
    torch.manual_seed(0)
    shapes = (batch, 4, seqlen_q, 8), (batch, 2, seqlen_k, 8), (batch, 2, seqlen_k, 6)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def heads_last(out):
    return out.transpose(1, 2)


def test_layout():
    out, weights = fastattn_attention(LAYER, *qkv(5, 9), None, scaling=0.3)
    assert out.shape == (2, 5, 4, 6) and out.is_contiguous() and weights is None
    torch.testing.assert_close(out, heads_last(attention(*qkv(5, 9), scale=0.3)), **EXACT)


def test_softcap_as_gemma():
    q, k, _ = qkv()
    v = torch.randn_like(k)
    want, _ = modeling_gemma2.eager_attention_forward(LAYER, q, k, v, None, scaling=2.0, softcap=0.4)
    got, _ = fastattn_attention(LAYER, q, k, v, None, scaling=2.0, softcap=0.4)
    # Gemma's softmax rounds to float32.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_sinks_of_heads_as_gpt_oss():
    q, k, _ = qkv()
    v, sinks = torch.randn_like(k), torch.tensor([2.0, -1.0, 0.5, 3.0], dtype=torch.float64)
    layer = SimpleNamespace(**vars(LAYER), sinks=sinks)
    want, _ = modeling_gpt_oss.eager_attention_forward(layer, q, k, v, None, scaling=1.0)
    got, _ = fastattn_attention(layer, q, k, v, None, scaling=1.0, s_aux=sinks)
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("output_attentions", [False, True])
def test_sinks_of_rows(output_attentions):
    q, k, v = qkv()
    sinks = torch.randn(2, 4, 9, 1, dtype=torch.float64).requires_grad_()
    scores = torch.cat([q @ k.repeat_interleave(2, 1).mT, sinks], -1)
    weights = scores.softmax(-1)[..., :-1]
    want = weights @ v.repeat_interleave(2, 1)
    options = {"scaling": 1.0, "sinks": sinks, "output_attentions": output_attentions}
    got, got_weights = fastattn_attention(LAYER, q, k, v, None, **options)
    torch.testing.assert_close(got, heads_last(want), **EXACT)
    if output_attentions:
        torch.testing.assert_close(got_weights, weights, **EXACT)
    (want_grad,) = torch.autograd.grad(want.sin().sum(), sinks, retain_graph=True)
    (got_grad,) = torch.autograd.grad(got.sin().sum(), sinks)
    torch.testing.assert_close(got_grad, want_grad, **EXACT)


def test_what_no_mask_means():
    """With a mask, is_causal and sliding_window say nothing; without one, as transformers' sdpa has it."""
    q, k, v = qkv(5, 9)
    for given, mask in (
        ({"module": DECODER}, causal(align="top_left")),
        ({"module": DECODER, "is_causal": False}, None),
        ({"module": LAYER, "is_causal": True}, causal(align="top_left")),
        ({"module": DECODER, "sliding_window": 2}, window(1, 0, align="top_left")),
        ({"module": LAYER, "sliding_window": 2}, window(1, 1, align="top_left")),
    ):
        got, _ = fastattn_attention(query=q, key=k, value=v, attention_mask=None, **given)
        torch.testing.assert_close(got, heads_last(attention(q, k, v, mask=mask)), **EXACT)
    everything = fastattn_mask(2, 5, 9, mask_function=lambda b, h, q, k: q >= 0)
    got, _ = fastattn_attention(DECODER, q, k, v, everything, sliding_window=2)
    torch.testing.assert_close(got, heads_last(attention(q, k, v)), **EXACT)
    one = q[:, :, -1:]
    got, _ = fastattn_attention(DECODER, one, k, v, None)
    torch.testing.assert_close(got, heads_last(attention(one, k, v)), **EXACT)
    got, _ = fastattn_attention(DECODER, one, k, v, None, sliding_window=3)
    torch.testing.assert_close(got, heads_last(attention(one, k[:, :, -3:], v[:, :, -3:])), **EXACT)


def test_tensor_masks():
    """Of models that make their own: bool, True = attend, or additive."""
    q, k, v = qkv()
    visible = torch.rand(2, 1, 9, 9) > 0.3
    want = heads_last(attention(q, k, v, mask=visible))
    for mask in (visible, torch.zeros(2, 1, 9, 9).masked_fill(~visible, -math.inf).half()):
        torch.testing.assert_close(fastattn_attention(DECODER, q, k, v, mask)[0], want, **EXACT)


def test_position_bias_and_additive_mask_add_up():
    q, k, v = qkv()
    bias, mask = torch.randn(1, 4, 9, 9, dtype=torch.float64), torch.randn(2, 1, 9, 9, dtype=torch.float64)
    got, _ = fastattn_attention(LAYER, q, k, v, mask, position_bias=bias)
    torch.testing.assert_close(got, heads_last(attention(q, k, v, bias=bias + mask)), **EXACT)


@pytest.mark.parametrize(
    "extra", [{}, {"output_attentions": True}, {"position_bias": torch.ones(1, 4, 12, 12)}]
)
def test_packed_sequences(extra):
    q, k, v = qkv(12, 12, batch=1)
    starts = torch.tensor([0, 5, 8, 12])
    packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 5, "max_length_k": 5}
    parts = list(zip(*(tensor.split([5, 3, 4], 2) for tensor in (q, k, v)), strict=True))
    for module, mask in ((DECODER, causal()), (LAYER, None)):
        want = torch.cat([attention(*part, mask=mask) for part in parts], 2)
        got, _ = fastattn_attention(module, q, k, v, None, **packed, **extra)
        torch.testing.assert_close(got, heads_last(want), **EXACT)
    sliding = fastattn_mask(1, 12, 12, mask_function=lambda b, h, q, k: (k <= q) & (k > q - 3))
    want = torch.cat([attention(*part, mask=window(2, 0)) for part in parts], 2)
    got, _ = fastattn_attention(DECODER, q, k, v, sliding, **packed, **extra)
    torch.testing.assert_close(got, heads_last(want), **EXACT)
    # Chunks are documents too, but other ones than the sequences.
    chunks = fastattn_mask(1, 12, 12, mask_function=lambda b, h, q, k: (k <= q) & (k // 6 == q // 6))
    seen = torch.ones(12, 12).tril().bool()
    at = torch.arange(12)
    for ids in (at // 6, torch.bucketize(at, starts[1:], right=True)):
        seen &= ids[:, None] == ids
    got, _ = fastattn_attention(DECODER, q, k, v, chunks, **packed, **extra)
    torch.testing.assert_close(got, heads_last(attention(q, k, v, mask=seen)), **EXACT)


def test_chosen_keys():
    q, k, v = qkv()
    indices = torch.randint(0, 9, (2, 9, 4), dtype=torch.int32)
    visible = torch.zeros(2, 9, 9, dtype=torch.bool).scatter(-1, indices.long(), True)[:, None]
    for mask, of_mask in ((None, True), (fastattn_mask(2, 9, 9), torch.ones(9, 9).tril().bool())):
        got, _ = fastattn_attention(LAYER, q, k, v, mask, indices=indices)
        torch.testing.assert_close(got, heads_last(attention(q, k, v, mask=visible & of_mask)), **EXACT)


@pytest.mark.parametrize("name", ["block_indices", "cache"])
def test_what_would_change_the_result_is_refused(name):
    with pytest.raises(NotImplementedError, match=f"{name} must be None: .* is not supported, use attn_impl"):
        fastattn_attention(LAYER, *qkv(), None, **{name: object()})


def test_learned_queries_of_batch_one():
    q, k, v = qkv()
    got, _ = fastattn_attention(LAYER, q[:1], k, v, None)
    torch.testing.assert_close(got, heads_last(attention(q[:1].expand(2, -1, -1, -1), k, v)), **EXACT)


def test_weights_are_those_that_were_used():
    """After dropout, so that weights times values are the output."""
    q, k, v = qkv()
    out, weights = fastattn_attention(DECODER, q, k, v, None, dropout=0.4, output_attentions=True)
    assert (weights == 0).double().mean() > 0.5
    torch.testing.assert_close(out, heads_last(weights @ v.repeat_interleave(2, 1)), **EXACT)


@pytest.fixture
def limited():
    register(max_attentions=8)
    yield
    register(max_attentions=2048)


def test_long_attentions_are_refused(limited):
    register()  # as patch and torch.load do; the limit stays
    with pytest.raises(
        ValueError, match=r"at most 8 x 8 pairs, got 9 x 9.*fastattn\.inspect\.record.*max_att"
    ):
        fastattn_attention(LAYER, *qkv(), None, output_attentions=True)
    _, weights = fastattn_attention(LAYER, *qkv(1, 64), None, output_attentions=True)
    assert weights.shape == (2, 4, 1, 64)  # one row is as long as the text
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertModel(config)
    model.set_attn_implementation("fastattn")
    ids = torch.ones(1, 9, dtype=torch.int64)
    assert model(ids).last_hidden_state.shape == (1, 9, 8)
    with pytest.raises(ValueError, match="at most 8 x 8"):
        model(ids, output_attentions=True)
    with fastattn.inspect.record(model) as rec:  # what the error says
        model(ids)
    assert [call.path for call in rec.calls] == ["encoder.layer.0.attention.self"]
    assert model(ids[:, :8], output_attentions=True).attentions[0].shape == (1, 2, 8, 8)


@pytest.mark.parametrize("limit, error", [(0, ValueError), (2.5, TypeError), ("long", TypeError)])
def test_register_checks_its_limit(limit, error):
    with pytest.raises(error, match="max_attentions must be"):
        register(max_attentions=limit)


T5_LAYERS = {
    "t5.T5Attention": "T5Config",
    "mt5.MT5Attention": "MT5Config",
    "umt5.UMT5Attention": "UMT5Config",
    "longt5.LongT5Attention": "LongT5Config",
    "pop2piano.Pop2PianoAttention": "Pop2PianoConfig",
    "switch_transformers.SwitchTransformersAttention": "SwitchTransformersConfig",
    "pix2struct.Pix2StructTextAttention": "Pix2StructTextConfig",
}


def test_every_table_has_a_test():
    assert set(T5_LAYERS) == set(tables._LAYERS)
    assert {*T5_LAYERS, "udop.UdopAttention"} == {*tables._ZEROS, *tables._OWN_ZEROS}


def t5_layer(path, is_decoder, has_bias):
    model, name = path.split(".")
    layers = __import__(f"transformers.models.{model}.modeling_{model}", fromlist=[name])
    config = getattr(transformers, T5_LAYERS.get(path, "UdopConfig"))(
        hidden_size=24, num_heads=3, d_kv=8, relative_attention_max_distance=50
    )
    config.is_decoder, config._attn_implementation = is_decoder, "fastattn"
    return getattr(layers, name)(config, has_relative_attention_bias=has_bias, layer_idx=0)


@pytest.mark.parametrize("path", tables._ZEROS)
def test_no_zeros_in_cross_attention(path):
    """T5's layers make a tensor of zeros [1, H, Lq, Lk] there, and hand it on to the next."""
    layer = t5_layer(path, True, False).eval()
    torch.manual_seed(0)
    width = next(layer.children()).in_features
    texts, sources = torch.randn(2, 5, width), torch.randn(2, 7, width)
    out, bias, *_ = layer(texts, key_value_states=sources)
    assert bias.numel() == 1 and not bias.any()
    again, *_ = layer(texts, key_value_states=sources, position_bias=bias)
    assert torch.equal(again, out)
    layer.config._attn_implementation = "eager"
    want, zeros, *_ = layer(texts, key_value_states=sources)
    assert zeros.shape == (1, 3, 5, 7)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    # In self-attention what is not given is still the layer's own.
    assert layer(texts)[1].shape == (1, 3, 5, 5)


@pytest.mark.parametrize("path", tables._OWN_ZEROS)
def test_no_zeros_of_its_own_in_cross_attention(path, monkeypatch):
    """UMT5's layers make the zeros in each call; the layer stays what it was."""
    layer = t5_layer(path, True, False).eval()
    torch.manual_seed(0)
    width = next(layer.children()).in_features
    texts, sources = torch.randn(2, 5, width), torch.randn(2, 7, width)
    layer.config._attn_implementation = "eager"
    want, _ = layer(texts, encoder_hidden_states=sources)
    layer.config._attn_implementation = "fastattn"
    before = dict(vars(layer))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros", None)
        out, _ = layer(texts, encoder_hidden_states=sources)
    assert vars(layer) == before
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    weights = list(layer.parameters())
    assert all(gradient.any() for gradient in torch.autograd.grad(out.square().sum(), weights))


@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("path", T5_LAYERS)
def test_tables_stay_tables(path, is_decoder):
    layer = t5_layer(path, is_decoder, True)
    config = layer.config
    for sizes in ((150, 150, 0), (40, 150, 110), (5, 150, 0)):
        bias = layer.compute_bias(*sizes[:2], past_seen_tokens=sizes[2])
        assert isinstance(bias, tables.BiasTensor) and bias.shape == (1, 3, *sizes[:2])
        assert bias.bias.parameter is layer.relative_attention_bias.weight
        want = layer.compute_bias.__wrapped__(layer, *sizes[:2], past_seen_tokens=sizes[2])
        assert torch.equal(bias + 0, want)
        assert torch.autograd.grad((bias * 2).sum(), layer.relative_attention_bias.weight)[0].any()
    # One row is no longer than a table; other alignments have no name.
    for sizes in ((1, 150, 149), (5, 150, 7)):
        assert type(layer.compute_bias(*sizes[:2], past_seen_tokens=sizes[2])) is torch.Tensor
    config._attn_implementation = "eager"
    assert type(layer.compute_bias(150, 150)) is torch.Tensor


@pytest.mark.parametrize("least", [torch.finfo(torch.float64).min, -math.inf, -3.0])
def test_a_table_and_a_row_of_numbers_for_keys(least):
    """As Switch Transformers hides padding: by a mask where the numbers say no more than one would."""
    layer = t5_layer("t5.T5Attention", False, True).double()
    q, k, v = (torch.randn(2, 3, 40, 8, dtype=torch.float64) for _ in range(3))
    row = torch.zeros(2, 1, 1, 40, dtype=torch.float64)
    row[0, ..., 30:], row[1, ..., ::4] = least, least
    table = layer.compute_bias(40, 40)
    got, _ = fastattn_attention(LAYER, q, k, v, row, position_bias=table)
    want = attention(q, k, v, bias=table.to_dense() + row)
    torch.testing.assert_close(got, heads_last(want), **EXACT)
    mask, bias = arguments.add_position_bias(None, row, table, q.dtype)
    assert (bias is table.bias) == (mask is not None) == (least != -3.0)


def test_a_table_and_a_number_for_all_keys():
    """One text sees every key, the other none, which makes it a row that is empty."""
    layer = t5_layer("t5.T5Attention", False, True).double()
    q, k, v = (torch.randn(2, 3, 40, 8, dtype=torch.float64) for _ in range(3))
    number = torch.tensor([0.0, -math.inf], dtype=torch.float64).view(2, 1, 1, 1)
    table = layer.compute_bias(40, 40)
    got, _ = fastattn_attention(LAYER, q, k, v, number, position_bias=table)
    want = attention(q, k, v, bias=table.to_dense() + number)
    torch.testing.assert_close(got, heads_last(want), **EXACT)


class _Reads(TorchDispatchMode):
    """Counts what reads tensors' values back, for which a GPU is waited for."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


def numbers_for_keys(hidden):
    """[B, 1, 1, Lk]: 0, and the least number where hidden [B, Lk] is True."""
    return torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)[:, None, None]


PADDED = torch.tensor([[0] * 7 + [1] * 3, [1] * 2 + [0] * 8]).bool()


def test_a_row_beside_a_table_is_read_once_for_all_layers():
    """Switch hands such a row to every layer of its encoder; here of texts padded right and left."""
    layers = [t5_layer("t5.T5Attention", False, i == 0).eval() for i in range(4)]
    row, table = numbers_for_keys(PADDED), None
    hidden = torch.randn(2, 10, 24)
    reads = []
    with torch.no_grad():
        for layer in layers:
            with _Reads() as counted:
                hidden, table, *_ = layer(hidden, mask=row, position_bias=table)
            assert isinstance(table, tables.BiasTensor)
            reads.append(counted.number)
    assert reads[0] > 0 and reads[1:] == [0, 0, 0]


@pytest.mark.parametrize("inference", [False, True])
def test_a_row_beside_a_table_may_be_written_into(inference):
    """What was read of it is forgotten when it is another row, or has other numbers."""
    layer = t5_layer("t5.T5Attention", False, True)
    q, k, v = (torch.randn(2, 3, 10, 8) for _ in range(3))
    with torch.inference_mode(inference):
        row, table = numbers_for_keys(PADDED), layer.compute_bias(10, 10)

        def check(row):
            got, _ = fastattn_attention(LAYER, q, k, v, row, position_bias=table)
            want = attention(q, k, v, bias=table.to_dense() + row)
            torch.testing.assert_close(got, heads_last(want), rtol=1e-5, atol=1e-5)

        check(row)
        row.copy_(numbers_for_keys(PADDED.flip(1)))
        check(row)
        check(numbers_for_keys(PADDED.roll(1, 1)))
        row[1] = -2.5  # no mask any more
        check(row)


@pytest.mark.parametrize("without_values", [FakeTensorMode, lambda: torch.device("meta")])
def test_a_row_without_values_is_not_read(without_values):
    """As those are that a tracer pretends."""
    with without_values():
        layer = t5_layer("t5.T5Attention", False, True)
        row = torch.zeros(2, 1, 1, 10)
        mask, bias = arguments.add_position_bias(None, row, layer.compute_bias(10, 10), row.dtype)
    assert mask is None and bias.shape == (2, 3, 10, 10) and bias.device == row.device


def test_a_row_under_vmap_is_not_read():
    layer = t5_layer("t5.T5Attention", False, True)
    table, rows = layer.compute_bias(10, 10), torch.stack([numbers_for_keys(PADDED)] * 3)
    added = torch.vmap(lambda row: arguments.add_position_bias(None, row, table, row.dtype)[1])(rows)
    assert torch.equal(added, table.to_dense() + rows)

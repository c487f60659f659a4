"""models.Transformer and its parts, against PyTorch's attention, PyTorch's Transformer and themselves."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn.masks import causal, documents, padding
from fastattn.models import Decoder, DecoderLayer, Encoder, EncoderLayer, Transformer
from fastattn.models.stock import StockAttention
from fastattn.nn import MultiheadAttention

SMALL = {"d_model": 24, "num_layers": 2, "dropout": 0.0, "num_heads": 4, "d_ff": 40, "max_len": 40}
DOUBLE = {**SMALL, "dtype": torch.float64}
NORMS = pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])


@pytest.fixture(autouse=True)
def one_thread(use_threads):
    """Models so small are slower on more, and much slower where other programs want the cores too."""
    use_threads(1)


def new(attention: str = "fastattn", seed: int = 0, **options) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(20, 23, attention=attention, **{**DOUBLE, "padding_idx": 0, **options})
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases of 0 and gains of 1 would hide mistakes
            nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.3)
    return model


def pair(**options) -> tuple[Transformer, Transformer]:
    return new("fastattn", **options), new("torch", **options)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Sources of 9, 5 and 8 tokens, then padding; targets of 7, 6 and 3."""
    generator = torch.Generator().manual_seed(1)
    src = torch.randint(1, 20, (3, 9), generator=generator)
    tgt = torch.randint(1, 23, (3, 7), generator=generator)
    src[1, 5:] = src[2, 8:] = 0
    tgt[1, 6:] = tgt[2, 3:] = 0
    return src, tgt


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


# Against PyTorch's attention


@NORMS
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_both_kinds_of_attention_give_equal_logits_and_gradients(norm_first, packed, train):
    src, tgt = batch()
    options = {}
    if packed:
        options["src_documents"] = torch.tensor([[0] * 4 + [1] * 5, [0] * 2 + [1] * 3 + [-1] * 4, [5] * 9])
        options["tgt_documents"] = torch.tensor([[0] * 3 + [1] * 4, [0] * 5 + [1] * 1 + [-1], [5] * 7])
    results = []
    for model in pair(norm_first=norm_first):
        model.train(train)
        logits = model(src, tgt, **options)
        loss = F.cross_entropy(logits.flatten(0, 1), tgt.flatten(), ignore_index=0)
        names, parameters = zip(*model.named_parameters(), strict=True)
        results.append((logits, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))))
    (ours, our_gradients), (stock, stock_gradients) = results
    close(ours, stock)
    assert list(our_gradients) == list(stock_gradients)
    for name, gradient in our_gradients.items():
        assert gradient.any() or "bias" in name, name  # softmax cancels the keys' bias
        close(gradient, stock_gradients[name])


def test_without_gradients_both_kinds_agree_too():
    src, tgt = batch()
    ours, stock = (model.eval() for model in pair())
    with torch.no_grad():
        close(ours(src, tgt), stock(src, tgt))


def test_one_seed_gives_both_kinds_the_same_weights_and_state_dicts_load_both_ways():
    ours, stock = pair()
    assert isinstance(ours.encoder.layers[0].self_attn, MultiheadAttention)
    assert type(stock.encoder.layers[0].self_attn) is StockAttention
    for a, b in ((ours, stock), (stock, ours)):
        assert list(a.state_dict()) == list(b.state_dict())
        assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())
        other = new(seed=5, attention="torch" if b is stock else "fastattn")
        assert not torch.equal(other.output.weight, a.output.weight)
        other.load_state_dict(a.state_dict())
        close(other(*batch()), a(*batch()))


def test_a_model_made_on_meta_is_whole_once_its_state_is_loaded():
    """Its positions are in no state dict: nothing but the model can bring them."""
    model = new()
    hollow = Transformer(20, 23, **DOUBLE, padding_idx=0, device="meta").to_empty(device="cpu")
    hollow.load_state_dict(model.state_dict())
    close(hollow(*batch()), model(*batch()))


def test_attention_dropout_is_apart_from_dropout():
    src, tgt = batch()
    for attention in ("fastattn", "torch"):
        still = new(attention, dropout=0.0, attention_dropout=0.3)
        assert not torch.equal(still(src, tgt), still(src, tgt))
        still.eval()
        assert torch.equal(still(src, tgt), still(src, tgt))
        assert new(attention, dropout=0.3).encoder.layers[0].self_attn.dropout == 0.0
    model = new(dropout=0.3)
    assert not torch.equal(model(src, tgt), model(src, tgt))


# Against PyTorch's Transformer


def weights_of_torch(ours: Transformer) -> dict[str, torch.Tensor]:
    """Our layers' state dict by nn.Transformer's names."""
    renamed = {}
    for name, value in ours.state_dict().items():
        if name.startswith(("encoder.", "decoder.")):
            name = name.replace("feed_forward.", "").replace("cross_attn", "multihead_attn")
            renamed[name] = value
    return renamed


@NORMS
def test_equal_to_torch_nn_transformer(norm_first):
    ours = new(norm_first=norm_first)
    factory = {"batch_first": True, "norm_first": norm_first, "dtype": torch.float64}
    sizes = (24, 4, 40, 0.0)
    norms = [nn.LayerNorm(24, dtype=torch.float64) if norm_first else None for _ in range(2)]
    theirs = nn.Transformer(
        24,
        4,
        custom_encoder=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(*sizes, **factory), 2, norms[0], enable_nested_tensor=False
        ),
        custom_decoder=nn.TransformerDecoder(nn.TransformerDecoderLayer(*sizes, **factory), 2, norms[1]),
        **factory,
    )
    theirs.load_state_dict(weights_of_torch(ours))
    src, tgt = batch()
    vectors = ours.positions(ours.src_embedding(src)), ours.positions(ours.tgt_embedding(tgt))
    blocked = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    hidden = theirs(
        *vectors, tgt_mask=blocked, src_key_padding_mask=src == 0, memory_key_padding_mask=src == 0
    )
    close(ours(src, tgt), ours.output(hidden))


# What is visible


@pytest.mark.parametrize("attention", ["fastattn", "torch"])
def test_padding_and_later_tokens_are_not_seen(attention):
    model = new(attention)
    src, tgt = batch()
    logits = model(src, tgt)
    close(logits[1:2, :6], model(src[1:2, :5], tgt[1:2, :6]))
    close(logits[2:3, :3], model(src[2:3, :8], tgt[2:3, :3]))
    lengths = torch.tensor([9, 5, 8])
    close(logits, model(src, tgt, src_lengths=lengths))
    other = src.clone()
    other[1, 5:] = 7
    close(logits, model(other, tgt, src_lengths=lengths))
    assert not torch.allclose(logits[1], model(other, tgt)[1])
    changed = tgt.clone()
    changed[:, 4] = 9
    assert torch.equal(model(src, changed)[:, :4], logits[:, :4])


@pytest.mark.parametrize("attention", ["fastattn", "torch"])
def test_packed_sentences_equal_each_alone(attention):
    model = new(attention, padding_idx=None)
    generator = torch.Generator().manual_seed(2)
    lengths = [(3, 4), (5, 2), (1, 6)]
    sentences = [
        (
            torch.randint(1, 20, (1, source), generator=generator),
            torch.randint(1, 23, (1, target), generator=generator),
        )
        for source, target in lengths
    ]
    src, tgt = (torch.cat([pair[side] for pair in sentences], 1) for side in (0, 1))
    ids = [torch.cat([torch.full((1, n[side]), k) for k, n in enumerate(lengths)], 1) for side in (0, 1)]
    packed = model(src, tgt, src_documents=ids[0], tgt_documents=ids[1])
    close(packed, torch.cat([model(*sentence) for sentence in sentences], 1))
    shifted = [torch.arange(x.shape[1])[None] for x in (src, tgt)]
    elsewhere = model(
        src,
        tgt,
        src_documents=ids[0],
        tgt_documents=ids[1],
        src_positions=shifted[0],
        tgt_positions=shifted[1],
    )
    close(elsewhere[:, :4], packed[:, :4])
    assert not torch.allclose(elsewhere[:, 4:], packed[:, 4:])


@pytest.mark.parametrize("attention", ["fastattn", "torch"])
def test_weights_of_target_to_source(attention):
    model = new(attention)
    src, tgt = batch()
    logits, weights = model(src, tgt, need_weights=True)
    close(logits, model(src, tgt))
    assert [list(w.shape) for w in weights] == [[3, 4, 7, 9]] * 2
    for layer in weights:
        close(layer.sum(-1), torch.ones(3, 4, 7, dtype=torch.float64))
        assert not layer[1, :, :, 5:].any()
    other = new("torch" if attention == "fastattn" else "fastattn")
    for mine, theirs in zip(weights, other(src, tgt, need_weights=True)[1], strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("attention", ["fastattn", "torch"])
def test_encoder_and_decoder_alone_take_any_mask(attention):
    options = {**DOUBLE, "attention": attention}
    del options["max_len"]
    torch.manual_seed(0)
    encoder, decoder = Encoder(**options), Decoder(**options)
    x, y = (torch.randn(2, n, 24, dtype=torch.float64) for n in (6, 5))
    ids = torch.tensor([0, 0, 1, 1, 1, 2])
    for mask in (None, causal(), padding([6, 4]), causal() & documents(ids), torch.eye(6, dtype=torch.bool)):
        out = encoder(x, mask=mask)
        by_hand = x
        for layer in encoder.layers:
            by_hand = layer(by_hand, mask=mask)
        close(out, by_hand)
    close(encoder(x, mask=causal())[:, :2], encoder(x[:, :2], mask=causal()))
    close(encoder(x, mask=documents(ids))[:, 2:5], encoder(x[:, 2:5]))
    close(decoder(y, x)[:, :3], decoder(y[:, :3], x))
    assert not torch.allclose(decoder(y, x, mask=None)[:, :3], decoder(y[:, :3], x))
    close(decoder(y, x, memory_mask=padding([3, 3])), decoder(y, x[:, :3]))


# The cache


@pytest.mark.parametrize("attention", ["fastattn", "torch"])
@NORMS
def test_decoding_with_a_cache_equals_decoding_without(attention, norm_first):
    model = new(attention, norm_first=norm_first)
    src, tgt = batch()
    lengths = model.source_lengths(src)
    assert lengths.tolist() == [9, 5, 8]
    memory = model.encode(src, src_lengths=lengths)
    whole = model.decode(tgt, memory, src_lengths=lengths)
    close(whole, model(src, tgt))
    cache = model.new_cache()
    steps = [model.decode(tgt[:, :3], memory, src_lengths=lengths, cache=cache)]
    assert cache.length == 3
    for i in range(3, 6):
        steps.append(model.decode(tgt[:, i : i + 1], src_lengths=lengths, cache=cache))
    close(torch.cat(steps, 1), whole[:, :6])
    cache.truncate(4)
    close(model.decode(tgt[:, 4:], src_lengths=lengths, cache=cache), whole[:, 4:])
    cache.truncate(4)
    order = torch.tensor([2, 0])
    cache.reorder(order)
    close(model.decode(tgt[order, 4:], src_lengths=lengths[order], cache=cache), whole[order, 4:])
    assert repr(cache) == "DecoderCache(2 layers, length=7)"


def test_a_layer_alone_takes_a_cache():
    from fastattn.models import LayerCache

    torch.manual_seed(0)
    layer = DecoderLayer(16, 2, 32, 0.0, dtype=torch.float64)
    x, memory = (torch.randn(2, n, 16, dtype=torch.float64) for n in (4, 3))
    cache = LayerCache()
    steps = [layer(x[:, i : i + 1], memory if i == 0 else None, cache=cache) for i in range(4)]
    close(torch.cat(steps, 1), layer(x, memory))


# Parameters


@pytest.mark.parametrize("share, matrices", [(False, 3), ("target", 2), (True, 1)])
def test_shared_embeddings_are_one_parameter(share, matrices):
    torch.manual_seed(0)
    model = Transformer(20, 20, share_embeddings=share, **DOUBLE)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        tables = {id(x.weight) for x in (each.src_embedding, each.tgt_embedding, each.output)}
        assert len(tables) == matrices
        each.load_state_dict(model.state_dict())
        src, tgt = (x % 20 for x in batch())
        close(each(src, tgt), model(src, tgt))


def test_gradients_of_shared_embeddings_add():
    torch.manual_seed(0)
    shared = Transformer(20, 20, share_embeddings=True, **DOUBLE)
    apart = Transformer(20, 20, **DOUBLE)
    apart.load_state_dict(shared.state_dict())
    src, tgt = (x % 20 for x in batch())
    for model in (shared, apart):
        model(src, tgt).square().sum().backward()
    parts = [x.weight.grad for x in (apart.src_embedding, apart.tgt_embedding, apart.output)]
    close(shared.output.weight.grad, sum(parts))


def test_grouped_heads_reach_every_attention():
    model = new(num_kv_heads=2)
    found = [m for m in model.modules() if isinstance(m, MultiheadAttention)]
    assert len(found) == 6
    assert {m.in_proj_weight.shape[0] for m in found} == {24 + 2 * 12}
    src, tgt = batch()
    whole = model(src, tgt)
    cache = model.new_cache()
    lengths = model.source_lengths(src)
    memory = model.encode(src, src_lengths=lengths)
    steps = [
        model.decode(tgt[:, i : i + 1], None if i else memory, src_lengths=lengths, cache=cache)
        for i in range(7)
    ]
    close(torch.cat(steps, 1), whole)
    assert cache.layers[0].self_attn.keys.shape == (3, 2, 7, 6)


def test_initial_weights():
    torch.manual_seed(0)
    model = Transformer(100, 100, 64, 1, num_heads=2, d_ff=128)
    for name, parameter in model.named_parameters():
        if "embedding" in name:
            assert abs(parameter.std().item() * 8 - 1) < 0.05
        elif parameter.dim() == 2:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.97 * bound < parameter.abs().max() <= bound
        else:
            assert torch.equal(parameter, torch.full_like(parameter, "norm" in name and "weight" in name))


def test_learns_to_reverse():
    torch.manual_seed(0)
    model = Transformer(
        12, 12, 32, 1, dropout=0.0, num_heads=2, d_ff=64, max_len=12, share_embeddings=True, norm_first=True
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(0)

    def sample(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        src = torch.randint(2, 12, (size, 5), generator=generator)
        return src, torch.cat((torch.ones(size, 1, dtype=torch.int64), src.flip(1)), 1)

    for _ in range(250):
        src, tgt = sample(64)
        loss = F.cross_entropy(model(src, tgt[:, :-1]).flatten(0, 1), tgt[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    src, tgt = sample(100)
    found = fastattn.models.greedy(model, src, bos_index=1, eos_index=0, max_len=5)
    assert (found.tokens == tgt[:, 1:]).float().mean() > 0.95


# The rest of PyTorch


def test_compiled_encoder():
    torch.manual_seed(0)
    encoder = Encoder(16, 1, 0.0, num_heads=2, d_ff=32)
    x = torch.randn(2, 5, 16)
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    for mask in (None, causal(), padding(torch.tensor([5, 3]))):
        torch.testing.assert_close(compiled(x, mask=mask), encoder(x, mask=mask))
    compiled(x).sum().backward()


def test_autocast_and_half_precision():
    src, tgt = batch()
    model = new(dtype=torch.float32)
    want = model(src, tgt)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(model(src, tgt).float(), want, atol=0.3)
    half = copy.deepcopy(model).bfloat16()(src, tgt)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), want, atol=0.3)


def test_nn_and_models_are_imported_when_used():
    code = (
        "import sys, fastattn; assert 'fastattn.models' not in sys.modules; fastattn.models.Transformer; "
        "fastattn.nn.MultiheadAttention\n"
        "try: fastattn.nothing\n"
        "except AttributeError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "module 'fastattn' has no attribute 'nothing'"


# Errors


@pytest.mark.parametrize("options, error, message", [
    ({"attention": "flash"}, ValueError, "attention must be one of fastattn, torch, got 'flash'"),
    ({"d_model": 25}, ValueError, "d_model must be a multiple of num_heads=4, got 25"),
    ({"num_heads": 0}, ValueError, "num_heads must be >= 1, got 0"),
    ({"num_layers": 0}, ValueError, "num_layers must be >= 1, got 0"),
    ({"num_kv_heads": 3}, ValueError, "num_kv_heads must divide num_heads 4, got 3"),
    ({"num_kv_heads": 2, "attention": "torch"}, ValueError, 'must be None with attention="torch", got 2'),
    ({"share_embeddings": True}, ValueError, "got True with src_vocab_size=20 and tgt_vocab_size=23"),
    ({"share_embeddings": "all"}, ValueError, "must be True, False or \"target\", got 'all'"),
    ({"padding_idx": 21}, ValueError, "padding_idx must be from 0 to 19 or None, got 21"),
    ({"d_model": 24.0}, TypeError, "d_model must be an int, got float"),
    ({"norm_first": 1}, TypeError, "norm_first must be a bool, got int"),
    ({"depth": 3}, TypeError, "depth"),
])  # fmt: skip
def test_construction_errors(options, error, message):
    with pytest.raises(error, match=message):
        Transformer(20, 23, **{**SMALL, **options})


@pytest.mark.parametrize("call, message", [
    (lambda m, s, t: m(s + 19, t), "tokens must be from 0 to 19, got"),
    (lambda m, s, t: m(s, t - 5), "tokens must be from 0 to 22, got -5"),
    (lambda m, s, t: m(s.repeat(1, 5), t), "positions must be below max_len=40, got 45 from offset 0"),
    (lambda m, s, t: m(s, t, src_documents=s), "src_documents and tgt_documents must be given together"),
    (lambda m, s, t: m(s, t, tgt_documents=t), "src_documents and tgt_documents must be given together"),
    (lambda m, s, t: m(s, t, src_documents=s, tgt_documents=t, src_lengths=s[:, 0]), "src_lengths must"),
    (lambda m, s, t: m.decode(t), "memory must be the encoder's output until a cache holds it, got None"),
    (lambda m, s, t: m.decode(t, cache=m.new_cache()), "memory must be the encoder's output"),
    (lambda m, s, t: m.decode(t, m.encode(s), cache=m.new_cache(), need_weights=True), "need_weights must"),
    (lambda m, s, t: m.decode(t, m.encode(s), cache=fastattn.models.DecoderCache(3)), "must have 2 layers"),
    (lambda m, s, t: m.decode(t, m.encode(s), cache=m.new_cache(), tgt_documents=t, src_documents=s),
     "tgt_documents must be None where a cache is given"),
])  # fmt: skip
def test_call_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(new(), *batch())


def test_repr_names_what_matters():
    text = repr(EncoderLayer(16, 2, 32, norm_first=True))
    assert "norm_first=True" in text
    assert "num_heads=2" in text

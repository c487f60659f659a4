"""Recurrent encoder-decoders: each kind by its formula, padding, stepwise decoding, what each can see."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from fastattn.models import RecurrentSeq2Seq

KINDS = pytest.mark.parametrize("kind", ["simple", "contextualised", "soft_align"])
DIRECTIONS = pytest.mark.parametrize("bidirectional", [True, False])


def build(kind: str, bidirectional: bool = True) -> RecurrentSeq2Seq:
    torch.manual_seed(0)
    return RecurrentSeq2Seq(9, 7, 5, 4, kind=kind, bidirectional=bidirectional, dtype=torch.float64)


def tokens(batch: int = 3, source: int = 6, target: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randint(9, (batch, source)), torch.randint(7, (batch, target))


def gru(net: torch.nn.GRU, x: Tensor, h: Tensor, suffix: str = "") -> Tensor:
    """One step of a GRU by its equations."""
    w_x, w_h, b_x, b_h = (
        getattr(net, f"{name}_l0{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    (r_x, z_x, n_x), (r_h, z_h, n_h) = (w_x @ x + b_x).chunk(3), (w_h @ h + b_h).chunk(3)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    return (1 - z) * torch.tanh(n_x + r * n_h) + z * h


@torch.no_grad()
def by_hand(model: RecurrentSeq2Seq, src: Tensor, tgt: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits [Lt, V] of one pair and the weights of each step, by the papers' equations."""
    nothing = torch.zeros(model.hidden_size, dtype=torch.float64)
    forward, backward = [], []
    h = nothing
    for token in src:
        h = gru(model.encoder, model.src_embedding.weight[token], h)
        forward.append(h)
    states = forward
    if model.encoder.bidirectional:
        h = nothing
        for token in src.flip(0):
            h = gru(model.encoder, model.src_embedding.weight[token], h, "_reverse")
            backward.insert(0, h)
        states = [torch.cat(pair) for pair in zip(forward, backward, strict=True)]
    context = torch.cat([forward[-1], *backward[:1]])
    s = torch.tanh(model.bridge.weight @ context + model.bridge.bias)
    logits, weights = [], []
    for token in tgt:
        inputs = [model.tgt_embedding.weight[token]]
        if model.kind == "soft_align":
            scores = torch.stack([
                model.w_v.weight[0] @ torch.tanh(model.W_q.weight @ s + model.W_k.weight @ h) for h in states
            ])  # fmt: skip
            weights.append(scores.exp() / scores.exp().sum())
            context = sum(a * h for a, h in zip(weights[-1], states, strict=True))
        if model.kind != "simple":
            inputs.append(context)
        s = gru(model.decoder, torch.cat(inputs), s)
        read = s if model.kind == "simple" else torch.cat([s, context])
        logits.append(model.output.weight @ read + model.output.bias)
    return torch.stack(logits), weights


@KINDS
@DIRECTIONS
def test_the_model_is_its_equations(kind, bidirectional):
    model = build(kind, bidirectional)
    src, tgt = tokens()
    logits = model(src, tgt)
    for b in range(3):
        want, weights = by_hand(model, src[b], tgt[b])
        torch.testing.assert_close(logits[b], want, rtol=0, atol=1e-13)
        if weights:
            torch.testing.assert_close(model.attention_weights[b], torch.stack(weights), rtol=0, atol=1e-13)
    if kind != "soft_align":
        assert model.attention_weights is None


@KINDS
@DIRECTIONS
def test_padding_changes_nothing(kind, bidirectional):
    model = build(kind, bidirectional)
    src, tgt = tokens()
    lengths = torch.tensor([6, 1, 4])
    logits = model(src, tgt, lengths)
    for b, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(logits[b], model(src[b : b + 1, :length], tgt[b : b + 1])[0])
    if kind == "soft_align":
        model(src, tgt, lengths)
        assert not model.attention_weights[1, :, 1:].any()


@KINDS
def test_decoding_by_steps_is_decoding_at_once(kind):
    model = build(kind)
    src, _ = tokens()
    lengths = torch.tensor([6, 3, 4])
    out = model.generate(src, 5, start=2, src_lengths=lengths)
    teacher = torch.cat([torch.full((3, 1), 2), out[:, :-1]], 1)
    assert torch.equal(model(src, teacher, lengths).argmax(-1), out)


@KINDS
def test_no_output_depends_on_later_targets(kind):
    model = build(kind)
    src, tgt = tokens()
    other = tgt.clone()
    other[:, 2] = (tgt[:, 2] + 1) % 7
    a, b = model(src, tgt), model(src, other)
    assert torch.equal(a[:, :2], b[:, :2]) and not torch.equal(a[:, 2], b[:, 2])


@KINDS
def test_what_the_decoder_sees_of_the_source(kind):
    """Simple: its first state alone. Contextualised: the last states too. Soft-align: all states."""
    model = build(kind)
    src, tgt = tokens()
    memory, state = model.encode(src)
    want, _ = model.decode(tgt, memory, state)
    changed = {
        "states": memory._replace(states=memory.states + 1),
        "context": memory._replace(context=memory.context + 1),
        "keys": memory._replace(keys=memory.keys * 3),
    }
    seen = {
        name for name, other in changed.items() if not torch.equal(model.decode(tgt, other, state)[0], want)
    }
    assert seen == {"simple": set(), "contextualised": {"context"}, "soft_align": {"states", "keys"}}[kind]


@KINDS
def test_gradients_reach_everything(kind):
    model = build(kind)
    src, tgt = tokens(9, 6, 7)
    src[:, 0], tgt[:, 0] = torch.arange(9), torch.arange(9) % 7
    model(src, tgt).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(src, tgt), model(src, tgt))


BAD = {
    "kind": (lambda: RecurrentSeq2Seq(3, 3, kind="lstm"), ValueError, "one of simple, context"),
    "size": (lambda: RecurrentSeq2Seq(3, 3, 0), ValueError, "hidden_size must be >= 1, got 0"),
    "src": (lambda: build("simple")(torch.zeros(3), tokens()[1]), ValueError, r"src must be \[B, Ls\]"),
    "empty": (lambda: build("simple")(tokens()[0], tokens()[1][:, :0]), ValueError, r"tgt .* \[3, 0\]"),
    "lens": (lambda: build("simple")(*tokens(), torch.ones(2).int()), ValueError, r"src_lengths must be"),
}  # fmt: skip


@pytest.mark.parametrize("make, kind, message", BAD.values(), ids=BAD)
def test_errors(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_generate_remembers_the_whole_alignment():
    model = RecurrentSeq2Seq(10, 12, 8)
    src, lens = torch.randint(10, (2, 5)), torch.tensor([5, 3])
    tokens = model.generate(src, 4, 0, lens)
    got = model.attention_weights
    model(src, torch.cat([torch.zeros(2, 1, dtype=torch.int64), tokens[:, :-1]], 1), lens)
    torch.testing.assert_close(got, model.attention_weights)


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda m, x: m(x, x, [5, 2]), TypeError, "src_lengths"),
        (
            lambda m, x: m(x, x, torch.tensor([0, 2])),
            ValueError,
            "src_lengths must be from 1 to 5, got 0 to 2",
        ),
        (
            lambda m, x: m(x, x, torch.tensor([9, 2])),
            ValueError,
            "src_lengths must be from 1 to 5, got 2 to 9",
        ),
        (lambda m, x: m(x, x[:1]), ValueError, "tgt must have the source's batch size 2, got 1"),
        (lambda m, x: m(x.float(), x), TypeError, "src must be int64 or int32, got float32"),
        (lambda m, x: m(x + 10, x), ValueError, "src must be from 0 to 9, got 1"),
        (lambda m, x: m(x, x - 10), ValueError, "tgt must be from 0 to 11, got -"),
        (lambda m, x: m(x, x, torch.ones(2)), TypeError, "src_lengths must be integers, got float32"),
        (lambda m, x: m.generate(x, 3, 12), ValueError, "start must be below 12, got 12"),
    ],
)
def test_wrong_tokens_are_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call(RecurrentSeq2Seq(10, 12, 8), torch.randint(10, (2, 5)))

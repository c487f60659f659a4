"""nn.Attention: each score by its formula, the three steps, masks, gradients, and one path for all of it."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastattn import masks
from fastattn.biases import ALiBi
from fastattn.nn import Attention, RelativePositionBias
from fastattn.nn.scores import ProductScore

B, LQ, LK, DQ, DK, DV = 2, 4, 6, 5, 3, 7

SCORES: dict[str, dict[str, Any]] = {
    "dot": {},
    "scaled_dot": {},
    "cosine": {"temperature": 0.3},
    "learned": {"temperature": 0.3, "learn_temperature": True, "dtype": torch.float64},
    "bilinear": {"query_size": DQ, "key_size": DK},
    "additive": {"query_size": DQ, "key_size": DK, "num_hiddens": 9},
    "module": {},
}


class Distance(nn.Module):
    """A score of a user's own: minus the squared distance."""

    def __init__(self) -> None:
        super().__init__()
        self.width = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        return -self.width * (queries.unsqueeze(-2) - keys.unsqueeze(-3)).square().sum(-1)


def build(name: str, **options: Any) -> Attention:
    torch.manual_seed(0)
    if name == "module":
        return Attention(Distance(), **options)
    score = "cosine" if name == "learned" else name
    return Attention(score, **{**SCORES[name], **options}).double()


def inputs(name: str, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    dk = DK if name in ("bilinear", "additive") else DQ
    shapes = (B, LQ, DQ), (B, LK, dk), (B, LK, DV)
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=grad) for shape in shapes)
    return q, k, v


@torch.no_grad()
def by_hand(name: str, layer: Attention, q: Tensor, k: Tensor) -> float:
    """The score of one query and one key, by the formula."""
    score: Any = layer.score
    if name == "dot":
        return float(sum(a * b for a, b in zip(q, k, strict=True)))
    if name == "scaled_dot":
        return float(q @ k) / len(q) ** 0.5
    if name in ("cosine", "learned"):
        return float(q @ k / q.norm() / k.norm()) / 0.3
    if name == "bilinear":
        return float(q @ score.weight @ k)
    if name == "additive":
        return float(score.w_v.weight[0] @ torch.tanh(score.W_q.weight @ q + score.W_k.weight @ k))
    return -0.7 * float((q - k) @ (q - k))


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "lens": {"valid_lens": torch.tensor([2, 6])},
    "lens of queries": {"valid_lens": torch.tensor([[1, 2, 3, 4], [6, 0, 5, 1]])},
    "causal": {"mask": masks.causal()},
    "bool": {"mask": torch.arange(B * LQ * LK).view(B, LQ, LK) % 3 > 0},
    "both": {"mask": torch.arange(LQ * LK).view(LQ, LK) % 5 > 0, "valid_lens": [6, 4]},
}


def visible(options: dict[str, Any]) -> Tensor:
    """Which pairs are, as [B, Lq, Lk], by definition."""
    seen = torch.ones(B, LQ, LK, dtype=torch.bool)
    mask, lens = options.get("mask"), options.get("valid_lens")
    if isinstance(mask, Tensor):
        seen &= mask
    elif mask is not None:
        seen &= torch.arange(LK) <= torch.arange(LQ)[:, None] + LK - LQ
    if lens is not None:
        lens = torch.as_tensor(lens)
        seen &= torch.arange(LK) < (lens if lens.dim() == 2 else lens[:, None])[..., None]
    return seen


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", SCORES)
def test_three_steps_are_the_formula(name, options):
    layer = build(name)
    q, k, v = inputs(name)
    out = layer(q, k, v, **options)
    scores = layer.attention_scores
    want = torch.empty(B, LQ, LK, dtype=torch.float64)
    for b in range(B):
        for i in range(LQ):
            for j in range(LK):
                want[b, i, j] = by_hand(name, layer, q[b, i], k[b, j])
    torch.testing.assert_close(scores, want, rtol=0, atol=1e-13)
    seen = visible(options)
    exp = torch.where(seen, want.exp(), 0.0)
    total = exp.sum(-1, keepdim=True)
    weights = torch.where(total > 0, exp / total, 0.0)
    torch.testing.assert_close(layer.attention_weights, weights, rtol=0, atol=1e-13)
    torch.testing.assert_close(layer.weights(q, k, **options), weights, rtol=0, atol=1e-13)
    torch.testing.assert_close(out, weights @ v, rtol=0, atol=1e-12)
    assert not out[~seen.any(-1)].any()


@pytest.mark.parametrize("name", SCORES)
def test_gradients(name):
    layer = build(name)
    q, k, v = inputs(name, grad=True)
    lens = torch.tensor([[1, 2, 3, 4], [6, 0, 5, 1]])
    parameters = tuple(layer.parameters())
    assert len(parameters) == {"learned": 1, "bilinear": 1, "additive": 3, "module": 1}.get(name, 0)

    def call(q, k, v, *_):
        return layer(q, k, v, lens), layer.weights(q, k, lens)

    assert torch.autograd.gradcheck(call, (q, k, v, *parameters))


@pytest.mark.parametrize("name", SCORES)
def test_heads(name):
    layer = build(name)
    q, k, v = inputs(name)
    heads = [torch.stack([x, x.flip(1)], 1) for x in (q, k, v)]
    lens = torch.tensor([3, 6])
    out = layer(*heads, valid_lens=lens)
    assert out.shape == (B, 2, LQ, DV) and layer.attention_weights.shape == (B, 2, LQ, LK)
    for h in range(2):
        torch.testing.assert_close(out[:, h], layer(*(x[:, h] for x in heads), valid_lens=lens))


@pytest.mark.parametrize("name", SCORES)
def test_without_a_batch_and_with_one_for_all(name):
    layer = build(name)
    q, k, v = inputs(name)
    bias = ALiBi(torch.tensor([0.5], dtype=torch.float64))
    want = layer(q[:1], k[:1], v[:1], mask=masks.causal(), bias=bias)[0]
    torch.testing.assert_close(layer(q[0], k[0], v[0], mask=masks.causal(), bias=bias), want)
    assert layer.attention_weights.shape == (LQ, LK) == layer.attention_scores.shape
    torch.testing.assert_close(
        layer.attention_weights, layer.weights(q[0], k[0], mask=masks.causal(), bias=bias)
    )
    torch.testing.assert_close(layer(q[:1], k, v), layer(q[:1].expand(B, -1, -1), k, v))


@pytest.mark.parametrize("name", [name for name in SCORES if name not in ("additive", "module")])
def test_products_never_make_the_scores(name, monkeypatch):
    layer = build(name)

    def refuse(*_):
        raise AssertionError("the matrix of scores was made")

    monkeypatch.setattr(ProductScore, "forward", refuse)
    monkeypatch.setattr(type(layer.score), "forward", refuse)
    layer(*inputs(name))


@pytest.mark.parametrize("name", ["scaled_dot", "module"])
def test_biases(name):
    layer = build(name)
    q, k, v = inputs(name)
    alibi = ALiBi(torch.tensor([0.5], dtype=torch.float64))
    distance = (torch.arange(LQ)[:, None] + LK - LQ - torch.arange(LK)).abs().double()
    out = layer(q, k, v, bias=alibi)
    want = torch.softmax(layer.scores(q, k) - 0.5 * distance, -1)
    torch.testing.assert_close(layer.attention_weights, want)
    torch.testing.assert_close(out, want @ v)
    torch.testing.assert_close(layer(q, k, v, bias=-0.5 * distance), out)


def test_weights_are_those_of_the_call_though_learned_inputs_change():
    layer, x = Attention("dot"), torch.randn(2, 5, 8)
    queries, bias = torch.nn.Parameter(torch.randn(3, 8)), torch.nn.Parameter(torch.randn(3, 5))
    optimizer = torch.optim.SGD([queries, bias], lr=10.0)
    with torch.inference_mode():
        layer(queries.expand(2, 3, 8), x, x, bias=bias)
        assert not layer.attention_weights.requires_grad
    out = layer(queries.expand(2, 3, 8), x, x, bias=bias)
    weights, scores = layer.attention_weights, layer.attention_scores
    out.square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.attention_weights, weights) and torch.equal(layer.attention_scores, scores)


@pytest.mark.parametrize("changed", ["queries", "keys", "mask", "bias"])
def test_weights_of_inputs_changed_in_place_are_refused(changed):
    layer = Attention("dot")
    x = {"queries": torch.randn(2, 3, 8), "keys": torch.randn(2, 5, 8)}
    x |= {"mask": torch.ones(3, 5, dtype=torch.bool), "bias": torch.zeros(3, 5)}
    layer(**x)
    layer.attention_weights  # noqa: B018
    x[changed].zero_()
    with pytest.raises(RuntimeError, match=f"need the {changed} of the last call"):
        layer.attention_weights  # noqa: B018
    if changed in ("queries", "keys"):
        with pytest.raises(RuntimeError, match=f"attention_scores need the {changed}"):
            layer.attention_scores  # noqa: B018
    layer(**x)
    assert layer.attention_weights is not None


def test_weights_of_a_call_under_autocast_are_told_outside():
    layer, x = Attention("bilinear", query_size=8), torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
        inside = layer.attention_weights
    assert torch.equal(layer.attention_weights, inside)


def test_an_additive_score_beside_a_bias_is_fused(monkeypatch):
    layer, x, bias = Attention("additive", query_size=8), torch.randn(2, 5, 8), torch.randn(2, 5, 5)
    want = torch.softmax(layer.score(x, x) + bias, -1) @ x
    monkeypatch.setattr(type(layer.score), "forward", None)
    torch.testing.assert_close(layer(x, bias=bias), want)


@pytest.mark.parametrize("name", ["cosine", "learned", "additive", "module"])
def test_weights_are_those_of_the_call_though_parameters_change(name):
    layer = build(name)
    q, k, v = inputs(name)
    slopes = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    want = layer.weights(q, k, bias=ALiBi(slopes)).detach()
    layer(q, k, v, bias=ALiBi(slopes))
    with torch.no_grad():
        for parameter in (slopes, *layer.parameters()):
            parameter.add_(1)
    torch.testing.assert_close(layer.attention_weights, want)
    assert not layer.attention_weights.requires_grad


@pytest.mark.parametrize("name", SCORES)
def test_dropout_is_on_the_weights_in_training_alone(name):
    layer = build(name, dropout=0.5)
    q, k, _ = inputs(name)
    values = torch.eye(LK, dtype=torch.float64).expand(B, LK, LK)  # the output is then the weights
    whole = layer.weights(q, k).detach()
    torch.manual_seed(2)
    dropped = torch.stack([layer(q, k, values) for _ in range(40)])
    kept = dropped != 0
    assert 0.4 < kept.double().mean() < 0.6
    torch.testing.assert_close(dropped[kept], (2 * whole).expand_as(dropped)[kept])
    torch.testing.assert_close(layer.attention_weights, whole)
    torch.testing.assert_close(layer.eval()(q, k, values), whole)


@pytest.mark.parametrize("name", SCORES)
@settings(max_examples=12, deadline=None)
@given(length=st.integers(2, 70), changed=st.integers(0, 69), seed=st.integers(0, 99))
def test_a_changed_token_changes_no_earlier_output(name, length, changed, seed):
    """Causal self-attention is autoregressive: to the bit, whatever the score."""
    changed %= length
    layer = build(name, **({"key_size": DQ} if "key_size" in SCORES[name] else {}))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, length, DQ, generator=generator).double()
    y = x.clone()
    y[:, changed] = torch.randn(DQ, generator=generator).double()
    with torch.no_grad():
        a, b = layer(x, mask=masks.causal()), layer(y, mask=masks.causal())
    assert torch.equal(a[:, :changed], b[:, :changed])
    assert not torch.equal(a[:, changed], b[:, changed])


def test_soft_self_cross_and_masked():
    layer = build("scaled_dot")
    q, k, v = inputs("scaled_dot")
    assert torch.equal(layer(q), layer(q, q, q))  # self-attention
    assert torch.equal(layer(q, k), layer(q, k, k))  # cross-attention
    assert layer(q, k, v).shape == (B, LQ, DV)  # soft attention of queries over keys and their values
    masked = layer(q, mask=masks.causal())
    assert torch.equal(masked[:, 0], q[:, 0]), "the first token sees itself alone"


def test_a_learned_temperature_is_printed_wherever_it_lies():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for device, shown in ((None, "0.5"), ("meta", "?")):
            layer = Attention("cosine", temperature=0.5, learn_temperature=True, device=device)
            assert f"temperature={shown}, learn_temperature=True" in repr(layer)


def test_learned_temperature_moves():
    layer = Attention("cosine", temperature=1.0, learn_temperature=True)
    x = torch.randn(1, 8, 16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for _ in range(30):  # each token should find itself, which wants it cold
        loss = (layer(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert layer.score.temperature.item() < 0.6


def test_cosine_of_zero_is_zero_in_half_precision():
    layer = Attention("cosine")
    q = torch.zeros(1, 1, 4, dtype=torch.float16)
    k = torch.randn(1, 3, 4, dtype=torch.float16)
    torch.testing.assert_close(layer.weights(q, k), torch.full((1, 1, 3), 1 / 3))
    assert layer(q, k).isfinite().all()


@pytest.mark.parametrize("name", SCORES)
def test_compiles_copies_and_casts(name):
    layer = build(name)
    q, k, v = inputs(name, grad=True)
    want = layer(q, k, v, torch.tensor([2, 6]))
    weights = layer.attention_weights
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, torch.tensor([2, 6])), want)
    torch.testing.assert_close(layer.attention_weights, weights)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(q, k, v, torch.tensor([2, 6])), want)
    twin = copy.deepcopy(layer)
    assert twin.attention_weights is None and twin.attention_scores is None, "what the layer saw is no state"
    with torch.autocast("cpu", torch.bfloat16):
        narrow = layer.float()(q.float(), k.float(), v.float())
    assert narrow.dtype == torch.bfloat16


@pytest.mark.parametrize("name", SCORES)
def test_under_transforms(name):
    """torch.func: a map over the batch, and gradients by function."""
    layer = build(name)
    q, k, v = inputs(name)
    mapped = torch.vmap(layer)(q, k, v)
    assert layer.attention_weights is None, "nothing of a transformed call is kept"
    torch.testing.assert_close(mapped, layer(q, k, v))
    found = torch.func.grad(lambda q: layer(q, k, v).square().sum())(q)
    q.requires_grad_()
    (want,) = torch.autograd.grad(layer(q, k, v).square().sum(), q)
    torch.testing.assert_close(found, want)


BAD = {
    "name": (lambda: Attention("gaussian"), ValueError, "score must be one of dot, scaled_dot, cosine, "),
    "kind": (lambda: Attention(3), TypeError, "score must be a name or a module, got int"),
    "options": (lambda: Attention(Distance(), temperature=1), TypeError, "got temperature beside a module"),
    "missing": (lambda: Attention("bilinear"), TypeError, "query_size"),
    "dropout": (lambda: Attention(dropout=2), ValueError, "dropout must be between 0 and 1, got 2"),
    "cold": (lambda: Attention("cosine", temperature=0), ValueError, "temperature must be positive, got 0"),
    "shape": (
        lambda: Attention(lambda q, k: q)(*inputs("dot")),
        ValueError,
        r"score must return a tensor \[2, 4, 6\] for these queries and keys, got shape \[2, 4, 5\]",
    ),
    "rank": (lambda: Attention()(torch.zeros(3)), ValueError, r"queries must be \[B, L, D\], \[B, H, L, D\]"),
    "ranks": (
        lambda: Attention()(torch.zeros(1, 3, 4), torch.zeros(1, 1, 3, 4)),
        ValueError,
        r"keys must be 3-D like queries, got shape \[1, 1, 3, 4\]",
    ),
    "list": (lambda: Attention()([1.0]), TypeError, "queries must be a torch.Tensor, got list"),
    "width": (
        lambda: Attention()(torch.zeros(1, 3, 4), torch.zeros(1, 3, 5)),
        ValueError,
        "keys must have queries's head_dim 4, got 5",
    ),
    "features": (
        lambda: Attention("bilinear", query_size=3)(torch.zeros(1, 3, 4)),
        ValueError,
        r"queries must have 3 features, got shape \[1, 3, 4\]",
    ),
    "lens": (
        lambda: Attention()(torch.zeros(1, 3, 4), valid_lens=[1.5]),
        TypeError,
        "valid_lens must be integers, got float32",
    ),
    "mask": (
        lambda: Attention()(torch.zeros(1, 3, 4), mask=torch.zeros(3, 3)),
        TypeError,
        r"mask must be bool \(True = attend\), got float32",
    ),
}


@pytest.mark.parametrize("make, kind, message", BAD.values(), ids=BAD)
def test_errors(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_a_mask_of_the_batch_beside_heads():
    x, mask = torch.randn(3, 2, 5, 8), torch.rand(3, 5, 5) < 0.6
    assert torch.equal(Attention()(x, mask=mask), Attention()(x, mask=mask[:, None]))
    lens = torch.tensor([5, 2, 3])
    assert torch.equal(
        Attention()(x, None, None, lens, mask), Attention()(x, None, None, lens, mask[:, None])
    )


@pytest.mark.parametrize("score", ["dot", lambda q, k: q @ k.mT])
def test_a_bias_is_what_its_module_returns(score):
    x = torch.randn(2, 3, 4)
    with pytest.raises(TypeError, match="got RelativePositionBias, a module: call it"):
        Attention(score)(x, bias=RelativePositionBias(num_heads=1))


def test_options_that_do_not_fit_are_named():
    with pytest.raises(TypeError, match=r"options must fit the score 'dot': .*temperature"):
        Attention("dot", temperature=2.0)
    with pytest.raises(TypeError, match="must be a name or a module, got the class"):
        Attention(ProductScore)

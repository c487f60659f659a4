"""fastattn.nn.MultiheadAttention against torch.nn.MultiheadAttention, and what it adds."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from call_support import EXACT, randn
from torch import Tensor, nn
from torch.testing._internal.common_modules import module_db

from fastattn import masks
from fastattn.nn import KVCache, MultiheadAttention
from fastattn.nn.visibility import merge_masks

BATCH, SEQLEN_Q, SEQLEN_K, WIDTH, HEADS = 2, 5, 7, 16, 4


def pair(**options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """torch's module and ours from one seed, with weights that are no longer the symmetric initial ones."""
    made = []
    for kind in (nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(0)
        made.append(kind(WIDTH, HEADS, dtype=torch.float64, **options))
        with torch.no_grad():
            for n, parameter in enumerate(made[-1].parameters()):
                parameter += 0.3 * randn(*parameter.shape, seed=n)
    return made[0], made[1]


def results(module: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    """Output, weights, and the gradients of a contraction of both."""
    found = [t for t in module(*inputs, **options) if t is not None]
    leaves = [t for t in (*dict.fromkeys(inputs), *module.parameters()) if t.requires_grad]
    loss = sum((t * randn(*t.shape, seed=n)).sum() for n, t in enumerate(found, 3))
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)  # type: ignore[arg-type]
    return [*found, *(g for g in grads if g is not None)]


def same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("training", [True, False])
def test_every_sample_of_torchs_module_db(training: bool) -> None:
    info = next(m for m in module_db if m.module_cls is nn.MultiheadAttention)
    samples = info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
    )
    assert len(samples) >= 64
    for sample in samples:
        given, options = (
            sample.constructor_input.args,
            {**sample.constructor_input.kwargs, "dtype": torch.float64},
        )
        if training:
            options["dropout"] = 0.0  # other elements are dropped
        torch.manual_seed(0)
        theirs = nn.MultiheadAttention(*given, **options).train(training)
        torch.manual_seed(0)
        ours = MultiheadAttention(*given, **options).train(training)
        inputs, more = sample.forward_input.args, sample.forward_input.kwargs
        same(results(ours, inputs, **more), results(theirs, inputs, **more))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("add_bias_kv", "add_zero_attn", "sizes", "batch_first", "need_weights"),
    list(
        itertools.product(
            [False, True], [False, True], [{}, {"kdim": 6, "vdim": 10}], [False, True], [False, True]
        )
    ),
)
def test_constructor(
    add_bias_kv: bool,
    add_zero_attn: bool,
    sizes: dict[str, int],
    batch_first: bool,
    need_weights: bool,
    training: bool,
) -> None:
    theirs, ours = pair(
        add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, batch_first=batch_first, **sizes
    )
    assert list(theirs.state_dict()) == list(ours.state_dict())
    theirs.train(training), ours.train(training)
    query = randn(BATCH, SEQLEN_Q, WIDTH, grad=True)
    key = randn(BATCH, SEQLEN_K, sizes.get("kdim", WIDTH), seed=2, grad=True)
    value = randn(BATCH, SEQLEN_K, sizes.get("vdim", WIDTH), seed=3, grad=True)
    inputs = query, key, value
    if not batch_first:
        inputs = tuple(x.transpose(0, 1) for x in inputs)
    options = {"need_weights": need_weights, "average_attn_weights": batch_first}
    same(results(ours, inputs, **options), results(theirs, inputs, **options))
    padded = torch.arange(SEQLEN_K) >= torch.tensor([[SEQLEN_K], [4]])
    options["key_padding_mask"] = padded
    same(results(ours, inputs, **options), results(theirs, inputs, **options))


BLOCKED = randn(SEQLEN_Q, SEQLEN_K, seed=5) > 0.7
PADDED = torch.arange(SEQLEN_K) >= torch.tensor([[SEQLEN_K], [6]])
ATTN_MASKS = {
    "none": None,
    "bool": BLOCKED,
    "float": randn(SEQLEN_Q, SEQLEN_K, seed=6),
    "heads": randn(BATCH * HEADS, SEQLEN_Q, SEQLEN_K, seed=7) > 0.7,
    "float heads": randn(BATCH * HEADS, SEQLEN_Q, SEQLEN_K, seed=8),
}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("key_padding_mask", [None, PADDED, PADDED * -2.0], ids=["none", "bool", "float"])
@pytest.mark.parametrize("attn_mask", ATTN_MASKS.values(), ids=ATTN_MASKS)
def test_masks(attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> None:
    theirs, ours = pair(batch_first=True)
    x, memory = randn(BATCH, SEQLEN_Q, WIDTH, grad=True), randn(BATCH, SEQLEN_K, WIDTH, seed=2, grad=True)
    if key_padding_mask is not None and key_padding_mask.is_floating_point():
        key_padding_mask = key_padding_mask.double()
    for need_weights in (True, False):
        options = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "need_weights": need_weights}
        inputs = x, memory, memory
        same(results(ours, inputs, **options), results(theirs, inputs, **options))
    if attn_mask is not None and attn_mask.dim() == 3:
        four = attn_mask.unflatten(0, (BATCH, HEADS))
        same(
            results(ours, inputs, attn_mask=four, key_padding_mask=key_padding_mask),
            results(ours, inputs, attn_mask=attn_mask, key_padding_mask=key_padding_mask),
        )


def test_causal_hint() -> None:
    theirs, ours = pair(batch_first=True)
    x = (randn(BATCH, SEQLEN_Q, WIDTH, grad=True),) * 3
    mask = nn.Transformer.generate_square_subsequent_mask(SEQLEN_Q, dtype=torch.float64)
    for options in (
        {"need_weights": False},
        {"need_weights": True},
        {"key_padding_mask": PADDED[:, :SEQLEN_Q]},
    ):
        options = {"attn_mask": mask, "is_causal": True, **options}
        want = results(theirs, x, **options)
        same(results(ours, x, **options), want)
        same(results(ours, x, **{**options, "attn_mask": None}), want)
        same(results(ours, x, **{**options, "attn_mask": masks.causal(), "is_causal": False}), want)


def test_unbatched() -> None:
    for batch_first in (True, False):
        theirs, ours = pair(batch_first=batch_first)
        x, memory = randn(SEQLEN_Q, WIDTH, grad=True), randn(SEQLEN_K, WIDTH, seed=2, grad=True)
        same(results(ours, (x, x, x)), results(theirs, (x, x, x)))
        options = {"key_padding_mask": PADDED[1], "attn_mask": BLOCKED, "average_attn_weights": False}
        same(results(ours, (x, memory, memory), **options), results(theirs, (x, memory, memory), **options))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_all_keys_padded(training: bool, need_weights: bool) -> None:
    """Zero attention, then the projection, in every mode; finite gradients."""
    _, ours = pair(batch_first=True)
    ours.train(training)
    x = randn(BATCH, SEQLEN_Q, WIDTH, grad=True)
    padded = torch.tensor([[False] * SEQLEN_Q, [True] * SEQLEN_Q])
    for options in ({"key_padding_mask": padded}, {"valid_lens": [SEQLEN_Q, 0]}):
        y, weights = ours(x, x, x, need_weights=need_weights, **options)
        torch.testing.assert_close(y[1], ours.out_proj.bias.expand(SEQLEN_Q, WIDTH), **EXACT)
        assert weights is None or (weights[1] == 0).all()
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.isfinite().all() and (grad[1] == 0).all()


def test_valid_lens_and_mask_objects() -> None:
    _, ours = pair(batch_first=True)
    x, memory = randn(BATCH, SEQLEN_Q, WIDTH, grad=True), randn(BATCH, SEQLEN_K, WIDTH, seed=2, grad=True)
    inputs = x, memory, memory
    want = results(ours, inputs, key_padding_mask=PADDED)
    same(results(ours, inputs, valid_lens=torch.tensor([SEQLEN_K, 6])), want)
    same(results(ours, inputs, mask=masks.padding([SEQLEN_K, 6])), want)
    same(results(ours, inputs, mask=~PADDED[:, None, None]), want)
    per_query = torch.randint(0, SEQLEN_K + 1, (BATCH, SEQLEN_Q), generator=torch.Generator().manual_seed(0))
    visible = torch.arange(SEQLEN_K) < per_query[..., None]
    want = results(ours, inputs, mask=visible[:, None])
    same(results(ours, inputs, valid_lens=per_query), want)
    # Two of them meet, and a bool tensor and key padding come on top.
    both = (
        visible
        & ~PADDED[:, None]
        & ~BLOCKED
        & masks.causal().to_dense(masks.MaskShape(1, 1, SEQLEN_Q, SEQLEN_K))[0]
    )
    options = {
        "valid_lens": per_query,
        "key_padding_mask": PADDED,
        "attn_mask": BLOCKED,
        "mask": masks.causal(),
    }
    same(results(ours, inputs, **options), results(ours, inputs, mask=both[:, None]))


def test_grouped_queries() -> None:
    """num_kv_heads equals a full module whose key and value heads repeat."""
    _, full = pair(batch_first=True)
    grouped = MultiheadAttention(WIDTH, HEADS, batch_first=True, num_kv_heads=2, dtype=torch.float64)
    assert grouped.in_proj_weight.shape == (WIDTH + 2 * 8, WIDTH)
    with torch.no_grad():
        for mine, theirs in (
            (grouped.in_proj_weight, full.in_proj_weight),
            (grouped.in_proj_bias, full.in_proj_bias),
        ):
            q, k, v = mine.split([WIDTH, 8, 8])
            repeated = [t.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1) for t in (k, v)]
            theirs.copy_(torch.cat([q, *repeated]))
        full.out_proj.load_state_dict(grouped.out_proj.state_dict())
    x = randn(BATCH, SEQLEN_Q, WIDTH)
    for a, b in zip(grouped(x, mask=masks.causal()), full(x, mask=masks.causal()), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    separate = MultiheadAttention(WIDTH, HEADS, kdim=6, vdim=10, num_kv_heads=1, add_bias_kv=True)
    assert separate.k_proj_weight.shape == (4, 6) and separate.bias_v.shape == (1, 1, 4)
    y, weights = separate(torch.randn(5, 2, WIDTH), torch.randn(7, 2, 6), torch.randn(7, 2, 10))
    assert y.shape == (5, 2, WIDTH) and weights.shape == (2, 5, 8)


def test_weights_are_those_after_dropout() -> None:
    _, ours = pair(batch_first=True, dropout=0.5)
    x = randn(1, 64, WIDTH)
    torch.manual_seed(1)
    y, weights = ours(x, average_attn_weights=False)
    torch.manual_seed(1)
    assert torch.equal(y, ours(x, need_weights=False)[0])
    v = nn.functional.linear(x, ours.in_proj_weight[2 * WIDTH :], ours.in_proj_bias[2 * WIDTH :])
    out = weights @ v.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    torch.testing.assert_close(y, ours.out_proj(out.transpose(1, 2).flatten(2)), **EXACT)
    assert 0.4 < (weights == 0).double().mean() < 0.6
    y, weights = ours.eval()(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 64).double(), **EXACT)


def test_as_a_module() -> None:
    """Copies, pickles, state dicts both ways, and a repr that says what it is."""
    theirs, ours = pair(batch_first=True, dropout=0.1)
    assert isinstance(ours, nn.MultiheadAttention)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = randn(BATCH, SEQLEN_Q, WIDTH)
    want = ours.eval()(x)[0]
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(x)[0], want)
    assert "num_heads=4, dropout=0.1, batch_first=True" in repr(ours)
    assert ours.float()(x.float())[0].dtype == torch.float32


def test_compiles() -> None:
    _, ours = pair(batch_first=True)
    x = randn(BATCH, SEQLEN_Q, WIDTH, grad=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for need_weights in (False, True):
        options = {"need_weights": need_weights, "key_padding_mask": PADDED[:, :SEQLEN_Q]}
        found = []
        for module in (compiled, ours):
            y, weights = module(x, **options)
            loss = y.square().sum() + (weights.square().sum() if need_weights else 0)
            found.append([y, *torch.autograd.grad(loss, [x, *ours.parameters()])])
        same(*found)


BAD_OPTIONS = {
    "heads": ((16, 3), {}, "embed_dim must be a multiple of num_heads 3, got 16"),
    "groups": ((16, 4), {"num_kv_heads": 3}, "num_kv_heads must divide num_heads 4, got 3"),
    "dropout": ((16, 4), {"dropout": 1.5}, "dropout must be between 0 and 1, got 1.5"),
    "width": ((0, 4), {}, "embed_dim must be >= 1, got 0"),
}


@pytest.mark.parametrize(("given", "options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_constructor_errors(given: tuple[int, int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiheadAttention(*given, **options)


BAD_CALLS = {
    "padding": (
        {"key_padding_mask": torch.zeros(2, 3) > 0},
        ValueError,
        r"key_padding_mask must be \[2, 5\]",
    ),
    "mask": ({"attn_mask": torch.zeros(3, 3) > 0}, ValueError, r"attn_mask must be \[5, 5\], \[8, 5, 5\] or"),
    "ints": ({"attn_mask": torch.zeros(5, 5).int()}, TypeError, "attn_mask must be bool .* got int32"),
    "lens": ({"valid_lens": torch.tensor([1, 2, 3])}, ValueError, r"valid_lens must be \[B\] or"),
    "average": ({"average_attn_weights": None}, TypeError, "average_attn_weights must be a bool"),
    "key": ({"key": torch.zeros(2, 5, 3)}, ValueError, "key must have 16 features"),
    "rank": ({"key": torch.zeros(5, 16)}, ValueError, r"key must be \[B, L, E\]"),
}


@pytest.mark.parametrize(("options", "kind", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_call_errors(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        MultiheadAttention(WIDTH, HEADS, batch_first=True)(torch.zeros(2, 5, WIDTH), **options)


def test_backward_under_autocast_alone() -> None:
    """Kernels read bare memory: what autocast would make of gradients on their way must not reach them."""
    ours = pair(batch_first=True)[1].float()
    x = randn(BATCH, 40, WIDTH, dtype=torch.float32)
    grads = []
    for enabled in (False, True):
        y, weights = ours(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(y.sum() + weights.square().sum(), list(ours.parameters())))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_results_can_be_changed_in_place() -> None:
    _, ours = pair(batch_first=True)
    x = randn(BATCH, SEQLEN_Q, WIDTH, grad=True)
    for average in (True, False):
        y, weights = ours(x, average_attn_weights=average)
        want = torch.autograd.grad((2 * y).sum() + (3 * weights**2).sum(), x)
        y, weights = ours(x, average_attn_weights=average)
        squares = (weights**2).mul_(3)
        same(list(torch.autograd.grad(y.mul_(2).sum() + squares.sum(), x)), list(want))
        ours(x, average_attn_weights=average)[1].mul_(2)


@pytest.mark.parametrize("create_graph", [True, False])
def test_weights_in_the_loss(create_graph: bool) -> None:
    """Arguments made of one another, a tensor twice, only the values' side trained, a mask changed since."""
    theirs, ours = pair(batch_first=True)

    def grad(module: nn.Module, *inputs: Tensor, of: Tensor, with_output: bool = False) -> Tensor:
        y, weights = module(*inputs)
        loss = (weights**2).sum() + (y.sum() if with_output and not create_graph else 0)
        return torch.autograd.grad(loss, of, create_graph=create_graph)[0]

    q, v = randn(BATCH, SEQLEN_Q, WIDTH, grad=True), randn(BATCH, SEQLEN_Q, WIDTH, seed=2)
    for inputs in (lambda: (q, q * 2, q * 3), lambda: (q, q, v), lambda: (q, q, q)):
        want = grad(theirs, *inputs(), of=q, with_output=True)
        same([grad(ours, *inputs(), of=q, with_output=True)], [want])
    if create_graph:
        second = [torch.autograd.grad(grad(module, q, q, q, of=q).sum(), q)[0] for module in (theirs, ours)]
        same(second[1:], second[:1])
        return
    ours.requires_grad_(False)
    v.requires_grad_()
    y, weights = ours(q.detach(), q.detach(), v)
    assert not weights.requires_grad
    (y.sum() + weights.sum()).backward()
    assert v.grad is not None
    mask = torch.ones(SEQLEN_Q, SEQLEN_Q, dtype=torch.bool).tril()
    _, weights = ours(q, mask=mask)
    mask.fill_(True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weights.square().sum().backward()


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_autocast_of_narrow_activations(options: dict[str, bool]) -> None:
    ours = MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
    x = randn(BATCH, SEQLEN_Q, WIDTH, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = ours(x)
        with torch.no_grad():
            cached, _ = ours(x, cache=KVCache())
    assert y.dtype == cached.dtype == torch.bfloat16
    torch.testing.assert_close(cached, y, rtol=0.05, atol=0.05)


def test_hint_beside_key_padding_keeps_the_mask() -> None:
    theirs, ours = pair(batch_first=True)
    query, memory = randn(1, 2, WIDTH, grad=True), randn(1, 4, WIDTH, seed=2, grad=True)
    options = {
        "key_padding_mask": torch.tensor([[True, False, False, False]]),
        "attn_mask": torch.ones(2, 4).triu(3).bool(),
        "is_causal": True,
        "need_weights": False,
    }
    inputs = query, memory, memory
    same(results(ours, inputs, **options), results(theirs, inputs, **options))


def test_unbatched_valid_lens() -> None:
    _, ours = pair()
    x = randn(SEQLEN_Q, WIDTH)
    per_query = torch.arange(1, SEQLEN_Q + 1)
    torch.testing.assert_close(ours(x, valid_lens=per_query)[0], ours(x, mask=masks.causal())[0], **EXACT)
    torch.testing.assert_close(ours(x, valid_lens=3)[1][:, 3:], torch.zeros(5, 2).double(), **EXACT)
    with pytest.raises(ValueError, match=r"key must be 2-D like the query, .* got shape \[1, 5, 16\]"):
        ours(x, x[None])


def test_second_derivatives_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module takes no `backend`: the error says how else to ask for the reference, and that holds."""
    ours = MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    stock = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)

    def penalty(layer: nn.MultiheadAttention) -> Tensor:
        (grad,) = torch.autograd.grad(layer(x, x, x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), layer.in_proj_weight)[0]

    with pytest.raises(NotImplementedError, match="FASTATTN_BACKEND=reference"):
        penalty(ours)
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    torch.testing.assert_close(penalty(ours), penalty(stock))


def test_an_expanded_mask_is_not_made_dense() -> None:
    blocked = torch.zeros(1, 1, 50, 50, dtype=torch.bool).expand(4, 8, 50, 50)
    mask, _ = merge_masks(
        (4, 8, 50, 50),
        torch.float32,
        key_padding_mask=None,
        attn_mask=blocked,
        is_causal=False,
        causal_align="top_left",
        mask=None,
        valid_lens=None,
    )
    assert isinstance(mask, Tensor) and mask.untyped_storage().nbytes() == 2500

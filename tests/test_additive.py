"""additive_attention and nn.AdditiveAttention."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from call_support import EXACT, NATIVE, grads, randn

import fastattn
from fastattn import masks
from fastattn.nn import AdditiveAttention
from fastattn.philox import dropout_mask

needs_native = pytest.mark.skipif(not NATIVE, reason="the native core is not built")


def dense_weights(q, k, w, visible=None):
    """The formula, written with the tensor that the kernels do not make."""
    scores = torch.tanh(q[..., :, None, :] + k[..., None, :, :]) @ w
    if visible is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0)


def inputs(*lead, seqlen_q=4, seqlen_k=6, hidden=8, dim_v=3, grad=False, dtype=torch.float64):
    shapes = ((*lead, seqlen_q, hidden), (*lead, seqlen_k, hidden), (*lead, seqlen_k, dim_v), (hidden,))
    return [randn(*shape, seed=n, dtype=dtype).requires_grad_(grad) for n, shape in enumerate(shapes)]


def test_a_row_worked_by_hand():
    q = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    k = torch.tensor([[0.0, 1.0], [1.0, 0.5]], dtype=torch.float64)
    v = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    w = torch.tensor([2.0, 1.0], dtype=torch.float64)
    tanh = torch.tanh(torch.tensor([0.5, 0.0, 1.5, -0.5], dtype=torch.float64)).tolist()
    a, b = 2 * tanh[0] + tanh[1], 2 * tanh[2] + tanh[3]
    p = 1 / (1 + torch.tensor(b - a, dtype=torch.float64).exp())
    want = p * 1 + (1 - p) * 3
    torch.testing.assert_close(fastattn.additive_attention(q, k, v, w)[0, 0], want, **EXACT)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 1, 3)], ids=str)
def test_any_leading_dimensions(lead, backend):
    tensors = inputs(*lead, grad=True)
    got, got_grads = grads(
        lambda *t: fastattn.additive_attention(*t, return_lse=True, backend=backend), tensors
    )
    want, want_grads = grads(
        lambda q, k, v, w: (
            dense_weights(q, k, w) @ v,
            (torch.tanh(q[..., :, None, :] + k[..., None, :, :]) @ w).logsumexp(-1),
        ),
        tensors,
    )
    for a, b in zip(got + got_grads, want + want_grads, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_leading_dimensions_broadcast():
    q, k, v, w = inputs(2, 3)
    want = fastattn.additive_attention(q[:1].expand_as(q), k, v, w)
    torch.testing.assert_close(fastattn.additive_attention(q[0], k, v, w), want, **EXACT)


MASKS = {
    "tensor": torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(1)) < 0.6,
    "shared tensor": torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.6,
    "padding": masks.padding([3, 0]),
    "padding per query": masks.padding(torch.tensor([[0, 1, 2, 3], [4, 5, 6, 0]])),
    "causal": masks.causal(),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks(mask):
    tensors = inputs(2, grad=True)
    visible = mask
    if isinstance(mask, masks.Mask):
        visible = mask.to_dense(masks.MaskShape(2, 1, 4, 6)).expand(2, 1, 4, 6)[:, 0]
    got, got_grads = grads(lambda *t: fastattn.additive_attention(*t, mask=mask), tensors)
    want, want_grads = grads(lambda q, k, v, w: dense_weights(q, k, w, visible) @ v, tensors)
    for a, b in zip(got + got_grads, want + [g.nan_to_num(0.0) for g in want_grads], strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_a_mask_of_five_dimensions():
    tensors = inputs(2, 2, 3)
    mask = torch.rand(2, 1, 3, 4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    q, k, v, w = tensors
    want = dense_weights(q, k, w, mask) @ v
    torch.testing.assert_close(fastattn.additive_attention(*tensors, mask=mask), want, **EXACT)


@needs_native
def test_dropout_drops_what_the_generator_says():
    q, k, v, w = inputs(2)
    seed = torch.tensor([77])
    keep = dropout_mask(seed, 2, 1, 4, 6, 0.4)[:, 0]
    want = (dense_weights(q, k, w) * keep / 0.6) @ v
    got = fastattn.additive_attention(q, k, v, w, dropout_p=0.4, dropout_seed=seed)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@needs_native
def test_routes_agree():
    """Compiled, by vmap, by func.grad and under no_grad: the same numbers."""
    tensors = inputs(2, grad=True)
    want, want_grads = grads(fastattn.additive_attention, tensors)
    compiled = torch.compile(fastattn.additive_attention, fullgraph=True, backend="aot_eager")
    got, got_grads = grads(compiled, tensors)
    for a, b in zip(got + got_grads, want + want_grads, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    plain = [t.detach() for t in tensors]
    assert torch.equal(fastattn.additive_attention(*plain), want[0])
    mapped = torch.vmap(fastattn.additive_attention, in_dims=(0, 0, 0, None))(*plain)
    torch.testing.assert_close(mapped, want[0], **EXACT)
    one = torch.func.grad(lambda w: fastattn.additive_attention(*plain[:3], w).square().sum())(plain[3])
    out = fastattn.additive_attention(*plain[:3], tensors[3])
    torch.testing.assert_close(one, torch.autograd.grad(out.square().sum(), tensors[3])[0], **EXACT)
    per_example = torch.vmap(
        torch.func.grad(lambda w, q, k, v: fastattn.additive_attention(q, k, v, w).square().sum()),
        in_dims=(None, 0, 0, 0),
    )(plain[3], *plain[:3])
    torch.testing.assert_close(per_example.sum(0), one, **EXACT)


@needs_native
def test_opcheck():
    q, k, v, w = (t.float() for t in inputs(2))
    from fastattn.call import Call
    from fastattn.lowering import lower
    from fastattn.ops import _flat

    call = Call(
        "attention", q[:, None], k[:, None], v[:, None], mask=masks.causal(), scale=1.0, score="additive",
        score_weights=w,
    )  # fmt: skip
    operands, params = lower(call)
    leaves = [t.requires_grad_() for t in (call.q, call.k, call.v)]
    torch.library.opcheck(torch.ops.fastattn.attention_forward, ("cpu", *leaves, *operands, *_flat(params)))


def test_autocast():
    tensors = inputs(2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fastattn.additive_attention(*tensors)
    assert out.dtype == torch.bfloat16
    want = fastattn.additive_attention(*(t.bfloat16() for t in tensors[:3]), tensors[3])
    assert torch.equal(out, want)


@needs_native
def test_double_backward_points_to_the_reference():
    tensors = inputs(2, grad=True)
    out = fastattn.additive_attention(*tensors)
    (first,) = torch.autograd.grad(out.sum(), tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        first.sum().backward()
    out = fastattn.additive_attention(*tensors, backend="reference")
    assert torch.autograd.gradgradcheck(
        lambda *t: fastattn.additive_attention(*t, backend="reference"),
        inputs(seqlen_q=2, seqlen_k=3, grad=True),
    )


ERRORS = [
    (
        lambda q, k, v, w: (q, k, v, w[:7]),
        ValueError,
        "w must have shape [8], one weight per feature of q, got [7]",
    ),
    (lambda q, k, v, w: (q, k, v, None), TypeError, "w must be a torch.Tensor, got NoneType"),
    (
        lambda q, k, v, w: (q, k, v, w.int()),
        TypeError,
        "w must be one of float32, bfloat16, float16, float64, got int32",
    ),
    (lambda q, k, v, w: (q, k[..., :7], v, w), ValueError, "k must have q's head_dim 8, got 7"),
    (lambda q, k, v, w: (q, k.float(), v, w), TypeError, "k must have q's dtype float64, got float32"),
    (lambda q, k, v, w: (q[0, 0], k, v, w), ValueError, "q must be [..., length, features], got shape [8]"),
    (
        lambda q, k, v, w: (q, k[:1].expand(3, 6, 8), v, w),
        ValueError,
        "k's leading dimensions must broadcast with the others', got [3] beside [2]",
    ),
    (lambda q, k, v, w: (q, k, v[:, :5], w), ValueError, "v must have k's length 6, got shape [2, 5, 3]"),
]


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS, ids=lambda x: x if isinstance(x, str) else "")
def test_errors(change, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        fastattn.additive_attention(*change(*inputs(2)))


def test_errors_of_masks():
    tensors = inputs(2)
    with pytest.raises(ValueError, match=re.escape("mask must broadcast to [2, 4, 6], got [3, 4, 6]")):
        fastattn.additive_attention(*tensors, mask=torch.ones(3, 4, 6, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be bool"):
        fastattn.additive_attention(*tensors, mask=torch.ones(4, 6))
    with pytest.raises(NotImplementedError, match="PyTorch has no additive score"):
        fastattn.additive_attention(*tensors, backend="torch")


MEMORY = """
    import torch, fastattn

    def resident(what):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(what)) / 1024

    def call(length):
        tensors = [torch.randn(8, length, 128).requires_grad_() for _ in range(3)]
        tensors.append(torch.randn(128).requires_grad_())
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
        before = resident("VmRSS")
        out = fastattn.additive_attention(*tensors)
        torch.autograd.grad(out.sum(), tensors)
        return resident("VmHWM") - before

    call(64)
    print(call(256))
"""


@needs_native
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_of_forward_and_backward():
    """Eager code keeps [8, 256, 256, 128] twice: 512 MB. A fiftieth of that is allowed."""
    command = [sys.executable, "-c", textwrap.dedent(MEMORY)]
    done = subprocess.run(command, timeout=200, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 512 / 50


# The layer


def layer_and_inputs(dtype=torch.float64):
    torch.manual_seed(0)
    layer = AdditiveAttention(key_size=5, query_size=7, num_hiddens=8, dtype=dtype)
    return (
        layer,
        randn(2, 4, 7, dtype=dtype),
        randn(2, 6, 5, seed=2, dtype=dtype),
        randn(2, 6, 3, seed=3, dtype=dtype),
    )


LENS = {"1-D": torch.tensor([3, 6]), "2-D": torch.tensor([[1, 2, 3, 4], [6, 5, 0, 2]]), "list": [2, 0]}


def valid(lens, seqlen_k=6):
    lens = torch.as_tensor(lens)
    return torch.arange(seqlen_k) < (lens[:, None, None] if lens.dim() == 1 else lens[..., None])


@pytest.mark.parametrize("lens", LENS.values(), ids=LENS)
def test_layer_equals_its_formula(lens):
    layer, queries, keys, values = layer_and_inputs()
    weights = dense_weights(layer.W_q(queries), layer.W_k(keys), layer.w_v.weight[0], valid(lens))
    out = layer(queries, keys, values, lens)
    torch.testing.assert_close(out, weights @ values, **EXACT)
    torch.testing.assert_close(layer.attention_weights, weights.detach(), **EXACT)
    got = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
    want = torch.autograd.grad((weights @ values).square().sum(), list(layer.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.nan_to_num(0.0), **EXACT)


def test_layer_joins_mask_and_valid_lens():
    layer, queries, keys, values = layer_and_inputs()
    mask = MASKS["tensor"]
    layer(queries, keys, values, [3, 6], mask)
    weights = dense_weights(layer.W_q(queries), layer.W_k(keys), layer.w_v.weight[0], valid([3, 6]) & mask)
    torch.testing.assert_close(layer.attention_weights, weights.detach(), **EXACT)
    layer(queries, keys, values, valid_lens=[3, 6], mask=masks.causal())
    assert (layer.attention_weights[0, :, 3:] == 0).all()


def test_layer_without_a_batch():
    layer, queries, keys, values = layer_and_inputs()
    want = layer(queries[:1], keys[:1], values[:1], [2])[0]
    torch.testing.assert_close(layer(queries[0], keys[0], values[0], 2), want, **EXACT)
    assert layer.attention_weights.shape == (4, 6)


def test_weights_are_those_of_the_call_and_do_not_get_in_the_way():
    layer, queries, keys, values = layer_and_inputs()
    assert layer.attention_weights is None
    out = layer(queries, keys, values)
    before = out.detach().clone()
    with torch.no_grad():
        layer.w_v.weight.zero_()  # what an optimizer may do before anyone looks
    torch.testing.assert_close(layer.attention_weights @ values, before, **EXACT)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert twin.attention_weights is None
    assert set(layer.state_dict()) == {"W_k.weight", "W_q.weight", "w_v.weight"}


@needs_native
def test_layer_dropout_is_of_training_only():
    layer, queries, keys, values = layer_and_inputs()
    layer.dropout = 0.5
    torch.manual_seed(3)
    trained = layer(queries, keys, values)
    assert not torch.allclose(trained, layer.eval()(queries, keys, values))
    torch.manual_seed(3)
    assert torch.equal(layer.train()(queries, keys, values), trained)


@needs_native
def test_layer_under_transforms():
    layer, queries, keys, values = layer_and_inputs()
    want = layer(queries, keys, values)
    parameters = dict(layer.named_parameters())

    def loss(parameters, queries, keys, values):
        return torch.func.functional_call(layer, parameters, (queries, keys, values)).square().sum()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(parameters, queries, keys, values)
    assert layer.attention_weights is None
    whole = torch.autograd.grad(want.square().sum(), list(parameters.values()))
    for name, gradient in zip(parameters, whole, strict=True):
        torch.testing.assert_close(each[name].sum(0), gradient, **EXACT)


@needs_native
def test_layer_compiles():
    layer, queries, keys, values = layer_and_inputs()
    want = layer(queries, keys, values, torch.tensor([3, 6]))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(queries, keys, values, torch.tensor([3, 6])), want, **EXACT)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: AdditiveAttention(0, 2, 3), ValueError, "key_size must be >= 1, got 0"),
        (lambda: AdditiveAttention(2, 2, 3, 1.5), ValueError, "dropout must be between 0 and 1, got 1.5"),
        (
            lambda: layer_and_inputs()[0](randn(2, 4, 6), randn(2, 6, 5), randn(2, 6, 3)),
            ValueError,
            "queries must have 7 features, got shape [2, 4, 6]",
        ),
        (
            lambda: layer_and_inputs()[0](randn(2, 4, 7), randn(2, 6, 5), randn(2, 6, 3), torch.rand(2)),
            TypeError,
            "valid_lens must be integers, got float32",
        ),
        (
            lambda: layer_and_inputs()[0](*layer_and_inputs()[1:], torch.ones(3, dtype=torch.int64)),
            ValueError,
            "valid_lens must be [B] or [B, Lq], here [2] or [2, 4], got shape [3]",
        ),
        (
            lambda: layer_and_inputs()[0](*layer_and_inputs()[1:], "two"),
            TypeError,
            "valid_lens must be a tensor or numbers that make one, got 'two'",
        ),
        (
            lambda: layer_and_inputs()[0](randn(2, 4, 7), randn(2, 6, 5), randn(2, 5, 3)),
            ValueError,
            "values must have keys's length 6, got shape [2, 5, 3]",
        ),
    ],
    ids=["size", "dropout", "features", "float lens", "lens", "text", "values"],
)
def test_errors_of_the_layer(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()

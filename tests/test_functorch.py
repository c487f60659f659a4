"""vmap, torch.func.grad and their compositions against loops and against the reference."""

from __future__ import annotations

import pytest
import torch
from call_support import EXACT, NATIVE, qkv, randn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fastattn
from fastattn.biases import ALiBi, RelativePosition
from fastattn.masks import causal, documents, padding, prefix

pytestmark = pytest.mark.skipif(not NATIVE, reason="the native core is not built")


def assert_same(got, want):
    got = got if isinstance(got, (tuple, list)) else [got]
    want = want if isinstance(want, (tuple, list)) else [want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def loop(function, in_dims, *args):
    """vmap, written out."""
    size = next(a.shape[d] for a, d in zip(args, in_dims, strict=True) if d is not None)
    rows = []
    for n in range(size):
        rows.append(
            function(*(a if d is None else a.select(d, n) for a, d in zip(args, in_dims, strict=True)))
        )
    if isinstance(rows[0], tuple):
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))
    return torch.stack(rows)


def batch_of(size: int, batch: int = 2, seqlen_q: int = 5, seqlen_k: int = 7, **options):
    examples = [qkv(batch, 4, 2, seqlen_q, seqlen_k, seed=n, **options) for n in range(size)]
    return [torch.stack(column) for column in zip(*examples, strict=True)]


OPTIONS = {
    "plain": {},
    "lse": {"return_lse": True},
    "causal": {"mask": causal()},
    "padding": {"mask": padding([3, 0])},
    "bool": {"mask": randn(2, 1, 5, 7) > 0},
    "bool of rows": {"mask": randn(5, 1) > 0},
    "blocks": {"mask": causal() | prefix(2)},
    "blocks of the batch": {"mask": documents(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]]),
                                              torch.tensor([[0, 0, 1, 1, 1, 2, 0], [0, 0, 0, 1, 1, 2, 2]]))},
    "bias": {"bias": randn(2, 4, 1, 7), "sinks": randn(4)},
    "alibi": {"bias": ALiBi(randn(4)), "softcap": 2.0},
    "alibi of the batch": {"bias": ALiBi(randn(2, 4))},
    "dropout": {"dropout_p": 0.4, "dropout_seed": torch.tensor([9])},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    "in_dims", [(0, 0, 0), (0, None, None), (None, 0, 0), (None, None, 1), (2, 1, 0)], ids=str
)
def test_vmap(options, in_dims):
    args = batch_of(3)
    args = [a[0] if d is None else a.movedim(0, d) for a, d in zip(args, in_dims, strict=True)]

    def call(q, k, v):
        return fastattn.attention(q, k, v, **options)

    assert_same(vmap(call, in_dims)(*args), loop(call, in_dims, *args))


@pytest.mark.parametrize(
    "name", ["mask", "mask of rows", "bias", "slopes", "table", "sinks", "lengths", "seed"]
)
def test_vmap_over_options(name):
    q, k, v = qkv(2, 4, 2, 5, 7)
    values = {
        "mask": randn(3, 2, 1, 5, 7) > 0,
        "mask of rows": randn(3, 5, 1) > 0,
        "bias": randn(3, 4, 5, 1),
        "slopes": randn(3, 4),
        "table": randn(3, 8, 4),
        "sinks": randn(3, 4),
        "lengths": torch.tensor([[3, 7], [0, 2], [5, 5]]),
        "seed": torch.tensor([[3], [4], [5]]),
    }

    def call(x):
        options = {
            "mask": lambda: {"mask": x},
            "mask of rows": lambda: {"mask": x},
            "bias": lambda: {"bias": x},
            "slopes": lambda: {"bias": ALiBi(x)},
            "table": lambda: {"bias": RelativePosition(x)},
            "sinks": lambda: {"sinks": x},
            "lengths": lambda: {"mask": padding(x)},
            "seed": lambda: {"dropout_p": 0.5, "dropout_seed": x},
        }[name]()
        return fastattn.attention(q, k, v, return_lse=True, **options)

    assert_same(vmap(call)(values[name]), loop(call, (0,), values[name]))


def test_nested_vmap():
    args = [torch.stack([t, t.flip(0)]) for t in batch_of(3)]
    got = vmap(vmap(fastattn.attention))(*args)
    want = fastattn.attention(*(t.flatten(0, 2) for t in args)).unflatten(0, (2, 3, 2))
    assert_same(got, want)


def test_vmap_of_an_empty_batch_dimension():
    q, k, v = (t[:0] for t in batch_of(2))
    assert vmap(fastattn.attention)(q, k, v).shape == (0, 2, 4, 5, 8)


WEIGHTS = randn(8, 8)
LOSSES = {name: options for name, options in OPTIONS.items() if name != "lse"}


def loss(q, k, v, **options):
    out = fastattn.attention(q, k, v, **options)
    return (out * WEIGHTS[: out.shape[-2], : out.shape[-1]]).sum()


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_grad(options):
    q, k, v = qkv(2, 4, 2, 5, 7)
    got = grad(lambda *t: loss(*t, **options), (0, 1, 2))(q, k, v)
    want = grad(lambda *t: loss(*t, **options, backend="reference"), (0, 1, 2))(q, k, v)
    assert_same(got, want)


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_vmap_of_grad(options):
    args = batch_of(3)
    one = grad(lambda *t: loss(*t, **options), (0, 1, 2))
    assert_same(vmap(one)(*args), loop(one, (0, 0, 0), *args))
    assert_same(vmap(one, (0, None, None))(args[0], args[1][0], args[2][0]),
                loop(one, (0, None, None), args[0], args[1][0], args[2][0]))  # fmt: skip


def test_grad_of_vmap():
    args = batch_of(3)
    got = grad(lambda *t: vmap(loss)(*t).sum(), (0, 1, 2))(*args)
    assert_same(got, loop(grad(loss, (0, 1, 2)), (0, 0, 0), *args))


def test_per_example_gradients_of_shared_parameters():
    args = batch_of(3)
    bias, slopes, sinks = randn(4, 5, 1), randn(4), randn(4)

    def one(bias, sinks, slopes, q, k, v):
        return loss(q, k, v, bias=bias, sinks=sinks) + loss(q, k, v, bias=ALiBi(slopes))

    gradient = grad(one, (0, 1, 2))
    in_dims = (None, None, None, 0, 0, 0)
    got = vmap(gradient, in_dims)(bias, sinks, slopes, *args)
    assert_same(got, loop(gradient, in_dims, bias, sinks, slopes, *args))


def test_jacobians():
    q, k, v = qkv(1, 2, 2, 3, 4, 4)
    got = jacrev(fastattn.attention, (0, 1, 2))(q, k, v)
    want = torch.autograd.functional.jacobian(
        lambda *t: fastattn.attention(*t, backend="reference"), (q, k, v)
    )
    assert_same(got, want)


def test_vjp_of_lse():
    q, k, v = qkv(2, 4, 2, 5, 7)
    (out, lse), pull = vjp(lambda *t: fastattn.attention(*t, return_lse=True), q, k, v)
    _, pull_reference = vjp(lambda *t: fastattn.attention(*t, return_lse=True, backend="reference"), q, k, v)
    cotangents = randn(*out.shape), randn(*lse.shape)
    assert_same(pull(cotangents), pull_reference(cotangents))


def test_packed_and_cached_calls_under_vmap():
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    q, k, v = randn(3, 5, 4, 8), randn(3, 5, 2, 8), randn(3, 5, 2, 8)

    def varlen(q, k, v):
        return fastattn.varlen_attention(q, k, v, cu, cu, max_seqlen_q=3, max_seqlen_k=3, return_lse=True)

    assert_same(vmap(varlen)(q, k, v), loop(varlen, (0, 0, 0), q, k, v))
    q, k, v = batch_of(3, seqlen_q=1, seqlen_k=16)
    lengths = torch.tensor([[3, 16], [1, 0], [9, 9]])
    assert_same(
        vmap(fastattn.decode_attention)(q, k, v, lengths),
        loop(fastattn.decode_attention, (0,) * 4, q, k, v, lengths),
    )


def test_dropout_without_a_seed_follows_the_randomness_of_vmap():
    q, k, v = batch_of(3)

    def call(q, k, v):
        return fastattn.attention(q, k, v, dropout_p=0.5)

    same = [t[:1].expand_as(t) for t in (q, k, v)]
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(call)(q, k, v)
    out = vmap(call, randomness="same")(*same)
    assert torch.equal(out[0], out[1])
    out = vmap(call, randomness="different")(*same)
    assert not torch.equal(out[0], out[1])


class Attend(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = torch.nn.Linear(8, 24, dtype=torch.float64)

    def forward(self, x):
        q, k, v = self.projection(x).unflatten(-1, (3, 2, 4)).unbind(2)
        out = fastattn.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask=causal())
        return out.transpose(1, 2).flatten(2)


def test_per_example_gradients_of_a_module():
    module = Attend()
    x = randn(4, 5, 8)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def one(parameters, x):
        return functional_call(module, parameters, (x[None],)).square().sum()

    got = vmap(grad(one), (None, 0))(parameters, x)
    for n in range(4):
        module.zero_grad()
        module(x[n : n + 1]).square().sum().backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(got[name][n], parameter.grad, **EXACT)


@pytest.mark.parametrize(
    "name",
    [
        "causal",
        "blocks",
        "alibi",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("bias", "dropout")),
    ],
)
def test_transforms_inside_compiled_functions(name):
    torch._dynamo.reset()
    args = batch_of(3)

    def one(q, k, v):
        return loss(q, k, v, **OPTIONS[name])

    for function in (vmap(one), grad(lambda *t: vmap(one)(*t).sum()), vmap(grad(one, (0, 1, 2)))):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_same(compiled(*args), function(*args))
    torch._dynamo.reset()


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_traces_of_transforms_hold_ops(tracing_mode):
    args = batch_of(3)

    def one(q, k, v):
        return fastattn.attention(q, k, v, mask=causal(), bias=ALiBi(torch.ones(4))).square().sum()

    function = vmap(grad(one, (0, 1, 2)))
    graph = make_fx(function, tracing_mode=tracing_mode)(*args)
    assert [str(n.target) for n in graph.graph.nodes if "fastattn" in str(n.target)] == [
        "fastattn.attention_forward.default",
        "fastattn.attention_backward.default",
    ]
    assert_same(graph(*args), function(*args))


def test_what_kernels_lack_points_to_the_reference():
    q, k, v = qkv(1, 2, 2, 3)
    with pytest.raises(NotImplementedError, match="no double backward: call with backend='reference'"):
        grad(lambda q: grad(lambda q: loss(q, k, v))(q).sum())(q)
    with pytest.raises(
        NotImplementedError, match="no forward-mode derivative: call with backend='reference'"
    ):
        jvp(lambda q: fastattn.attention(q, k, v), (q,), (q,))
    with pytest.raises(NotImplementedError, match="call with backend='reference'"):
        jacfwd(grad(lambda q: loss(q, k, v)))(q)
    jvp(lambda q: fastattn.attention(q, k, v, backend="reference"), (q,), (q,))
    grad(lambda q: grad(lambda q: loss(q, k, v, backend="reference"))(q).sum())(q)

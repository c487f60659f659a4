"""fastattn.multi_head_attention: one node of autograd equals its three steps, on every route."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from call_support import EXACT, NATIVE, grads, randn

import fastattn.reference
import fastattn.testing
from fastattn import masks
from fastattn.backends import cpu
from fastattn.biases import ALiBi
from fastattn.multi_head import multi_head_attention

BATCH, SEQLEN_Q, SEQLEN_K, HEADS, HEAD_DIM = 2, 5, 7, 4, 8
WIDTH = HEADS * HEAD_DIM


def tensors(
    heads_kv: int = HEADS, *, dtype: torch.dtype = torch.float64, grad: bool = True
) -> dict[str, Any]:
    rows = (HEADS + 2 * heads_kv) * HEAD_DIM
    shapes = {
        "in_proj_weight": (rows, WIDTH),
        "in_proj_bias": (rows,),
        "out_proj_weight": (WIDTH, WIDTH),
        "out_proj_bias": (WIDTH,),
    }
    return {
        name: (randn(*shape, seed=11 + n) / 4).to(dtype).requires_grad_(grad)
        for n, (name, shape) in enumerate(shapes.items())
    }


def inputs(kind: str, batch_first: bool = True, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """query; query and memory; or query, key and value."""
    count = {"self": 1, "memory": 2, "separate": 3}[kind]
    lengths = [SEQLEN_Q, SEQLEN_K, SEQLEN_K][:count]
    made = [randn(BATCH, n, WIDTH, seed=21 + i).to(dtype) for i, n in enumerate(lengths)]
    return [(x if batch_first else x.transpose(0, 1).contiguous()).requires_grad_() for x in made]


def three_steps(
    *given: torch.Tensor, num_heads: int, num_kv_heads: int, batch_first: bool, **options: Any
) -> Any:
    """The definition: linear maps, attention on contiguous heads, linear map."""
    names = ("in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias")
    w_in, b_in, w_out, b_out = (options.pop(name) for name in names)
    query, key, value = (*given, *given[-1:] * (3 - len(given)))
    sizes = [num_heads * HEAD_DIM, num_kv_heads * HEAD_DIM, num_kv_heads * HEAD_DIM]
    heads = []
    for x, w, b in zip((query, key, value), w_in.split(sizes), b_in.split(sizes), strict=True):
        projected = F.linear(x if batch_first else x.transpose(0, 1), w, b)
        heads.append(projected.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2).contiguous())
    out = fastattn.attention(*heads, **options, backend="reference")
    y = F.linear(out.transpose(1, 2).flatten(2), w_out, b_out)
    return y if batch_first else y.transpose(0, 1)


OPTIONS = {
    "plain": {},
    "causal": {"mask": masks.causal()},
    "bool": {"mask": randn(BATCH, 1, SEQLEN_Q, 1) > -0.5},
    "alibi": {"bias": ALiBi(torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=torch.float64))},
    "softcap": {"softcap": 2.0, "scale": 0.3},
    "dropout": {"dropout_p": 0.4, "dropout_seed": torch.tensor([3])},
}


def by_position(function: Any, names: list[str], fixed: dict[str, Any], *flat: torch.Tensor) -> Any:
    """function(...) with the inputs first and the parameters of these names last."""
    count = len(flat) - len(names)
    return function(*flat[:count], **dict(zip(names, flat[count:], strict=True)), **fixed)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["self", "memory", "separate"])
def test_equals_three_steps(kind: str, options: dict[str, Any]) -> None:
    for batch_first in (True, False):
        for heads_kv in (HEADS, 2):
            parameters = tensors(heads_kv)
            given = inputs(kind, batch_first)
            fixed = {"num_heads": HEADS, "num_kv_heads": heads_kv, "batch_first": batch_first, **options}

            flat = [*given, *parameters.values()]
            got, want = (
                grads(functools.partial(by_position, function, list(parameters), fixed), flat)
                for function in (multi_head_attention, three_steps)
            )
            for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True):
                torch.testing.assert_close(a, b, **EXACT)


def test_three_weights_of_three_widths() -> None:
    query, key, value = randn(2, 5, 6, seed=1), randn(2, 7, 10, seed=2), randn(2, 7, 12, seed=3)
    weights = [randn(16, n, seed=n).requires_grad_() for n in (6, 10, 12)]
    out_weight = randn(9, 16, seed=4)
    y = multi_head_attention(
        query, key, value, in_proj_weight=weights, out_proj_weight=out_weight, num_heads=2
    )
    heads = [
        F.linear(x, w).unflatten(-1, (2, 8)).transpose(1, 2)
        for x, w in zip((query, key, value), weights, strict=True)
    ]
    want = F.linear(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2), out_weight)
    torch.testing.assert_close(y, want, **EXACT)
    for a, b in zip(*(torch.autograd.grad(z.square().sum(), weights) for z in (y, want)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_gradients_reach_bias_and_sinks() -> None:
    parameters = tensors(grad=False)
    bias, sinks = randn(1, HEADS, SEQLEN_Q, SEQLEN_Q, seed=5, grad=True), randn(HEADS, seed=6, grad=True)
    x = inputs("self")[0]

    def call(function: Any, **more: Any) -> Any:
        return function(x, **parameters, num_heads=HEADS, bias=bias, sinks=sinks, **more)

    got = torch.autograd.grad(call(multi_head_attention).square().sum(), [x, bias, sinks])
    y = call(three_steps, num_kv_heads=HEADS, batch_first=True)
    for a, b in zip(got, torch.autograd.grad(y.square().sum(), [x, bias, sinks]), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.skipif(not NATIVE, reason="the native core is not built")
def test_is_one_node_and_copies_no_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels see views of one projection, and write where the output projection reads."""
    seen: list[torch.Tensor] = []
    forward, backward = cpu.forward, cpu.backward

    def watched_forward(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        out, lse = forward(q, k, v, *rest)
        seen.extend((q, k, v, out))
        return out, lse

    def watched_backward(*args: Any) -> Any:
        seen.extend(args[-1])
        return backward(*args)

    monkeypatch.setattr(cpu, "forward", watched_forward)
    monkeypatch.setattr(cpu, "backward", watched_backward)
    x, parameters = inputs("self")[0], tensors()
    y = multi_head_attention(x, **parameters, num_heads=HEADS)
    assert type(y.grad_fn).__name__ == "_MultiHeadBackward"
    assert all(node is None or "AccumulateGrad" in str(node) for node, _ in y.grad_fn.next_functions)
    y.sum().backward()
    q, k, v, out, dq, dk, dv = seen
    for group in ((q, k, v), (dq, dk, dv)):
        assert len({t.untyped_storage().data_ptr() for t in group}) == 1
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("mask", [None, masks.causal(), masks.padding([2, 0])], ids=str)
def test_weights(average: bool, dropout_p: float, mask: Any) -> None:
    """They are those behind the output, and their gradient is that of the plain formula."""
    parameters, x = tensors(2), inputs("self")[0]
    seed = torch.tensor([9])
    fixed = {
        "num_heads": HEADS,
        "num_kv_heads": 2,
        "mask": mask,
        "dropout_p": dropout_p,
        "dropout_seed": seed,
    }
    y, weights = multi_head_attention(x, **parameters, **fixed, need_weights=True, average_weights=average)
    assert torch.equal(y, multi_head_attention(x, **parameters, **fixed))

    rows = [WIDTH, 16, 16]
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        for w, b in zip(
            parameters["in_proj_weight"].split(rows), parameters["in_proj_bias"].split(rows), strict=True
        )
    )
    keep = fastattn.testing.dropout_mask(seed, BATCH, HEADS, SEQLEN_Q, SEQLEN_Q, dropout_p)
    want = fastattn.reference.attention_weights(q, k, mask=mask) * keep / (1 - dropout_p)
    out = want @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(
        y,
        F.linear(out.transpose(1, 2).flatten(2), parameters["out_proj_weight"], parameters["out_proj_bias"]),
        **EXACT,
    )
    want = want.mean(1) if average else want
    torch.testing.assert_close(weights, want, **EXACT)
    leaves = [x, parameters["in_proj_weight"], parameters["in_proj_bias"]]
    got = torch.autograd.grad((weights**2).sum() + y.sum(), leaves)
    flat = F.linear(out.transpose(1, 2).flatten(2), parameters["out_proj_weight"])
    for a, b in zip(got, torch.autograd.grad((want**2).sum() + flat.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(70, 1), (70, 63), (70, 300), (3, 300), (1, 63)])
def test_weights_of_the_kernel(native, use_isa, dtype: torch.dtype, seqlen_q: int, seqlen_k: int) -> None:
    """Each ISA's weights against float64, in grouped heads, with rows that see nothing."""
    q = randn(2, 4, seqlen_q, 16, seed=1).to(dtype)
    k, v = (randn(2, 2, seqlen_k, 16, seed=n).to(dtype) for n in (2, 3))
    for mask in (None, masks.causal(), masks.window(9, 2) | masks.prefix(3), randn(2, 1, seqlen_q, 1) > 0):
        call = fastattn.call.Call("attention", q, k, v, mask=mask)
        operands, params = fastattn.lowering.lower(call)
        want = fastattn.reference.attention_weights(q.double(), k.double(), mask=mask)
        for isa in native.info()["isas"]:
            use_isa(isa)
            for average in (True, False):
                weights = cpu.weights_like(q, k, average).fill_(torch.nan)
                cpu.forward(q, k, v, operands, params, False, weights)
                torch.testing.assert_close(
                    weights.double(), want.mean(1, keepdim=True) if average else want, rtol=0, atol=2e-6
                )


@pytest.mark.parametrize(
    "mask",
    [masks.causal(), torch.ones(20, 30).tril(10) > 0, masks.causal() | masks.prefix([3])],
    ids=["band", "bool", "tiles"],
)
def test_a_hidden_pair_weighs_nothing_in_a_row_of_nan(native, mask: Any) -> None:
    q, k, v = (randn(1, 2, n, 8, dtype=torch.float32) for n in (20, 30, 30))
    q[:, :, 7] = torch.nan
    call = fastattn.call.Call("attention", q, k, v, mask=mask)
    weights = cpu.weights_like(q, k, average=False)
    cpu.forward(q, k, v, *fastattn.lowering.lower(call), False, weights)
    for found in (weights, fastattn.reference.attention_weights(q, k, mask=mask)):
        assert found[:, :, 7, :18].isnan().all()
        assert (found[:, :, 7, 18:] == 0).all()
        assert found[:, :, :7].isfinite().all()


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize(
    "mask",
    [None, masks.causal(), masks.window(9, 2) | masks.prefix(3), masks.window(9, 2) | masks.prefix(300)],
    ids=["none", "causal", "window", "tiles"],
)
def test_weights_of_many_rows_and_segments(native, average: bool, mask: Any) -> None:
    """Maxima that move far, keys that no row sees, and what an earlier call left in the scratch memory."""
    q, k, v = (randn(1, heads, n, 16, dtype=torch.float32) for heads, n in ((4, 200), (2, 700), (2, 700)))
    k = (
        k * torch.linspace(0.1, 30, 700)[:, None]
    )  # some weights of the first keys are less than a float can hold
    seed = torch.tensor([5])

    def weights(q: torch.Tensor, **options: Any) -> torch.Tensor:
        call = fastattn.call.Call("attention", q, k, v, **options)
        into = cpu.weights_like(q, k, average).fill_(torch.nan)
        cpu.forward(q, k, v, *fastattn.lowering.lower(call), False, into)
        return into

    assert weights(q * torch.nan).isnan().all()
    want = fastattn.reference.attention_weights(q.double(), k.double(), mask=mask)
    keep = fastattn.testing.dropout_mask(seed, 1, 4, 200, 700, 0.5)
    for dropped, options in (
        (want, {}),
        (want * keep * 2, {"dropout_p": 0.5, "dropout_seed": seed}),
    ):
        got = weights(q, mask=mask, **options)
        expected = dropped.mean(1, keepdim=True) if average else dropped
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=2e-6)
        assert (got[expected == 0] == 0).all()


def test_weights_beside_non_finite_values(native) -> None:
    """A hidden NaN or infinity leaves them alone; a visible one is seen by its own rows only."""
    q, k, v = (randn(1, 2, 6, 8, seed=n) for n in range(3))
    k[0, 0, 4], v[0, 1, 3] = torch.nan, torch.inf
    call = fastattn.call.Call("attention", q, k, v, mask=masks.causal())
    operands, params = fastattn.lowering.lower(call)
    weights = cpu.weights_like(q, k, False)
    cpu.forward(q, k, v, operands, params, False, weights)
    want = fastattn.reference.attention_weights(q, k, mask=masks.causal()).tril()
    torch.testing.assert_close(weights, want, **EXACT, equal_nan=True)
    assert weights[0, 0, :4].isfinite().all() and weights[0, 1].isfinite().all()


def test_same_bits_for_any_number_of_threads(use_threads) -> None:
    x = randn(3, 150, WIDTH, dtype=torch.float32, grad=True)
    parameters = tensors(dtype=torch.float32)
    results = []
    for threads in (1, 2):
        use_threads(threads)
        q = F.linear(x, parameters["in_proj_weight"]).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)[:, :HEADS]
        weights = cpu.weights_like(q, q, True) if NATIVE else None
        if weights is not None:
            call = fastattn.call.Call("attention", q.detach(), q.detach(), q.detach())
            cpu.forward(call.q, call.k, call.v, *fastattn.lowering.lower(call), False, weights)
            results.append(weights)
    assert not results or torch.equal(*results)


def test_under_compile_vmap_and_autocast() -> None:
    parameters, x = tensors(grad=False), inputs("self")[0].detach()
    want = multi_head_attention(x, **parameters, num_heads=HEADS, mask=masks.causal())

    compiled = torch.compile(multi_head_attention, fullgraph=True, backend="aot_eager")
    got = compiled(x, **parameters, num_heads=HEADS, mask=masks.causal())
    torch.testing.assert_close(got, want, **EXACT)

    def one(x: torch.Tensor) -> torch.Tensor:
        return multi_head_attention(x[None], **parameters, num_heads=HEADS, mask=masks.causal())[0]

    torch.testing.assert_close(torch.vmap(one)(x), want, **EXACT)
    jacobian = torch.func.jacrev(lambda x: one(x).sum())(x[0])
    x = x.requires_grad_()
    y = multi_head_attention(x, **parameters, num_heads=HEADS, mask=masks.causal())
    torch.testing.assert_close(jacobian, torch.autograd.grad(y[0].sum(), x)[0][0], **EXACT)

    narrow = tensors(dtype=torch.float32)
    x32 = inputs("self", dtype=torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = multi_head_attention(x32, **narrow, num_heads=HEADS)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x32.grad is not None and x32.grad.dtype == torch.float32
    torch.testing.assert_close(
        y.float(), multi_head_attention(x32, **narrow, num_heads=HEADS), rtol=0.05, atol=0.05
    )


def test_gradcheck_and_second_derivatives() -> None:
    parameters, x = tensors(grad=False), inputs("self")[0][:1, :3].detach().requires_grad_()

    def call(x: torch.Tensor, w: torch.Tensor, **options: Any) -> torch.Tensor:
        return multi_head_attention(x, **{**parameters, "in_proj_weight": w}, num_heads=HEADS, **options)

    w = parameters["in_proj_weight"].clone().requires_grad_()
    assert torch.autograd.gradcheck(call, (x, w), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, w: call(x, w, backend="reference"), (x, w), fast_mode=True)
    if NATIVE:
        (grad,) = torch.autograd.grad(call(x, w).sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="backend='reference'"):
            grad.sum().backward()


def test_checkpointing() -> None:
    parameters, x = tensors(), inputs("self")[0]
    leaves = [x, *parameters.values()]

    def call(x: torch.Tensor) -> torch.Tensor:
        return multi_head_attention(x, **parameters, num_heads=HEADS)

    want = torch.autograd.grad(call(x).square().sum(), leaves)
    y = torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(y.square().sum(), leaves), want, strict=True):
        assert torch.equal(a, b)


def test_empty_and_frozen() -> None:
    parameters = tensors(grad=False)
    assert multi_head_attention(torch.zeros(0, 3, WIDTH).double(), **parameters, num_heads=HEADS).shape == (
        0,
        3,
        WIDTH,
    )
    y = multi_head_attention(
        randn(2, 3, WIDTH), torch.zeros(2, 0, WIDTH).double(), **parameters, num_heads=HEADS
    )
    torch.testing.assert_close(y, parameters["out_proj_bias"].expand(2, 3, WIDTH), **EXACT)
    x = randn(2, 3, WIDTH, grad=True)  # only the input is trained
    multi_head_attention(x, **parameters, num_heads=HEADS).sum().backward()
    assert x.grad is not None


BAD = {
    "heads": ({"num_heads": 0}, ValueError, "num_heads must be >= 1, got 0"),
    "groups": ({"num_kv_heads": 3}, ValueError, "multiple of num_kv_heads 3, got 4"),
    "rank": (
        {"query": torch.zeros(3, WIDTH)},
        ValueError,
        r"query must be 3-D \[B, L, E\], got shape \[3, 32\]",
    ),
    "features": ({"query": torch.zeros(1, 3, 5)}, ValueError, r"query must have 32 features"),
    "rows": (
        {"in_proj_weight": torch.zeros(95, WIDTH)},
        ValueError,
        r"in_proj_weight must be \[12 \* head_dim, E\]",
    ),
    "two weights": (
        {"in_proj_weight": [torch.zeros(8, WIDTH)] * 2},
        ValueError,
        "one tensor or three, got 2",
    ),
    "bias": ({"in_proj_bias": torch.zeros(5)}, ValueError, r"in_proj_bias must have shape \[96\], got \[5\]"),
    "output": ({"out_proj_weight": torch.zeros(8, 8)}, ValueError, r"out_proj_weight must be \[E', 32\]"),
    "dtype": (
        {"out_proj_bias": torch.zeros(WIDTH).double()},
        TypeError,
        "query's dtype float32, got float64",
    ),
    "batch": ({"key": torch.zeros(3, 2, WIDTH)}, ValueError, "key must have query's batch size 2, got 3"),
    "length": (
        {"key": torch.zeros(2, 3, WIDTH), "value": torch.zeros(2, 4, WIDTH)},
        ValueError,
        "value must have key's length 3, got 4",
    ),
    "mask": (
        {"mask": torch.zeros(7, 7) > 0},
        ValueError,
        r"mask must broadcast to \[2, 4, 5, 5\], got \[7, 7\]",
    ),
    "flag": ({"need_weights": 1}, TypeError, "need_weights must be a bool, got int"),
}


@pytest.mark.parametrize(("change", "kind", "message"), BAD.values(), ids=BAD)
def test_errors(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = {"query": torch.zeros(2, 5, WIDTH), **tensors(dtype=torch.float32), "num_heads": HEADS, **change}
    with pytest.raises(kind, match=message):
        multi_head_attention(given.pop("query"), **given)

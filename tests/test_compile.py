"""torch.compile, export, fake tensors and opcheck: the ops mean what the eager calls mean."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from call_support import EXACT, NATIVE, grads, qkv, randn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn
from fastattn import autograd
from fastattn.backends import cpu
from fastattn.biases import ALiBi, RelativePosition
from fastattn.call import Call
from fastattn.lowering import DIFFERENTIABLE, lower
from fastattn.masks import blocks, causal, dense, documents, global_tokens, padding, predicate, prefix, window

pytestmark = pytest.mark.skipif(not NATIVE, reason="the native core is not built")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": -0.5, "softcap": 2.0},
    "causal": {"mask": causal()},
    "window": {"mask": window(3, 1, align="top_left") & causal()},
    "padding": {"mask": padding(torch.tensor([3, 2])) & causal()},
    "bool": {"mask": torch.tensor([True, False, True, True, True, False, True])},
    "dense": {"mask": dense(randn(2, 1, 5, 7) > 0) & causal()},
    "documents": {"mask": documents(torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[0, 1, 1, 1, 2, 2, 0]]))},
    "prefix": {"mask": causal() | prefix([2, 4])},
    "global": {"mask": window(1, 1) | global_tokens([0])},
    "not": {"mask": ~(causal() | prefix(1))},
    "blocks": {"mask": blocks(torch.tensor([[True, False], [True, True]]), 4)},
    "predicate": {"mask": predicate(lambda b, h, i, j: (i + j + h) % 2 == 0).build(5, 7, heads=4)},
    "built": {"mask": (causal() | prefix(2)).build(5, 7)},
    "part built": {"mask": ~((causal() | prefix(2)).build(5, 7) & causal())},
    "bias": {"bias": randn(4, 1, 7), "sinks": randn(4)},
    "alibi": {"bias": ALiBi(randn(4))},
    "relative": {"bias": RelativePosition(randn(8, 4))},
    "dropout": {"dropout_p": 0.4, "dropout_seed": torch.tensor([9])},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_compiled_forward_and_backward(options):
    def call(q, k, v):
        return fastattn.attention(q, k, v, return_lse=True, **options)

    inputs = qkv(2, 4, 2, 5, 7, 8, 6, grad=True)
    got, got_grads = grads(torch.compile(call, fullgraph=True, backend="aot_eager"), inputs)
    want, want_grads = grads(call, inputs)
    for a, b in zip(got + got_grads, want + want_grads, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
        assert a.stride() == b.stride()


def test_a_predicate_must_be_built_before_compiled_code():
    mask = predicate(lambda b, h, i, j: i >= j) | causal()
    compiled = torch.compile(
        lambda *t: fastattn.attention(*t, mask=mask), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"mask holds a predicate, .*: build it before"):
        compiled(*qkv(2, 4, 2, 5, 7))


def test_block_lists_inside_a_compiled_function_follow_their_values():
    @torch.compile(fullgraph=True, dynamic=True)
    def call(q, k, v, ids, left):
        mask = documents(ids) & (window(left, 0) | global_tokens([0]))
        return fastattn.attention(q, k, v, mask=mask)

    for length, left in ((150, 3), (200, 64), (131, 70)):
        inputs = qkv(3, 4, 2, length, grad=True)
        ids = torch.randint(0, 3, (3, length)).sort(-1).values
        got, got_grads = grads(partial(call, ids=ids, left=left), inputs)
        want, want_grads = grads(partial(call._torchdynamo_orig_callable, ids=ids, left=left), inputs)
        for a, b in zip(got + got_grads, want + want_grads, strict=True):
            torch.testing.assert_close(a, b, **EXACT)


def test_opcheck_of_block_lists():
    from fastattn import mask_ops
    from fastattn.masks import MaskShape

    ids = torch.tensor([[0] * 70 + [1] * 30, [0] * 20 + [1] * 80])
    for mask in (documents(ids), causal() | prefix([3]), ~(window(1, 1) | dense(torch.eye(100).bool()))):
        tensors, ints = [], []
        text = mask_ops._encode(mask, tensors, ints)
        arguments = (text, tensors, ints, 2, 4, 100, 100, None, None, torch.device("cpu"))
        torch.library.opcheck(torch.ops.fastattn.block_lists, arguments)
        lists = torch.ops.fastattn.block_lists(*arguments)
        want = mask.lower(MaskShape(2, 4, 100, 100)).block
        for a, b in zip(lists, mask_ops._fields(want), strict=True):
            assert torch.equal(a, b)


def test_masks_and_biases_as_inputs_of_a_compiled_function():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(q, k, v, mask, slopes, sinks, bias_table):
        out = fastattn.attention(q, k, v, mask=mask, bias=ALiBi(slopes), sinks=sinks)
        return out + fastattn.attention(q, k, v, mask=mask, bias=RelativePosition(bias_table))

    inputs = qkv(2, 4, 2, 5, 7, grad=True)
    learned = [randn(4, grad=True), randn(4, seed=3, grad=True), randn(8, 4, grad=True)]
    for mask in (causal(), padding(torch.tensor([3, 4])), (causal() | prefix(2)).build(5, 7)):
        results = []
        for f in (call, call._torchdynamo_orig_callable):
            out = f(*inputs, mask, *learned)
            results.append([out, *torch.autograd.grad(out.square().sum(), [*inputs, *learned])])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("name", ["plain", "causal", "dense", "alibi"])
def test_inductor(name):
    options = CASES[name]

    def call(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = fastattn.attention(q * 2, k + 1, v, **options)
        return out.transpose(1, 2).flatten(2).tanh()

    inputs = [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in qkv(2, 4, 2, 5, 7)]
    got, got_grads = grads(torch.compile(call, fullgraph=True), inputs)
    want, want_grads = grads(call, inputs)
    for a, b in zip(got + got_grads, want + want_grads, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_compiled_sdpa():
    def call(q, k, v):
        return fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)

    inputs = qkv(2, 4, 4, 5, 7, grad=True)
    got, got_grads = grads(torch.compile(call, fullgraph=True, backend="aot_eager"), inputs)
    want, want_grads = grads(call, inputs)
    for a, b in zip(got + got_grads, want + want_grads, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize(
    "options", [{}, {"mask": causal()}, {"bias": ALiBi(randn(4))}, {"softcap": 2.0}], ids=str
)
def test_dynamic_shapes(options):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *t: fastattn.attention(*t, **options), fullgraph=True, backend=counter, dynamic=True
    )
    for batch, seqlen_q, seqlen_k in ((3, 5, 7), (6, 4, 9), (5, 11, 11), (3, 70, 130)):
        inputs = qkv(batch, 4, 2, seqlen_q, seqlen_k, grad=True)
        got, got_grads = grads(compiled, inputs)
        want, want_grads = grads(lambda *t: fastattn.attention(*t, **options), inputs)
        for a, b in zip(got + got_grads, want + want_grads, strict=True):
            torch.testing.assert_close(a, b, **EXACT)
    assert counter.frame_count <= 2


def test_compiled_dropout_redraws_and_reseeds():
    compiled = torch.compile(lambda q, k, v: fastattn.attention(q, k, v, dropout_p=0.5), fullgraph=True)
    q, k, v = qkv(2, 4, 2, 32, 64, grad=True)
    torch.manual_seed(0)
    first = compiled(q, k, v)
    second = compiled(q, k, v)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, compiled(q, k, v))
    # The backward pass drops the same weights: the gradient of v is linear in the kept ones.
    (grad,) = torch.autograd.grad(first.sum(), v)
    torch.testing.assert_close((grad * v).sum(), first.sum(), **EXACT)


def test_compiled_packed_and_cached_calls():
    cu = torch.tensor([0, 2, 5, 5, 9], dtype=torch.int32)
    q, k, v = (randn(9, h, 8, seed=h, grad=True) for h in (4, 2, 2))

    def varlen(q, k, v):
        return fastattn.varlen_attention(q, k, v, cu, cu, mask=causal(), return_lse=True)

    got, got_grads = grads(torch.compile(varlen, fullgraph=True, backend="aot_eager"), [q, k, v])
    want, want_grads = grads(varlen, [q, k, v])
    for a, b in zip(got + got_grads, want + want_grads, strict=True):
        torch.testing.assert_close(a, b, **EXACT)

    q, k, v = qkv(2, 4, 2, 2, 16)
    decode = torch.compile(fastattn.decode_attention, fullgraph=True, backend="aot_eager")
    for lengths in ([3, 16], [7, 2]):
        lengths = torch.tensor(lengths)
        torch.testing.assert_close(
            decode(q, k, v, lengths), fastattn.decode_attention(q, k, v, lengths), rtol=0, atol=0
        )
    with pytest.raises(ValueError, match="lengths must be between 0 and the capacity 16, got 17"):
        decode(q, k, v, torch.tensor([3, 17]))


def test_compiled_torch_backend():
    def call(q, k, v):
        return fastattn.attention(q, k, v, mask=causal(), backend="torch")

    inputs = qkv(2, 4, 2, 5, 7, grad=True)
    got, got_grads = grads(torch.compile(call, fullgraph=True, backend="aot_eager"), inputs)
    want, want_grads = grads(call, inputs)
    for a, b in zip(got + got_grads, want + want_grads, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


class Attend(torch.nn.Module):
    def forward(self, q, k, v):
        return fastattn.attention(q, k, v, mask=causal() & padding([4, 7]), bias=ALiBi(torch.ones(4)))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, tmp_path):
    inputs = tuple(qkv(2, 4, 2, 5, 7, dtype=torch.float32))
    length = torch.export.Dim("length", min=2, max=512)
    shapes = ({2: length}, {2: torch.export.Dim.AUTO}, {2: torch.export.Dim.AUTO})
    program = torch.export.export(Attend(), inputs, dynamic_shapes=shapes, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert "fastattn.attention_forward.default" in targets
    torch.export.save(program, tmp_path / "attend.pt2")
    loaded = torch.export.load(tmp_path / "attend.pt2").module()
    for lengths in ((5, 7), (13, 9)):
        inputs = tuple(qkv(2, 4, 2, *lengths, dtype=torch.float32))
        torch.testing.assert_close(loaded(*inputs), Attend()(*inputs), rtol=0, atol=0)


def _op_arguments(op: str, inputs: list[torch.Tensor], **options: Any) -> tuple[Any, ...]:
    call = Call(op, *inputs)
    for name, value in options.items():
        setattr(call, name, value)
    operands, params = lower(call)
    from fastattn import ops

    return cpu.name, *inputs, *operands, *ops._flat(params)


OPCHECKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": causal(), "softcap": 2.0},
    "ranges": {"mask": padding([3, 2], [0, 1])},
    "bool": {"mask": randn(5, 7) > 0},
    "built": {"mask": (causal() | prefix(2)).build(5, 7)},
    "bias": {"bias": randn(4, 1, 7, grad=True), "sinks": randn(4, grad=True)},
    "alibi": {"bias": ALiBi(randn(4, grad=True))},
    "dropout": {"dropout_p": 0.4, "dropout_seed": torch.tensor([9])},
}


@pytest.mark.parametrize("options", OPCHECKS.values(), ids=OPCHECKS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(options, layout):
    inputs = qkv(2, 4, 2, 5, 7, 8, 6)
    if layout == "transposed":
        inputs = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]
    inputs = [t.requires_grad_() for t in inputs]
    torch.library.opcheck(torch.ops.fastattn.attention_forward, _op_arguments("attention", inputs, **options))


def test_opcheck_of_packed_and_cached_calls():
    cu = torch.tensor([0, 2, 5, 5, 9], dtype=torch.int32)
    inputs = [randn(9, h, 8, seed=h, grad=True) for h in (4, 2, 2)]
    arguments = _op_arguments(
        "varlen", inputs, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=4, max_seqlen_k=4, mask=causal()
    )
    torch.library.opcheck(torch.ops.fastattn.attention_forward, arguments)
    inputs = qkv(2, 4, 2, 1, 16, grad=True)
    arguments = _op_arguments("decode", inputs, lengths=torch.tensor([3, 16]))
    torch.library.opcheck(torch.ops.fastattn.attention_forward, arguments)
    pages = [inputs[0].detach(), randn(6, 2, 4, 8), randn(6, 2, 4, 8)]
    table = torch.tensor([[5, 0, 1, 2], [3, 4, 0, 1]], dtype=torch.int32)
    arguments = _op_arguments("decode", pages, lengths=torch.tensor([3, 16]), block_table=table)
    torch.library.opcheck(torch.ops.fastattn.attention_forward, arguments)


@pytest.mark.parametrize("options", OPCHECKS.values(), ids=OPCHECKS)
def test_opcheck_of_the_backward_op(options):
    inputs = [t.detach() for t in qkv(2, 4, 2, 5, 7, 8, 6)]
    backend, *rest = _op_arguments("attention", inputs, **options)
    rest = [t.detach() if isinstance(t, torch.Tensor) else t for t in rest]
    out, lse = torch.ops.fastattn.attention_forward(backend, *rest)
    grads = [randn(*out.shape), randn(*lse.shape)]
    needs = [True] * 3 + [rest[3 + n] is not None for n in range(DIFFERENTIABLE)]
    torch.library.opcheck(
        torch.ops.fastattn.attention_backward, (backend, *rest[:3], out, lse, *grads, *rest[3:], needs)
    )


@pytest.mark.parametrize("head_dim_v", [8, 6])
@pytest.mark.parametrize("layout", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 2, 0, 3)], ids=str)
def test_fake_tensors_have_the_real_shapes_and_strides(layout, head_dim_v):
    order = [layout.index(n) for n in range(4)]
    inputs = [
        t.permute(layout).contiguous().permute(order).requires_grad_()
        for t in qkv(2, 4, 2, 5, 7, 8, head_dim_v)
    ]
    real = fastattn.attention(*inputs, return_lse=True)
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t.detach()).requires_grad_() for t in inputs]
    with mode:
        fake = fastattn.attention(*fakes, return_lse=True)
        fake_grads = torch.autograd.grad(fake[0].sum(), fakes)
    real_grads = torch.autograd.grad(real[0].sum(), inputs)
    for a, b in zip([*fake, *fake_grads], [*real, *real_grads], strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_double_backward_through_the_op_points_to_the_reference():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watcher(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    q, k, v = qkv(1, 2, 2, 3, grad=True)
    with Watcher():
        out = fastattn.attention(q, k, v)
        (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError) as raised:
            torch.autograd.grad(grad.sum(), q)
    assert str(raised.value) == autograd.DOUBLE_BACKWARD


def test_autocast_inside_a_compiled_function():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fastattn.attention(q, k, v)

    q, k, v = qkv(2, 4, 2, 5, 7, dtype=torch.float32)
    out = call(q, k, v)
    assert out.dtype == torch.bfloat16
    want = fastattn.attention(*(t.bfloat16() for t in (q, k, v)))
    torch.testing.assert_close(out, want, rtol=0, atol=0)


def test_errors_inside_a_compiled_function():
    compiled = torch.compile(fastattn.attention, backend="aot_eager")
    q, k, v = qkv(2, 4, 2, 5, 7)
    with pytest.raises(ValueError, match="k must have q's head_dim 8, got 7"):
        compiled(q, k[..., :7], v)

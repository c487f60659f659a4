"""The public calls: shapes, dtypes, strides, dispatch, and agreement with PyTorch's call."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from call_support import EXACT, NATIVE, qkv, randn, same_as_reference

import fastattn
from fastattn import dispatch
from fastattn.masks import causal, padding, window

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}
BACKENDS = ["cpu", "torch", "reference"] if NATIVE else ["torch", "reference"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_every_dtype(dtype, backend):
    q, k, v = qkv(2, 4, 2, 9, 13, 16, 24, dtype=dtype)
    out = fastattn.attention(q, k, v, backend=backend)
    want = fastattn.attention(q.double(), k.double(), v.double(), backend="reference")
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse_dtype_and_value(dtype):
    q, k, v = qkv(2, 4, 2, 9, 13, 16, dtype=dtype)
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    scores = q.double() @ k.double().repeat_interleave(2, 1).mT / 4
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=1e-4)
    if NATIVE:
        torch.testing.assert_close(out, fastattn.attention(q, k, v), rtol=0, atol=0)


@pytest.mark.parametrize("options", [
    {},
    {"scale": 0.3},
    {"scale": -0.7},
    {"scale": 0.0},
    {"scale": 2},
    {"softcap": 2.5},
    {"mask": causal()},
    {"mask": causal(align="top_left")},
    {"mask": window(2, 1)},
    {"mask": padding(torch.tensor([3, 0]))},
    {"mask": causal() & padding(torch.tensor([6, 2]))},
    {"mask": window(1, 1) | causal()},
    {"mask": torch.tensor([True, False, True, True, True, False, True])},
    {"bias": randn(5, 7)},
    {"bias": randn(2, 1, 1, 7)},
    {"sinks": randn(4)},
    {"return_lse": True},
    {"dropout_p": 0.4, "dropout_seed": torch.tensor([77])},
    {"return_lse": True, "softcap": 3.0, "sinks": randn(4), "mask": causal(), "bias": randn(4, 1, 7)},
], ids="-".join)  # fmt: skip
def test_options_and_gradients_against_reference(options):
    same_as_reference(qkv(2, 4, 2, 5, 7, 8, 6, grad=True), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 4, 3, 0), (2, 0, 3, 3)], ids=str)
def test_empty_tensors(shape, backend):
    batch, heads, seqlen_q, seqlen_k = shape
    q, k, v = qkv(batch, heads, heads, seqlen_q, seqlen_k, 8, 5, grad=True)
    out = fastattn.attention(q, k, v, backend=backend)
    assert out.shape == (batch, heads, seqlen_q, 5)
    assert out.count_nonzero() == 0
    for grad, tensor in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert grad.shape == tensor.shape
        assert grad.count_nonzero() == 0


@pytest.mark.parametrize(
    "sinks", [None, torch.tensor([1.5, -2.0], dtype=torch.float64)], ids=["plain", "sinks"]
)
def test_lse_without_keys_is_the_sink(sinks):
    q, k, v = qkv(1, 2, 2, 3, 0)
    sinks = None if sinks is None else sinks.clone().requires_grad_()
    _, lse = fastattn.attention(q, k, v, sinks=sinks, return_lse=True)
    want = torch.full((2,), -torch.inf, dtype=torch.float64) if sinks is None else sinks
    torch.testing.assert_close(lse, want.view(1, 2, 1).expand(1, 2, 3), rtol=0, atol=0)
    if sinks is not None:
        torch.testing.assert_close(torch.autograd.grad(lse.sum(), sinks)[0], torch.full_like(sinks, 3.0))


@pytest.mark.parametrize("widths", [(0, 4), (4, 0), (0, 0)], ids=str)
def test_zero_width_heads(widths):
    q, k, v = qkv(1, 2, 2, 3, 5, *widths, grad=True)
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    assert out.shape == (1, 2, 3, widths[1])
    if widths[0] == 0:
        torch.testing.assert_close(lse, torch.full_like(lse, 5).log(), **EXACT)
        torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), **EXACT)
    for grad, tensor in zip(torch.autograd.grad(lse.sum() + out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert grad.shape == tensor.shape


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("head_dim_v", [16, 8])
def test_out_has_the_stride_order_of_q(head_dim_v, grad):
    packed = randn(2, 9, 4, 16, grad=grad)
    q = packed.transpose(1, 2)
    k, v = randn(2, 4, 7, 16), randn(2, 4, 7, head_dim_v)
    out = fastattn.attention(q, k, v)
    assert out.transpose(1, 2).is_contiguous()
    assert fastattn.attention(q.contiguous(), k, v).is_contiguous()
    torch.testing.assert_close(out, fastattn.attention(q.contiguous(), k, v), rtol=0, atol=0)


def test_a_packed_projection_is_taken_without_a_copy():
    q, k, v = randn(2, 9, 3, 4, 16).unbind(2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = fastattn.attention(q, k, v)
    torch.testing.assert_close(
        out, fastattn.attention(q.clone(), k.clone(), v.clone(), backend="reference"), **EXACT
    )
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded_and_strided_inputs(dim):
    q, k, v = qkv(2, 2, 2, 6, 6, 8, grad=True)
    views = [t.select(dim, 0).unsqueeze(dim).expand_as(t) for t in (q, k, v)]
    want = fastattn.attention(*(t.contiguous() for t in views), backend="reference")
    torch.testing.assert_close(fastattn.attention(*views), want, **EXACT)
    same_as_reference(
        [q, k, v], lambda q, k, v, **o: fastattn.attention(q.mT.mT, k.flip(2), v[..., ::2], **o)
    )


def test_last_dimension_of_one_element_with_any_stride():
    q = randn(2, 3, 4, 7)[..., :1]
    k, v = randn(2, 3, 5, 7)[..., 2:3], randn(2, 3, 5, 7)[..., 4:5]
    want = fastattn.attention(q.clone(), k.clone(), v.clone(), backend="reference")
    torch.testing.assert_close(fastattn.attention(q, k, v), want, **EXACT)
    strange = [t.clone().as_strided(t.shape, (t.shape[1] * t.shape[2], t.shape[2], 1, 3)) for t in (q, k, v)]
    torch.testing.assert_close(fastattn.attention(*strange), want, **EXACT)


def test_inference_mode_and_parameters():
    q, k, v = qkv()
    want = fastattn.attention(q, k, v, backend="reference")
    with torch.inference_mode():
        torch.testing.assert_close(fastattn.attention(q, k, v), want, **EXACT)
        torch.testing.assert_close(fastattn.attention(q, k, v, mask=torch.ones(5, 5).bool()), want, **EXACT)
    out = fastattn.attention(torch.nn.Parameter(q), k, v)
    assert out.requires_grad
    torch.testing.assert_close(out, want, **EXACT)


def test_dropout_needs_a_seed_only_between_0_and_1():
    q, k, v = qkv(grad=True)
    state = torch.get_rng_state()
    torch.testing.assert_close(
        fastattn.attention(q, k, v, dropout_p=0.0), fastattn.attention(q, k, v), rtol=0, atol=0
    )
    out, lse = fastattn.attention(q, k, v, dropout_p=1.0, return_lse=True)
    assert out.count_nonzero() == 0
    torch.testing.assert_close(lse, fastattn.attention(q, k, v, return_lse=True)[1], rtol=0, atol=0)
    assert all(g.count_nonzero() == 0 for g in torch.autograd.grad(out.sum(), (q, k, v)))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(3)
    first = fastattn.attention(q, k, v, dropout_p=0.5)
    assert not torch.equal(first, fastattn.attention(q, k, v, dropout_p=0.5))
    torch.manual_seed(3)
    assert torch.equal(first, fastattn.attention(q, k, v, dropout_p=0.5))


def test_dropout_keeps_the_elements_that_the_design_names():
    p, seed = 0.3, torch.tensor([0x0123456789ABCDEF])
    q, k, _ = qkv(2, 3, 3, 5, 70)
    v = torch.eye(70, dtype=torch.float64).expand(2, 3, 70, 70)
    kept = fastattn.attention(q, k, v, dropout_p=p, dropout_seed=seed) != 0
    from fastattn.testing import dropout_mask

    assert torch.equal(kept, dropout_mask(seed, 2, 3, 5, 70, p, "cpu").expand_as(kept))


def test_explain_prints_every_backend():
    q, k, v = qkv(1, 8, 2, 5)
    choice = fastattn.explain(q, k, v, mask=causal(), softcap=3.0)
    assert choice.backend == ("cpu" if NATIVE else "reference")
    assert list(choice.reasons) == ["cuda", "triton", "cpu", "torch", "reference"]
    assert choice.reasons["torch"] == "PyTorch has no softcap"
    text = str(choice)
    assert "attention(q=1x8x5x8, k=1x2x5x8, float64 on cpu" in text
    assert "softcap=3.0, mask=causal()" in text
    assert "torch      cannot: PyTorch has no softcap" in text


def test_explain_of_packed_and_cached_calls():
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    q = randn(5, 4, 8)
    choice = fastattn.explain(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert choice.spec.op == "varlen"
    assert (choice.spec.batch, choice.spec.seqlen_q) == (2, 3)
    q, k, v = qkv(2, 4, 2, 1, 16)
    choice = fastattn.explain(q, k, v, lengths=torch.tensor([3, 16]), scale=1.0)
    assert choice.spec.op == "decode"
    assert choice.reasons["torch"] == "PyTorch has no decode call"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lengths": torch.tensor([-3, 99])}, ValueError, "lengths must be between 0 and the capacity 16"),
        ({"block_table": torch.zeros(2, 1, dtype=torch.int32)}, TypeError, "lengths must be a torch.Tensor"),
        ({"is_causal": True}, TypeError, r"explain\(\) got an unexpected keyword argument 'is_causal'"),
        ({"op": "varlen"}, TypeError, r"explain\(\) got an unexpected keyword argument 'op'"),
    ],
    ids=["lengths", "table alone", "unknown", "internal"],
)
def test_explain_raises_as_the_call_would(options, error, message):
    with pytest.raises(error, match=message):
        fastattn.explain(*qkv(2, 4, 2, 1, 16), **options)


def test_specs_are_values():
    q, k, v = qkv()
    first, second = (fastattn.explain(q, k, v, dropout_p=0.5).spec for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert first != fastattn.explain(q, k, v).spec
    with pytest.raises(AttributeError):
        first.batch = 3


def test_environment_forces_a_backend(monkeypatch):
    q, k, v = qkv()
    monkeypatch.setenv("FASTATTN_BACKEND", "torch")
    assert fastattn.explain(q, k, v).backend == "torch"
    with pytest.raises(NotImplementedError, match="PyTorch has no softcap; PyTorch does not return lse"):
        fastattn.attention(q, k, v, softcap=1.0, return_lse=True)
    assert fastattn.explain(q, k, v, backend="reference").backend == "reference"
    monkeypatch.setenv("FASTATTN_BACKEND", "")
    assert fastattn.explain(q, k, v).forced is None


@pytest.mark.parametrize("size", [2**31, 2**63, 2**70])
def test_windows_wider_than_any_length(size):
    q, k, v = qkv(1, 2, 2, 5, 7)
    for mask in (
        window(size, 0),
        window(None, 0) & window(size, size, align="top_left"),
        ~window(None, size) | causal(),
    ):
        torch.testing.assert_close(
            fastattn.attention(q, k, v, mask=mask), fastattn.attention(q, k, v, mask=causal()), rtol=0, atol=0
        )


@pytest.mark.skipif(not NATIVE, reason="the native core is not built")
def test_an_unknown_instruction_set_raises_in_calls_and_explanations():
    code = """
import fastattn, torch
q = torch.randn(1, 1, 2, 8)
for call in (fastattn.attention, fastattn.explain):
    try:
        call(q, q, q)
    except ValueError as error:
        print(error)
"""
    environment = {**os.environ, "FASTATTN_CPU_ISA": "fast"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("FASTATTN_CPU_ISA must be one of") for line in lines)


def test_a_fall_to_the_reference_warns_once(monkeypatch):
    monkeypatch.setattr(fastattn.backends.cpu, "_missing", "it is hidden by this test")
    monkeypatch.setattr(fastattn.backends.cpu, "_C", None)
    monkeypatch.setattr(dispatch, "_warned", set())
    q, k, v = qkv()
    with pytest.warns(UserWarning, match="slow reference implementation .*cpu: it is hidden by this test"):
        fastattn.attention(q, k, v, softcap=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastattn.attention(q, k, v, softcap=1.0)
        assert fastattn.explain(q, k, v).backend == "torch"
        fastattn.attention(q, k, v)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(6, 6), (4, 7), (7, 4)], ids=str)
def test_sdpa_as_torch(lengths, is_causal):
    q, k, v = qkv(2, 4, 4, *lengths, 8, 8)
    got = fastattn.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, is_causal=is_causal), **EXACT)


SHAPES = {
    "2-D": ((5, 8), (7, 8), (7, 6), (5, 7)),
    "3-D": ((3, 5, 8), (3, 7, 8), (3, 7, 6), (3, 5, 7)),
    "3-D broadcast": ((3, 5, 8), (1, 7, 8), (3, 7, 6), (1, 5, 7)),
    "4-D": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6), (2, 1, 5, 7)),
    "one head of keys": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6), (3, 1, 7)),
    "one head of queries": ((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6), (7,)),
    "heads of keys and values": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 3, 7, 6), (5, 1)),
    "broadcast batch": ((2, 3, 5, 8), (1, 3, 7, 8), (2, 3, 7, 6), (2, 3, 5, 7)),
    "5-D": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6), (2, 1, 1, 5, 7)),
    "5-D shared mask": ((2, 3, 4, 5, 8), (2, 1, 4, 7, 8), (2, 3, 4, 7, 6), (4, 5, 7)),
    "mixed": ((2, 3, 5, 8), (3, 7, 8), (7, 6), (5, 7)),
}


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_sdpa_of_any_shape(shapes, mask):
    q, k, v, attn_mask = (randn(*shape, seed=n) for n, shape in enumerate(shapes))
    attn_mask = None if mask is None else (attn_mask > -0.5 if mask == "bool" else attn_mask)
    got = fastattn.scaled_dot_product_attention(q, k, v, attn_mask)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, attn_mask), **EXACT)


@pytest.mark.parametrize("heads", [(4, 2, 2), (4, 1, 1), (4, 2, 4), (6, 2, 3)], ids=str)
def test_sdpa_with_grouped_heads(heads):
    q, k, v = (randn(2, h, 5, 8, seed=n) for n, h in enumerate(heads))
    got = fastattn.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    repeat = (t.repeat_interleave(heads[0] // t.shape[1], 1) for t in (k, v))
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, *repeat), **EXACT)


@pytest.mark.parametrize("lengths", [(5, 7), (7, 5)], ids=str)
def test_sdpa_with_causal_bias_objects(lengths):
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    q, k, v = qkv(2, 3, 3, *lengths)
    got = fastattn.scaled_dot_product_attention(q, k, v, causal_upper_left(*lengths))
    torch.testing.assert_close(
        got, fastattn.attention(q, k, v, mask=causal(align="top_left")), rtol=0, atol=0
    )
    got = fastattn.scaled_dot_product_attention(q, k, v, causal_lower_right(*lengths))
    torch.testing.assert_close(got, fastattn.attention(q, k, v, mask=causal()), rtol=0, atol=0)


@pytest.mark.skipif(not NATIVE, reason="the native core is not built")
def test_sdpa_differs_where_it_should():
    q, k, v = qkv(1, 1, 1, 4)
    got = fastattn.scaled_dot_product_attention(q, k, v, is_causal=True, scale=-1.0)
    assert got.isfinite().all()
    k[0, 0, 3], v[0, 0, 3] = torch.nan, torch.nan
    got = fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert got[0, 0, :3].isfinite().all()
    assert got[0, 0, 3].isnan().all()


class Tagged(torch.Tensor):
    """A subclass with PyTorch's default __torch_function__."""


def test_subclasses_and_function_modes_see_the_calls():
    q, k, v = qkv()
    tagged = q.as_subclass(Tagged)
    assert type(fastattn.attention(tagged, k, v)) is Tagged
    assert type(fastattn.scaled_dot_product_attention(tagged, k, v)) is Tagged

    seen = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Recorder():
        fastattn.attention(q, k, v)
        fastattn.scaled_dot_product_attention(q, k, v)
    assert fastattn.attention in seen
    assert fastattn.scaled_dot_product_attention in seen


def test_dispatch_modes_see_an_op():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    q, k, v = qkv(grad=True)
    with Recorder():
        fastattn.attention(q, k, v).sum().backward()
    if NATIVE:
        assert torch.ops.fastattn.attention_forward.default in seen
        assert torch.ops.fastattn.attention_backward.default in seen


def test_import_is_light():
    code = "import sys, fastattn; print([m for m in ('triton', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", fastattn.__all__)
def test_everything_named_is_there(name):
    assert getattr(fastattn, name) is not None

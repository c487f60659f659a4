"""fastattn.scaled_dot_product_attention rule by rule: those shared with torch, and where ours differ."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sdpa_support import NAMES, Call, eager, sdpa, torch_math
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode

import fastattn
from fastattn.spec import FLOAT_DTYPES

DTYPES = sorted(FLOAT_DTYPES, key=str)


# Rules that we share with torch


def qkv(
    seqlen_q: int = 5,
    seqlen_k: int = 7,
    *lead: int,
    heads_kv: int | None = None,
    dim: int = 8,
    dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    lead = lead or (2, 4)
    lead_kv = lead if heads_kv is None else (*lead[:-1], heads_kv)
    generator = torch.Generator().manual_seed(0)
    shapes = ((*lead, seqlen_q, dim), (*lead_kv, seqlen_k, dim), (*lead_kv, seqlen_k, dim_v or dim))
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in zip(NAMES, shapes, strict=False)}


def same_as_torch(dtype: torch.dtype = torch.float32, **arguments: Any) -> dict[str, Tensor]:
    """Ours and torch's math path agree, out and all gradients; returns ours."""
    call = Call(arguments)
    got = call.results(sdpa)
    want = call.to(torch.float64).results(torch_math)
    tolerance = 64 * torch.finfo(dtype).eps
    for name, value in want.items():
        torch.testing.assert_close(
            got[name].double(), value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    return got


@pytest.mark.parametrize("lengths", [(5, 7), (7, 5), (1, 6), (6, 1), (65, 130)], ids=str)
def test_causal_is_top_left(lengths):
    same_as_torch(**qkv(*lengths), is_causal=True)
    arguments = {**qkv(*lengths), "attn_mask": causal_upper_left(*lengths)}
    torch.testing.assert_close(sdpa(**arguments), sdpa(**qkv(*lengths), is_causal=True), rtol=0, atol=0)


@pytest.mark.parametrize("lengths", [(5, 7), (7, 5), (65, 130)], ids=str)
def test_causal_lower_right(lengths):
    arguments = qkv(*lengths)
    got = sdpa(**arguments, attn_mask=causal_lower_right(*lengths))
    torch.testing.assert_close(
        got, F.scaled_dot_product_attention(**arguments, attn_mask=causal_lower_right(*lengths))
    )
    nothing_visible = max(lengths[0] - lengths[1], 0)
    assert (got[..., :nothing_visible, :] == 0).all()
    assert (got[..., nothing_visible:, :] != 0).all()


def test_causal_bias_of_other_lengths():
    with pytest.raises(ValueError, match=r"attn_mask must be for lengths \[5, 7\], got \[4, 7\]"):
        sdpa(**qkv(), attn_mask=causal_lower_right(4, 7))


MASK_SHAPES = [(5, 7), (1, 7), (5, 1), (4, 5, 7), (2, 1, 5, 7), (2, 4, 1, 7), (2, 1, 1, 7), (7,)]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_bool_mask(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    same_as_torch(**qkv(), attn_mask=mask)


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_float_mask_and_its_gradient(shape):
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert "dattn_mask" in same_as_torch(**qkv(), attn_mask=mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_query_takes_its_own_dtype_and_float32_as_mask(dtype):
    mask = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    for mask_dtype in (dtype, torch.float32):
        arguments = {**qkv(dtype=dtype), "attn_mask": mask.to(mask_dtype)}
        want = F.scaled_dot_product_attention(**arguments)
        got = sdpa(**arguments)
        assert got.dtype == want.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got, want, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float64, torch.float16], ids=str)
def test_mask_dtypes_that_torch_rejects_too(dtype):
    arguments = {**qkv(), "attn_mask": torch.ones(5, 7, dtype=dtype)}
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(**arguments)
    with pytest.raises(TypeError, match=f"attn_mask must be one of bool, float32, got {str(dtype)[6:]}"):
        sdpa(**arguments)


@pytest.mark.parametrize("is_bool", [True, False])
def test_rows_that_see_nothing(is_bool):
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    arguments = {**qkv(), "attn_mask": mask if is_bool else torch.zeros(5, 7).masked_fill(~mask, -math.inf)}
    got = Call(arguments).results(sdpa)
    want = Call(arguments).results(F.scaled_dot_product_attention)
    assert (got["out"][..., 2, :] == 0).all()
    assert (got["dquery"][..., 2, :] == 0).all()
    for name, value in got.items():
        assert value.isfinite().all()
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_the_most_negative_number_is_not_masked(dtype):
    """finfo.min is a number, not a mask: where scores are lost in it, all keys weigh the same."""
    mask = torch.zeros(5, 7, dtype=dtype)
    mask[2] = torch.finfo(dtype).min
    arguments = {**qkv(dtype=dtype), "attn_mask": mask}
    got = sdpa(**arguments)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(got, F.scaled_dot_product_attention(**arguments), **tolerance)
    if dtype != torch.float16:  # whose lowest number, -65504, loses little of a score in float32
        torch.testing.assert_close(got[..., 2, :], arguments["value"].mean(-2), **tolerance)


def test_gradients_where_a_row_is_of_the_most_negative_number():
    mask = torch.zeros(5, 7)
    mask[2] = torch.finfo(torch.float32).min
    arguments = {**qkv(), "attn_mask": mask}
    got, want = Call(arguments).results(sdpa), Call(arguments).results(torch_math)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)


SHAPES = {
    "2-D": [(5, 8), (7, 8), (7, 6)],
    "3-D": [(4, 5, 8), (4, 7, 8), (4, 7, 6)],
    "5-D": [(2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6)],
    "broadcast batch of keys": [(3, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 8)],
    "broadcast heads of keys": [(3, 4, 5, 8), (3, 1, 7, 8), (3, 1, 7, 8)],
    "broadcast value": [(3, 4, 5, 8), (3, 4, 7, 8), (1, 1, 7, 8)],
    "broadcast query": [(1, 1, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8)],
    "3-D query, 4-D keys": [(4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8)],
    "no batch entries": [(0, 4, 5, 8), (0, 4, 7, 8), (0, 4, 7, 8)],
    "no queries": [(2, 4, 0, 8), (2, 4, 7, 8), (2, 4, 7, 8)],
    "Ev > E": [(2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 24)],
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shapes, is_causal):
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(s, generator=generator) for n, s in zip(NAMES, shapes, strict=False)}
    same_as_torch(**tensors, is_causal=is_causal)


def test_mask_of_more_dimensions():
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(2, 3, 4, 5, 8, generator=generator) for n in NAMES[:3]}
    for shape in ((5, 5), (4, 5, 5), (3, 1, 5, 5), (2, 1, 1, 5, 5), (2, 3, 4, 1, 5)):
        same_as_torch(**tensors, attn_mask=torch.randn(shape, generator=generator))
        same_as_torch(**tensors, attn_mask=torch.rand(shape, generator=generator) > 0.3)


def test_no_keys():
    arguments = qkv(5, 0)
    got = Call(arguments).results(sdpa)
    assert got["out"].shape == (2, 4, 5, 8)
    assert all((value == 0).all() for value in got.values())


@pytest.mark.parametrize("heads_kv", [1, 2, 4])
def test_gqa(heads_kv):
    got = same_as_torch(**qkv(heads_kv=heads_kv), enable_gqa=True, is_causal=True)
    assert got["dkey"].shape[1] == heads_kv


def test_head_counts_without_gqa():
    with pytest.raises(
        ValueError, match=r"head counts that are equal or 1, or enable_gqa=True, got 4, 2 and 2"
    ):
        sdpa(**qkv(heads_kv=2))


@pytest.mark.parametrize("scale", [0.3, 2.0, 0.0, -0.7])
def test_scale(scale):
    same_as_torch(**qkv(), scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    arguments = qkv()
    with torch.autocast("cpu", dtype):
        got, want = (
            sdpa(**arguments, is_causal=True),
            F.scaled_dot_product_attention(**arguments, is_causal=True),
        )
    assert got.dtype == want.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=2 * eps, atol=2 * eps)


def test_strides_of_the_query_are_kept():
    transposed = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in qkv(64, 64, dim=32).items()}
    got, want = sdpa(**transposed), F.scaled_dot_product_attention(**transposed)
    assert got.stride() == want.stride() == transposed["query"].stride()


def test_positional_arguments_are_in_order():
    arguments = qkv()
    query, key, value = arguments.values()
    mask = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    got = sdpa(query, key, value, mask, 0.0, False)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(query, key, value, mask, 0.0, False))
    everything = {"attn_mask": None, "dropout_p": 0.0, "is_causal": True, "scale": 0.5, "enable_gqa": True}
    torch.testing.assert_close(
        sdpa(**arguments, **everything), F.scaled_dot_product_attention(**arguments, **everything)
    )


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_backend_can_be_forced(is_causal):
    for backend in ("torch", "reference"):
        got = sdpa(**qkv(), is_causal=is_causal, backend=backend)
        mask = fastattn.masks.causal(align="top_left") if is_causal else None
        assert torch.equal(got, fastattn.attention(*qkv().values(), mask=mask, backend=backend))
    with pytest.raises(
        NotImplementedError, match=r"backend 'torch' cannot run .*: PyTorch drops other elements"
    ):
        sdpa(**qkv(), is_causal=is_causal, dropout_p=0.5, backend="torch")


def test_torch_function_modes_see_the_call():
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        sdpa(**qkv())
    assert sdpa in seen


# Deliberate differences


def test_mask_with_is_causal_raises():
    with pytest.raises(ValueError, match="attn_mask must be None with is_causal=True"):
        sdpa(**qkv(), attn_mask=torch.zeros(5, 7), is_causal=True)


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("which", ["key", "value"])
def test_non_finite_values_reach_only_rows_that_see_them(which, poison):
    arguments = qkv()
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[:3, 4] = False
    clean = Call({**arguments, "attn_mask": mask}).results(sdpa)
    poisoned = {**arguments, which: arguments[which].clone()}
    poisoned[which][..., 4, :] = poison
    got = Call({**poisoned, "attn_mask": mask}).results(sdpa)
    torch.testing.assert_close(got["out"][..., :3, :], clean["out"][..., :3, :])
    torch.testing.assert_close(got["dquery"][..., :3, :], clean["dquery"][..., :3, :])
    assert not got["out"][..., 3:, :].isfinite().any()
    if math.isnan(poison):
        assert got["out"][..., 3:, :].isnan().all()
    hidden = torch.ones(5, 7, dtype=torch.bool)
    hidden[:, 4] = False
    for value in Call({**poisoned, "attn_mask": hidden}).results(sdpa).values():
        assert value.isfinite().all()


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_causal_with_a_scale_that_is_not_positive(scale):
    arguments = {**qkv(70, 70), "is_causal": True, "scale": scale}
    got, want = Call(arguments).results(sdpa), Call(arguments).results(eager)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


def test_dropout_drops_with_torchs_probability_and_follows_the_seed():
    """With value = identity the output is the matrix of weights, so what was dropped can be counted."""
    length, p = 256, 0.3
    arguments = qkv(length, length, 2, 2, dim=16, dim_v=length)
    arguments["value"] = torch.eye(length).expand(2, 2, length, length)
    weights = sdpa(**arguments)
    torch.manual_seed(0)
    first, second = sdpa(**arguments, dropout_p=p), sdpa(**arguments, dropout_p=p)
    torch.manual_seed(0)
    again = sdpa(**arguments, dropout_p=p)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    kept = first != 0
    torch.testing.assert_close(first, torch.where(kept, weights / (1 - p), 0))
    sigma = math.sqrt(p * (1 - p) / kept.numel())
    assert abs((~kept).double().mean() - p) < 5 * sigma
    both_dropped = (~kept & (second == 0)).double().mean()
    assert abs(both_dropped - p * p) < 5 * math.sqrt(p**2 * (1 - p**2) / kept.numel())


def test_dropout_of_everything_and_of_nothing():
    arguments = qkv()
    assert (sdpa(**arguments, dropout_p=1.0) == 0).all()
    state = torch.get_rng_state()
    torch.testing.assert_close(sdpa(**arguments, dropout_p=0.0), sdpa(**arguments))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"dropout_p must be between 0 and 1, got 1\.5"):
        sdpa(**arguments, dropout_p=1.5)


def test_no_double_backward_but_in_the_reference():
    arguments = qkv(3, 3, 1, 1, dim=2, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in arguments.values()]
    with pytest.raises((NotImplementedError, RuntimeError), match="backend='reference'"):
        (grad,) = torch.autograd.grad(sdpa(*leaves).sin().sum(), leaves[0], create_graph=True)
        grad.sum().backward()
    assert torch.autograd.gradgradcheck(lambda *t: sdpa(*t, is_causal=True, backend="reference"), leaves)


def test_no_forward_mode_but_in_the_reference():
    arguments = qkv(3, 3, 1, 1, dim=2, dtype=torch.float64)
    query, key, value = arguments.values()

    def derivative(backend: str | None) -> Tensor:
        function = lambda q: sdpa(q, key, value, backend=backend)  # noqa: E731
        return torch.func.jvp(function, (query,), (torch.ones_like(query),))[1]

    with pytest.raises((NotImplementedError, RuntimeError), match="backend='reference'"):
        derivative(None)
    step = 1e-6
    want = (sdpa(query + step, key, value) - sdpa(query - step, key, value)) / (2 * step)
    torch.testing.assert_close(derivative("reference"), want, rtol=1e-6, atol=1e-6)

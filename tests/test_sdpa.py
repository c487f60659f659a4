"""fastattn.scaled_dot_product_attention against torch's on each sample of its op database."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from sdpa_support import NAMES, Call, eager, sdpa, torch_math

from fastattn.spec import FLOAT_DTYPES
from fastattn.testing import tolerances

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

OP = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
DTYPES = sorted(OP.supported_dtypes("cpu") & set(FLOAT_DTYPES), key=str)


def check(call: Call, dtype: torch.dtype) -> None:
    """Ours within a small multiple of the error of eager code, both measured from torch's own in float64."""
    got = call.results(sdpa)
    exact = call.to(torch.float64).results(torch_math)
    native = call.results(eager)
    for name, want in exact.items():
        factor = tolerances.FORWARD_FACTOR if name == "out" else tolerances.GRADIENT_FACTOR
        assert got[name].dtype == dtype
        tolerances.check(name, got[name], want, native[name], factor)


def samples(dtype: torch.dtype) -> list[Call]:
    torch.manual_seed(0)
    return [Call.of(sample) for sample in OP.sample_inputs("cpu", dtype, requires_grad=True)]


def test_the_samples_are_those_we_know():
    """A new torch with new arguments must not pass unnoticed."""
    assert set(DTYPES) == set(FLOAT_DTYPES)
    for dtype in DTYPES:
        calls = samples(dtype)
        assert len(calls) >= 25
        assert {name for call in calls for name in call.arguments} == {*NAMES, "is_causal", "dropout_p"}
        assert {call.arguments["dropout_p"] for call in calls} == {0.0, 0.5}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample(dtype):
    for call in samples(dtype):
        if call.arguments["dropout_p"] == 0:
            check(call, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_sample(dtype):
    """Over 4000 draws the mean of the output and of every gradient is what it is without dropout, and the
    variance of the output is p / (1 - p) * sum_j (P_ij v_j)^2: it is, for independent elements."""
    torch.manual_seed(1)
    draws, p = 4000, 0.5
    for call in samples(dtype):
        if call.arguments["dropout_p"] == 0:
            continue
        plain = Call({**call.arguments, "dropout_p": 0.0})
        exact = plain.to(torch.float64).results(torch_math)
        many = plain.to(dtype).tensors()
        dims = max(t.dim() for t in many.values())
        leaves = {
            name: t[(None,) * (dims + 1 - t.dim())]
            .expand(draws, *t[(None,) * (dims - t.dim())].shape)
            .clone()
            for name, t in many.items()
        }
        got = Call({**call.arguments, **leaves}).results(sdpa, exact["out"].shape)
        # Where one key has all the weight, gradients of query and key are differences of equal terms of
        # about this size, one of them computed from the output as rounded.
        term = 8 * max(t.abs().max() for t in many.values()).item() ** 2
        for name, want in exact.items():
            value = got[name].double()
            mean, deviation = value.mean(0).view(want.shape), value.std(0).view(want.shape)
            rounded = term if name in ("dquery", "dkey") else want.abs().max()
            rounding = torch.finfo(dtype).eps * rounded
            worst = ((mean - want).abs() - 6 * deviation / math.sqrt(draws) - rounding).max().item()
            assert worst <= 0, (
                f"{name}: the mean of {draws} draws is off by {worst:.3g} more than chance allows"
            )
        wide = call.to(torch.float64).arguments
        weights = eager(
            wide["query"], wide["key"], torch.eye(6, dtype=torch.float64), None, 0, wide["is_causal"]
        )
        variance = p / (1 - p) * weights.square() @ wide["value"].square()
        # Beside chance, each draw is rounded to the spacing of the smallest numbers.
        spacing = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        off = (got["out"].double().var(0).view(variance.shape) - variance).abs()
        assert (off <= 0.15 * variance + 2 * spacing * variance.sqrt() + spacing**2).all()

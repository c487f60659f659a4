"""Summaries on the case list: values and gradients within the bound of the float64 definition."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from summary_support import (
    BY_NAME,
    SUMMARY_CASES,
    Oracle,
    attention_lse,
    compare,
    gradients,
    kernel_results,
    oracle,
)

from fastattn.backends import cpu
from fastattn.testing import Case
from fastattn.testing.inputs import poisoned_memory
from fastattn.weight_statistics import Wanted

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native core fastattn._C is not built")

ISAS = ("baseline", "avx2", "avx512", "generic")
# A case for each path through the kernels, for the runs of every instruction set.
REPRESENTATIVE = (
    "one", "primes", "gqa", "many-tiles", "dim-3", "layout-blhd", "causal-long-k", "window-long-q",
    "mask-padding-per-query", "mask-documents-causal", "bool-transposed", "bias-full", "bias-holes",
    "bias-floor", "bias-alibi", "sinks-masked-rows", "primes-bfloat16", "primes-float16", "primes-float64",
)  # fmt: skip


def wanted(case: Case) -> Wanted:
    """Grids that divide neither length, of each kind in some cases."""
    mode = ("mean", "sum", "max")[len(case.name) % 3]
    return Wanted(3, (min(5, case.queries), min(7, case.keys)), mode)


@lru_cache(maxsize=2)
def prepared(case: Case) -> Oracle:
    return oracle(case, wanted(case))


def check_case(case: Case) -> None:
    expected = prepared(case)
    with poisoned_memory():
        inputs = expected.inputs.requiring_grad() if case.grads else expected.inputs
        got = kernel_results(inputs, wanted(case))
        if case.grads:
            got |= gradients(got, inputs)
    compare({name: tensor.detach() for name, tensor in got.items()}, expected)


def check_case_with_lse(case: Case) -> None:
    expected = prepared(case)
    lse = attention_lse(expected.inputs)
    with poisoned_memory():
        got = kernel_results(expected.inputs, wanted(case), lse=lse)
    used = lse.abs() < 16
    assert torch.equal(got["lse"][used], lse[used])
    compare(got, expected)


def parametrized(cases: tuple[Case, ...]):
    return [pytest.param(case, id=case.name, marks=[pytest.mark.slow] * case.slow) for case in cases]


@pytest.mark.parametrize("case", parametrized(SUMMARY_CASES))
def test_case(case: Case):
    check_case(case)
    check_case_with_lse(case)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_representative_case_on_each_isa(name: str, isa: str, native, use_isa):
    if isa not in native.info()["isas"]:
        pytest.skip(f"cpu: this machine and build have {native.info()['isas']}, not {isa}")
    use_isa(isa)
    check_case(BY_NAME[name])


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", SUMMARY_CASES, ids=lambda case: case.name)
def test_every_case_on_each_isa(case: Case, isa: str, native, use_isa):
    if isa not in native.info()["isas"]:
        pytest.skip(f"cpu: this machine and build have {native.info()['isas']}, not {isa}")
    use_isa(isa)
    check_case(case)
    check_case_with_lse(case)


@pytest.mark.parametrize("name", ["many-tiles", "gqa", "bias-full", "sinks", "one-query"])
def test_no_gradient_flows_into_lse_and_the_others_are_whole(name: str):
    """As if lse had been computed within, not as if it were a constant."""
    inputs = prepared(BY_NAME[name]).inputs
    found = []
    for options in ({}, {"lse": attention_lse(inputs).requires_grad_()}):
        tracked = inputs.requiring_grad()
        got = kernel_results(tracked, wanted(BY_NAME[name]), **options)
        loss = sum(got[name].square().sum() for name in ("entropy", "received", "distance", "pooled"))
        loss.backward()
        found.append([leaf.grad for name, leaf in tracked.leaves.items() if name != "v"])
        assert all(lse.grad is None for lse in options.values())
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))

"""Random problems on the kernels, and whether the search would tell."""

from __future__ import annotations

import os
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from fastattn.backends import cpu
from fastattn.spec import SCORES
from fastattn.testing import fuzz as fuzzing
from fastattn.testing.fuzz import KERNELS, check_example, fuzz, main, random_inputs
from fastattn.testing.inputs import FAR
from fastattn.testing.random_cases import random_case

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native core fastattn._C is not built")


def test_random_problems():
    report = fuzz(seconds=20, seed=0)
    assert report.tried
    assert not report.failures, "\n".join(f"{n}: {message}" for n, message in report.failures.items())


@pytest.mark.slow
def test_many_random_problems():
    report = fuzz(seconds=240, seed=1)
    assert not report.failures, "\n".join(f"{n}: {message}" for n, message in report.failures.items())


def of_op(op: str) -> list[int]:
    """Examples of an operation that compute something."""
    cases = ((n, random_case(n)) for n in range(100))
    return [n for n, case in cases if case.op == op and case.batch * case.queries > 5][:3]


def test_an_example_is_one_problem():
    one, other = random_inputs(12), random_inputs(12)
    assert all(torch.equal(x, other.leaves[name]) for name, x in one.leaves.items())
    assert vars(one.case).keys() == vars(other.case).keys()
    assert random_case(12).head_dim == random_case(12).head_dim


def test_every_kind_of_problem_occurs():
    cases = [random_case(n) for n in range(300)]
    assert {case.op for case in cases} == {"attention", "varlen", "decode"}
    assert {case.score for case in cases} == set(SCORES)
    assert {case.page_size is None for case in cases if case.op == "decode"} == {True, False}
    assert {case.bias.leaf for case in cases if case.bias} == {"bias", "slopes", "table"}
    assert any(0 in case.lengths_q for case in cases)


def test_rows_far_apart_occur_often():
    """Those that kernels could read where they lie, but for their distance."""
    found = Counter()
    for example in range(200):
        inputs = random_inputs(example)
        dim = 0 if inputs.case.op == "varlen" else 2
        for name, rows in {**inputs.leaves, "dout": inputs.dout}.items():
            is_readable = rows.itemsize > 2 and rows.shape[-1] % 16 == 0 and rows.numel() > 0
            if name in ("q", "k", "v", "dout") and is_readable:
                found[name] += rows.stride(dim) * rows.itemsize > FAR
    assert min(found[name] for name in ("q", "k", "v", "dout")) >= 5


@pytest.mark.parametrize("op", ["attention", "varlen", "decode"])
def test_a_wrong_result_is_found(op):
    name = "attention" if op == "attention" else f"{op}_attention"
    public = getattr(KERNELS, name)

    def bent(*positional, **options):
        out, lse = public(*positional, **options)
        return out + 0.1, lse

    functions = SimpleNamespace(**{**vars(KERNELS), name: bent})
    with pytest.raises(AssertionError, match="out: error"):
        for example in of_op(op):  # of which one may be of hard attention
            check_example(example, functions)


def crash(example: int) -> None:
    if example == 1:
        os.abort()


def hang(example: int) -> None:
    if example == 1:
        time.sleep(600)


def refuse(example: int) -> None:
    raise ValueError(f"not {example}")


def test_a_crash_is_a_failure_and_the_search_goes_on():
    report = fuzz(seconds=600, check=crash, most_failures=1)
    assert list(report.failures) == [1]
    assert "died" in report.failures[1]


def test_a_hang_is_a_failure():
    report = fuzz(seconds=600, check=hang, most_failures=1, hang_seconds=10)
    assert list(report.failures) == [1]
    assert report.failures[1] == "no answer within 10 s"


def test_an_exception_is_a_failure_with_its_message():
    report = fuzz(seconds=600, seed=2, check=refuse, most_failures=2)
    assert list(report.failures) == [2_000_000, 2_000_001]
    assert "ValueError: not 2000000" in report.failures[2_000_000]


def test_a_failure_is_printed_with_the_command_that_repeats_it(monkeypatch, capsys):
    monkeypatch.setattr(fuzzing, "fuzz", lambda seconds, seed: fuzzing.Report(5, {17: "out: wrong"}))
    assert main(["--seconds", "1"]) == 1
    printed = capsys.readouterr().out
    assert "python -m fastattn.testing.fuzz --example 17\nout: wrong\n" in printed
    assert "5 problems tried, 1 failed" in printed


def test_one_example_can_be_repeated(capsys):
    assert main(["--example", "12"]) == 0
    assert capsys.readouterr().out.endswith("passed\n")

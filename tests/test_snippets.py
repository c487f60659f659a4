"""The snippets in the docstrings of the attention family do what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

import fastattn

MODULES = (
    "additive",
    "hard",
    "kernel_regression",
    "nn.additive",
    "nn.hard",
    "nn.kernel_regression",
    "nn.local",
)


@pytest.mark.parametrize("name", MODULES)
def test_snippets(name):
    torch.manual_seed(0)
    module = importlib.import_module(f"fastattn.{name}")
    names = {**vars(module), "torch": torch, "fastattn": fastattn}
    found = [test for test in doctest.DocTestFinder().find(module, globs=names) if test.examples]
    assert found
    for test in found:
        runner = doctest.DocTestRunner()
        runner.run(test)
        assert runner.summarize(verbose=False).failed == 0

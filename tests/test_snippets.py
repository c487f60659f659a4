"""The snippets in the docstrings of the attention family do what they say, and every layer has one."""

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
    "models.seq2seq",
    "nn.additive",
    "nn.attention",
    "nn.cache",
    "nn.convert",
    "nn.embedding",
    "nn.feed_forward",
    "nn.hard",
    "nn.hierarchical",
    "nn.kernel_regression",
    "nn.local",
    "nn.multihead",
    "nn.positions",
    "nn.relative",
    "nn.rotary",
    "nn.scores",
    "nn.self_attention",
    "nn.sentence",
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


@pytest.mark.parametrize("name", fastattn.nn.__all__)
def test_every_layer_has_a_snippet(name):
    thing = getattr(fastattn.nn, name)
    assert ">>>" in thing.__doc__
    assert thing.__module__.removeprefix("fastattn.") in MODULES, "and it is tested"

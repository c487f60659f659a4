"""docs/inspect.md and the docstrings of fastattn.inspect: their snippets run, and what they name is there."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastattn
from fastattn.models import Encoder

pytest.importorskip("matplotlib")
PAGE = Path(__file__).parent.parent / "docs" / "inspect.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize(("number", "tokens"), [(0, 3), (1, 6)])
def test_snippets_run(number, tokens, tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    model = nn.ModuleDict({"encoder": Encoder(16, 1, num_heads=4, d_ff=16)})
    model.forward = model["encoder"].forward
    names = {"model": model, "x": torch.randn(1, tokens, 16)}
    exec(compile(SNIPPETS[number], f"{PAGE.name}, snippet {number}", "exec"), names)
    assert len(SNIPPETS) == 2


def test_the_page_has_what_it_names():
    text = PAGE.read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)\(", text, re.M) + re.findall(r", `(\w+)\(matrices", text)
    assert {"attention_map", "show_heatmaps"} <= {*table} <= {*fastattn.inspect.__all__}
    for name in fastattn.inspect.__all__:
        assert name in text, name
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (PAGE.parent / target).exists(), target


@pytest.mark.parametrize(
    "name", ["inspect.summary", "inspect.recorder", "inspect.removal", "weight_statistics"]
)
def test_docstrings(name):
    torch.manual_seed(0)
    module = importlib.import_module(f"fastattn.{name}")
    names = {**vars(module), "fastattn": fastattn, "torch": torch}
    found = [test for test in doctest.DocTestFinder().find(module, globs=names) if test.examples]
    assert found
    for test in found:
        runner = doctest.DocTestRunner()
        runner.run(test)
        assert runner.summarize(verbose=False).failed == 0

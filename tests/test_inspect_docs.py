"""docs/inspect.md and the docstrings of fastattn.inspect: their snippets run, and what they name is there."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import fastattn

pytest.importorskip("matplotlib")
PAGE = Path(__file__).parent.parent / "docs" / "inspect.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def test_snippets_run_one_after_the_other(tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, snippet in enumerate(SNIPPETS):
        exec(compile(snippet, f"{PAGE.name}, snippet {number}", "exec"), names)
    assert (tmp_path / "heads.png").stat().st_size > 10_000
    assert not torch.allclose(names["without_heads"], names["without_link"])
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

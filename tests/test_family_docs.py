"""Every snippet of docs/attention_family.md and every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "attention_family.md"

SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)

# Packages whose docstrings are for users.
MODULES = [
    found.name
    for package in ("nn", "models")
    for found in pkgutil.iter_modules([str(ROOT / "fastattn" / package)], f"fastattn.{package}.")
]


@pytest.mark.parametrize("number", range(1, len(SNIPPETS)))
def test_snippets_run(number, capsys):
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for source in (SNIPPETS[0], SNIPPETS[number]):
        exec(compile(source, f"{PAGE.name}, snippet {number}", "exec"), names)


def test_the_page_has_what_it_names():
    text = PAGE.read_text(encoding="utf-8")
    for module, name in re.findall(r"`(nn|models)\.(\w+)", text):
        assert hasattr(importlib.import_module(f"fastattn.{module}"), name), name
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (PAGE.parent / target).exists(), target
    headings = {
        re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in re.findall(r"^## (.*)", text, re.M)
    }
    assert {anchor for anchor in re.findall(r"\]\(#([^)]+)\)", text)} <= headings


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_run(name):
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch, "fastattn": fastattn})
    assert result.failed == 0


def test_every_layer_has_an_example():
    for name in fastattn.nn.__all__:
        thing = getattr(fastattn.nn, name)
        assert ">>>" in (thing.__doc__ or ""), name

"""docs/attention_family.md: its snippets run, and what it names is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "attention_family.md"

SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("number", range(1, len(SNIPPETS)))
def test_snippets_run(number):
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
    headings = [re.sub(r"[^\w -]", "", line) for line in re.findall(r"^## (.*)", text, re.M)]
    anchors = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert anchors <= {heading.lower().replace(" ", "-") for heading in headings}

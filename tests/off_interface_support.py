"""What the tests of models off transformers' attention interface share."""

from __future__ import annotations

import docs_tables
import torch
from torch import Tensor, nn

import fastattn
from fastattn.integrations.handwritten.swap import stock_of
from fastattn.integrations.off_interface import LEFT
from fastattn.integrations.routes import CALL, INTERFACE


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    """To a few bits of float32."""
    assert len(got) == len(want)
    scale = max((tensor.abs().max().item() for tensor in want), default=1.0)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6 * scale)


def shown(how: str) -> str:
    """What a report says of a module, as the table in the docs does."""
    if "as written" in how:
        return "no gain: " + how.partition(", for ")[2]
    return {CALL: "calls the function", INTERFACE: "on the interface"}.get(how, "written out")


def tabulate(name: str, model: nn.Module, report: fastattn.integrations.patching.Patch) -> dict[str, str]:
    """Hold the docs' table to what became of a model's modules; kind of module -> how it was shown."""
    found: dict[str, str] = {}
    for module, how in report._as_run().items():
        kind = kind_of(model, module)
        found[kind] = max(found.get(kind, ""), shown(how), key=_doubt)
    for module, reason in report.left.items():
        kind = kind_of(model, module)
        assert reason == LEFT.get(kind, reason)
        found[kind] = f"left: {reason}"
    for kind, text in found.items():
        if text != "on the interface":
            docs_tables.tried("off-interface", "transformers", f"`{kind}` of {name}", text)
    return found


def kind_of(model: nn.Module, module: str) -> str:
    return stock_of(model.get_submodule(module)).__name__


def _doubt(text: str) -> tuple[bool, str]:
    """Of modules of one kind the one that gains least speaks for all."""
    return text.startswith("no gain"), text

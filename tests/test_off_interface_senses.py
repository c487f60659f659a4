"""Pictures, sounds and pages: transformers' models off its attention interface, under fastattn.patch."""

from __future__ import annotations

import ast
import copy
import importlib
import re
from pathlib import Path
from typing import Any

import docs_tables
import patch_support
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastattn

transformers = pytest.importorskip("transformers")
from off_interface_parts import NOT_ATTENTION, PARTS, UNTRIED, tensors  # noqa: E402
from off_interface_senses import SENSES  # noqa: E402
from off_interface_support import assert_same, tabulate  # noqa: E402
from patch_support import gradients, trainable  # noqa: E402

from fastattn.integrations.off_interface import LEFT  # noqa: E402

pytestmark = [pytest.mark.usefixtures("native", "one_thread"), pytest.mark.filterwarnings("ignore")]

transformers.logging.set_verbosity_error()

MODELS = Path(transformers.__file__).parent / "models"
# Their scores or weights take a way that no call of attention has.
NO_GAIN = {"FastSpeech2ConformerAttention", "EvollaSequenceCompressorAttention"}


def named(name: str, module: str) -> Any:
    """A class of transformers, of the module where not all are public."""
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)


def build(name: str) -> Any:
    sense = SENSES[name]
    config = getattr(transformers, sense.config)
    module = config.__module__.split(".")[-2]
    kind = getattr(transformers, sense.model, None) or named(sense.model, f"{module}.modeling_{module}")
    return patch_support.prepared(kind(config(**copy.deepcopy(sense.options))), 0.2)


def outcome(name: str, model: nn.Module, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """All that a model returns, and the gradients of the parameters."""
    torch.manual_seed(0)
    model.train().eval()  # or LeViT keeps a bias with the graph of another call
    output = model(**SENSES[name].inputs(), **options)
    leaves = tree_leaves(tuple(output.values()) if hasattr(output, "values") else output)
    parts = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
    loss = sum(part.square().mean() for part in parts if part.requires_grad)
    return parts, gradients(loss, trainable(model))


@pytest.mark.parametrize("name", SENSES)
def test_forward_and_backward(name):
    """Each module is replaced, and what it writes out fuses; or it is left, for the reason in the table."""
    model = build(name)
    parts, want_gradients = outcome(name, model)
    report = fastattn.patch(model)
    got, got_gradients = outcome(name, model)
    assert_same(got, parts)
    assert_same(got_gradients, want_gradients)
    found = tabulate(name.partition(" ")[0], model, report)
    assert found
    assert {kind for kind, text in found.items() if "no gain" in text} <= NO_GAIN
    report.undo()
    assert all(torch.equal(a, b) for a, b in zip(outcome(name, model)[0], parts, strict=True))


@pytest.mark.parametrize("name", [name for name, sense in SENSES.items() if sense.asks])
def test_attentions_are_returned_where_asked(name):
    model = build(name)
    want, _ = outcome(name, model, output_attentions=True)
    unasked, _ = outcome(name, model)
    assert len(want) > len(unasked)
    with fastattn.patch(model):
        assert_same(outcome(name, model, output_attentions=True)[0], want)


def test_weights_that_nobody_asked_for():
    """WavLM asks PyTorch's function for weights in every call; ours computes none."""
    model = build("WavLM")
    seen: list[Any] = []
    layer = model.encoder.layers[0].attention
    fastattn.patch(model)
    layer.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    outcome("WavLM", model)
    assert seen == [None]


@pytest.mark.parametrize("name", PARTS)
def test_single_modules(name):
    """The same of modules by themselves: the output, and the gradients of the parameters."""
    where, arguments, call = PARTS[name]
    folder = {"data2vec_vision": "data2vec", "esmfold": "esm"}.get(where, where)
    model = patch_support.prepared(named(name, f"{folder}.modeling_{where}")(*arguments), 0.2)

    def outcome() -> list[Tensor]:
        out = tensors(call(model))
        return [out[0], *gradients(out[0].square().mean(), trainable(model))]

    want = outcome()
    report = fastattn.patch(model)
    assert_same(outcome(), want)
    (text,) = tabulate(folder, model, report).values()
    assert "no gain" not in text or name in NO_GAIN
    report.undo()
    assert torch.equal(outcome()[0], want[0])


def off_interface() -> set[str]:
    """Classes of transformers that have a softmax and two products, or call PyTorch's function."""
    found = set()
    for path in MODELS.glob("*/modeling_*.py"):
        # What stands at the first column begins a new piece; only few of them need to be parsed.
        for piece in re.split(r"^(?=\S)", path.read_text(), flags=re.MULTILINE):
            if not piece.startswith("class ") or not re.search(
                r"oftmax|dot_product_att|multi_head_att", piece
            ):
                continue
            code = ast.unparse(ast.parse(piece))  # without comments
            products = re.findall(r"matmul\(|bmm\(|einsum\(| @ ", code)
            calls = "scaled_dot_product_attention(" in code or "multi_head_attention_forward(" in code
            writes_out = "oftmax" in code and len(products) > 1
            if "ALL_ATTENTION_FUNCTIONS" not in code and (calls or writes_out):
                found.add(re.match(r"class (\w+)", piece)[1])
    return found


def test_none_is_forgotten():
    """Each was tried, or is left for a reason, or named as untried, in the version of the docs."""
    page = (docs_tables.DOCS / "off-interface.md").read_text()
    if f"transformers {transformers.__version__} " not in page:
        pytest.skip("the table is for another version of transformers")
    tried = set(re.findall(r"^\| `(\w+)` of", page, re.M))
    found = off_interface()
    assert len(found) > 100
    assert found - tried - LEFT.keys() == UNTRIED | NOT_ATTENTION
    assert all(f"`{name}`" in page for name in UNTRIED)

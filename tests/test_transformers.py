"""Models of transformers on fastattn: the same outputs, gradients and texts as on eager attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers_senses import SENSES  # noqa: E402
from transformers_support import alone, continue_text, counted, run, typed  # noqa: E402
from transformers_texts import TEXTS  # noqa: E402
from transformers_zoo import PADDED, left_padded  # noqa: E402

from fastattn.integrations.transformers import FastCache, register  # noqa: E402

register()
transformers.logging.set_verbosity_error()

ROOT = Path(__file__).parent.parent
ZOO = [*TEXTS, *SENSES]
FEATURES = [(architecture, feature) for architecture in ZOO for feature in architecture.without]
# All with their usual cache; with the others, a few of each kind in the normal run.
CACHED = ("Llama", "Mistral", "Gemma 2", "gpt-oss", "DeepSeek-V3", "Llama 4")
WRITERS = [
    pytest.param(
        architecture,
        cache,
        marks=() if cache == "dynamic" or architecture.name in CACHED else pytest.mark.slow,
        id=f"{architecture.name}-{cache}",
    )
    for architecture in ZOO
    if architecture.prompts
    for cache in ("dynamic", "FastCache", "static")
    if cache == "dynamic" or not architecture.is_encoder_decoder
]


def by_name(value):
    return getattr(value, "name", value)


@pytest.mark.parametrize("architecture", ZOO, ids=by_name)
def test_outputs_and_gradients(architecture):
    """In float64, where eager attention at float32 shows how much its rounding would explain."""
    model = architecture.build().eval()
    expected = run(model, architecture, "eager", torch.float64)
    native = run(model, architecture, "eager", torch.float32)
    with counted() as seen:
        ours = run(model, architecture, "fastattn", torch.float64)
    assert len(seen) >= 2
    for factor, want, rounded, got in zip((2, 3), expected, native, ours, strict=True):
        bound = factor * (rounded - want).abs().max()
        assert (got - want).abs().max() <= bound


@pytest.mark.parametrize("architecture, feature", FEATURES, ids=by_name)
def test_features_bite(architecture, feature):
    """A feature that changed nothing would be tested by nothing."""
    with_it = run(architecture.build().eval(), architecture, "fastattn", torch.float32)[0]
    without = architecture.build(**architecture.without[feature]).eval()
    assert (run(without, architecture, "fastattn", torch.float32)[0] - with_it).abs().max() > 1e-2


def test_sinks_bite():
    (architecture,) = (each for each in ZOO if "sinks" in each.bites)
    model = architecture.build().eval()
    with_them = run(model, architecture, "fastattn", torch.float32)[0]
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            parameter.data.fill_(-1e4)
    assert (run(model, architecture, "fastattn", torch.float32)[0] - with_them).abs().max() > 1e-2


@pytest.mark.parametrize("architecture, cache", WRITERS)
def test_generate(architecture, cache):
    """Padded texts go on as each of them does alone: eager attention in float64 and no mask at all."""
    model, inputs = architecture.build().eval(), architecture.prompts()
    batches = [alone(inputs, row) for row in (0, 1)] if architecture.ignores_padding else [inputs]
    expected = [continue_text(model.double(), "eager", typed(batch, torch.float64)) for batch in batches]
    tokens = torch.cat([tokens for tokens, _ in expected])
    scores = torch.cat([scores for _, scores in expected], 1)
    _, native = continue_text(model.float(), "eager", inputs)
    options = {"past_key_values": FastCache(config=model.config)} if cache == "FastCache" else {}
    if cache == "static":
        options = {"cache_implementation": "static", "disable_compile": True}
    with counted() as seen:
        got_tokens, got = continue_text(model, "fastattn", inputs, **options)
    assert seen and torch.equal(got_tokens, tokens)
    finite = scores.isfinite()
    assert torch.equal(got.isfinite(), finite)
    difference = (got.double() - scores)[finite].abs().max()
    assert difference <= 2 * (native.double() - scores)[finite].abs().max()


def test_the_documentation_lists_what_was_tried(monkeypatch):
    """With the versions of requirements/constraints.txt, which are those that it names."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import transformers_table

    page = transformers_table.PAGE.read_text()
    assert transformers_table.written(page) == page, "run: python scripts/transformers_table.py"
    families = {architecture.family for architecture in ZOO}
    assert len(ZOO) >= 30 and families >= {"decoder", "encoder", "vision", "audio", "MoE", "multimodal"}


def test_the_padding_is_padding():
    inputs = left_padded()
    assert not inputs["attention_mask"][0, :PADDED].any() and inputs["attention_mask"][1].all()

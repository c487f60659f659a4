"""transformers' models off its attention interface, under fastattn.patch: equal to eager on real tokens."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import patch_support
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastattn
from fastattn.integrations.routes import OF_A_MODEL, SHARED_MASK

transformers = pytest.importorskip("transformers")
from off_interface_support import assert_same, tabulate  # noqa: E402
from off_interface_zoo import BART, DECODERS, OTHERS, TEXT  # noqa: E402
from patch_support import gradients, rand, trainable  # noqa: E402

from fastattn.integrations.off_interface import LEFT  # noqa: E402

pytestmark = [pytest.mark.usefixtures("native", "one_thread"), pytest.mark.filterwarnings("ignore")]

transformers.logging.set_verbosity_error()

ZOO = {**DECODERS, **OTHERS}
B, L = 2, 8


def prepared(model: nn.Module) -> Any:
    return patch_support.prepared(model, 0.2)


def base_model(name: str) -> Any:
    config = getattr(transformers, f"{name}Config")(**copy.deepcopy(ZOO[name]))
    return prepared(getattr(transformers, f"{name}Model")(config))


IDS = torch.randint(4, 60, (B, L), generator=torch.Generator().manual_seed(0))
REAL = torch.ones(B, L, dtype=torch.long)
REAL[1, :3] = 0  # padded on the left


def inputs_of(name: str, model: nn.Module) -> dict[str, Tensor]:
    if name == "Perceiver":
        return {"inputs": rand(B, 6, 16)}
    if name == "Timesformer":
        return {"pixel_values": rand(B, 2, 3, 32, 32)}
    takes = inspect.signature(model.forward).parameters
    if "input_ids" not in takes:
        return {"pixel_values": rand(B, 3, 32, 32)}
    inputs = {"input_ids": IDS}
    if "attention_mask" in takes:
        inputs["attention_mask"] = REAL
    if "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = IDS
    if name == "Lxmert":
        inputs |= {"visual_feats": rand(B, 5, 16), "visual_pos": rand(B, 5, 4).abs()}
    return inputs


def real_parts(output: Any) -> list[Tensor]:
    """All that a model returns, but for the padded tokens."""
    found = [
        t for t in tree_leaves(tuple(output.values())) if isinstance(t, Tensor) and t.is_floating_point()
    ]
    return [t[REAL.bool()] if t.dim() == 3 and t.shape[:2] == (B, L) else t for t in found]


def outcome(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What a model returns on real tokens, and the gradients of the parameters."""
    parts = real_parts(model(**inputs))
    loss = sum(part.square().mean() for part in parts if part.requires_grad)
    return parts, gradients(loss, trainable(model))


@pytest.mark.parametrize("name", ZOO)
def test_forward_and_backward(name):
    """Each module is replaced, and what it writes out fuses; or it is left, for the reason in the table."""
    model = base_model(name)
    inputs = inputs_of(name, model)
    parts, want_gradients = outcome(model, inputs)
    report = fastattn.patch(model)
    got, got_gradients = outcome(model, inputs)
    assert_same(got, parts)
    assert_same(got_gradients, want_gradients)
    found = tabulate(name, model, report)
    assert name == "OpenAIGPT" or not any("no gain" in text for text in found.values())
    assert {kind for kind, text in found.items() if text.startswith("left")} <= LEFT.keys()
    report.undo()
    assert all(torch.equal(a, b) for a, b in zip(outcome(model, inputs)[0], parts, strict=True))


def causal_model(name: str, **options: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**copy.deepcopy(ZOO[name]), **options)
    kind = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")
    return prepared(kind(config))


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "OpenAIGPT"])
def test_generate(name):
    """Greedy, from left-padded prompts, with a cache: the same tokens and scores."""
    model = causal_model(name)
    options = {
        "attention_mask": REAL,
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    want = model.generate(IDS, **options)
    with fastattn.patch(model):
        got = model.generate(IDS, **options)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.scores), torch.stack(want.scores), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ZOO)
def test_attentions_are_returned_where_asked(name):
    model = base_model(name)
    inputs = inputs_of(name, model)
    want = model(**inputs, output_attentions=True)
    keys = [
        key for key in want if key.endswith("attentions") and want[key] and isinstance(want[key][0], Tensor)
    ]
    assert keys or name == "Data2VecVision"
    with fastattn.patch(model):
        got = model(**inputs, output_attentions=True)
        unasked = model(**inputs)
    assert not any(unasked.get(key) for key in keys)
    for key in keys:
        assert_same(list(got[key]), list(want[key]))


def test_training_step_with_dropout():
    """bloom, with its own dropout in the fused call: repeated by the seed, and another without it."""
    model = causal_model("Bloom", attention_dropout=0.5).train()
    fastattn.patch(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def step() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    torch.manual_seed(0)
    first = step()
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))


# Models on the interface, by the same call


def llama() -> Any:
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    return prepared(transformers.LlamaForCausalLM(config))


def test_the_interface_is_the_route_where_there_is_one():
    model = llama()
    before = model.config._attn_implementation
    want = model(IDS, attention_mask=REAL).logits
    first = fastattn.patch(model)
    second = fastattn.patch(model)
    assert set(first.replaced.values()) == {'attn_implementation="fastattn"'}
    assert len(first.replaced) == 2
    assert set(second.left.values()) == {"it is fastattn's already"}
    got = model(IDS, attention_mask=REAL).logits
    torch.testing.assert_close(got[REAL.bool()], want[REAL.bool()])
    second.undo()
    assert model.config._attn_implementation == "fastattn"
    first.undo()
    assert model.config._attn_implementation == before
    assert torch.equal(model(IDS, attention_mask=REAL).logits, want)


def test_an_implementation_set_since_is_kept():
    model = llama()
    report = fastattn.patch(model)
    model.set_attn_implementation("eager")
    report.undo()
    assert model.config._attn_implementation == "eager"


def test_an_implementation_set_since_on_a_part_is_kept():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16
        ),
        text_config=llama().config,
        image_token_index=63,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    parts = [config.text_config, config.vision_config]
    before = config.text_config._attn_implementation
    report = fastattn.patch(model)
    assert [part._attn_implementation for part in parts] == ["fastattn", "fastattn"]
    model.set_attn_implementation({"vision_config": "eager"})
    report.undo()
    assert [part._attn_implementation for part in parts] == [before, "eager"]


def test_a_layer_of_the_interface_alone_is_left():
    model = llama()
    report = fastattn.patch(model.model.layers[0])
    assert report.left == {"self_attn": OF_A_MODEL} and not report.replaced


def test_the_interface_cannot_skip_a_module():
    model = llama()
    report = fastattn.patch(model, skip=["model.layers.0.self_attn"])
    assert not report.replaced
    assert "one for the whole model" in report.left["model.layers.1.self_attn"]


def test_a_model_inside_ones_own():
    """Each part by its route."""

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.old = llama(), base_model("Bloom")
            self.mix = nn.MultiheadAttention(32, 2, batch_first=True)

        def forward(self, ids: Tensor) -> Tensor:
            a = self.text(ids, output_hidden_states=True).hidden_states[-1]
            b = self.old(ids).last_hidden_state
            return self.mix(a, b, b)[0]

    model = Mine().eval()
    want = model(IDS)
    report = fastattn.patch(model)
    assert [list(report.replaced.values()).count(how) for how in sorted(set(report.replaced.values()))] == [
        2,
        1,
        2,
    ]
    torch.testing.assert_close(model(IDS), want, rtol=1e-4, atol=1e-5)
    report.undo()
    assert torch.equal(model(IDS), want)


@pytest.mark.parametrize("name", ["llama", "Bloom"])
def test_saved_by_transformers(name, tmp_path):
    """What save_pretrained writes is a stock model, whose class and config have the stock names."""
    model = llama() if name == "llama" else causal_model(name)
    want = model(IDS).logits
    report = fastattn.patch(model)
    model.save_pretrained(tmp_path)
    assert "fastattn" not in (tmp_path / "config.json").read_text()
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(other).__name__ == type(model).__name__
    assert fastattn.patch(other).replaced == report.replaced
    torch.testing.assert_close(other.eval()(IDS).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_saved_whole_and_loaded_by_another_program(tmp_path):
    """torch.save keeps the model patched; a program that knows nothing of that loads and runs it."""
    import subprocess
    import sys
    from pathlib import Path

    model = llama()
    fastattn.patch(model)
    torch.save((model, IDS, model(IDS).logits), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, ids, want = torch.load(sys.argv[1], weights_only=False); "
        "print(torch.allclose(model(ids).logits, want), model.config._attn_implementation)"
    )
    root = Path(fastattn.__file__).parent.parent
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
    assert run.stdout.strip() == "True fastattn"


def test_masks_that_the_interface_shares_with_others():
    """A model that hands one mask to modules on and off the interface keeps it as both can read it."""
    config = transformers.BigBirdPegasusConfig(
        **{**BART, "encoder_layers": 1, "decoder_layers": 1},
        max_position_embeddings=64,
        attention_type="original_full",
    )
    model = prepared(transformers.BigBirdPegasusModel(config))
    inputs = {"input_ids": IDS, "attention_mask": REAL, "decoder_input_ids": IDS}
    want = model(**inputs).last_hidden_state
    report = fastattn.patch(model)
    assert list(report.replaced) == ["encoder.layers.0.self_attn.self"]
    assert set(report.left.values()) == {SHARED_MASK}
    torch.testing.assert_close(model(**inputs).last_hidden_state, want, rtol=1e-4, atol=1e-5)

"""Nothing of N x N elements is made anywhere in a model on fastattn, whatever its mask."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

transformers = pytest.importorskip("transformers")

from transformers_senses import SENSES  # noqa: E402
from transformers_texts import TEXTS  # noqa: E402
from transformers_zoo import VOCABULARY  # noqa: E402

from fastattn.integrations.transformers import FastCache, register  # noqa: E402

pytestmark = [pytest.mark.usefixtures("native", "one_thread"), pytest.mark.filterwarnings("ignore")]

register()

LENGTH = 2048
# A tensor for each pair of a query and a key has LENGTH**2 elements or more. What is linear has at most
# LENGTH / 4 for each token: logits, the hidden states of all experts, a strip of a mask.
MOST = LENGTH**2 // 4
ZOO = {each.name: each for each in [*TEXTS, *SENSES]}
DECODERS = ("Llama", "Mistral", "Gemma 2", "gpt-oss", "Llama 4")
ENCODERS = ("BERT", "ModernBERT")
ENCODER_DECODERS = ("T5", "UMT5", "Switch Transformers", "BART")


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, and that operation."""

    elements, operation = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            # An expanded tensor is as large as its memory.
            if isinstance(leaf, torch.Tensor) and type(leaf) in (torch.Tensor, torch.nn.Parameter):
                elements = leaf.untyped_storage().nbytes() // leaf.element_size()
                if elements > self.elements:
                    self.elements, self.operation = elements, str(func)
        return out


def assert_linear(work) -> None:
    with Largest() as largest:
        work()
    assert largest.elements < MOST, largest.operation
    assert largest.elements >= LENGTH  # it has looked


def long_model(name: str, **options):
    """A model of one or two layers that takes LENGTH tokens, with windows and chunks of its own."""
    longer = {"max_position_embeddings": LENGTH + 2} if "max_position_embeddings" in ZOO[name].options else {}
    model = ZOO[name].build(**longer, **options)
    model.set_attn_implementation("fastattn")
    return model


def inputs(kind: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if kind == "packed":
        ids = ids[:1]
        return {"input_ids": ids, "position_ids": torch.arange(LENGTH)[None] % 700}
    if kind == "left padding":
        mask[0, : LENGTH // 3] = 0
    elif kind == "right padding":
        mask[0, LENGTH // 3 :] = 0
    elif kind == "holes":
        mask[0, 5::7], mask[1, 100:900] = 0, 0
    return {"input_ids": ids} if kind == "no padding" else {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", ["no padding", "left padding", "right padding", "holes", "packed"])
@pytest.mark.parametrize("name", DECODERS)
def test_prefill(name, kind):
    """And the first token after it, with a cache."""
    model = long_model(name).eval()
    given = inputs(kind)

    def work() -> None:
        cache = FastCache(config=model.config)
        with torch.no_grad():
            model(**given, past_key_values=cache, logits_to_keep=1)
            if kind != "packed":
                mask = {key: torch.cat([m, m[:, :1] | 1], 1) for key, m in given.items() if "mask" in key}
                model(given["input_ids"][:, :1], **mask, past_key_values=cache)

    assert_linear(work)


@pytest.mark.parametrize("kind", ["no padding", "left padding", "packed"])
def test_training(kind):
    model = long_model("Mistral").train()
    given = inputs(kind)

    def step() -> None:
        model(**given, labels=given["input_ids"]).loss.backward()

    assert_linear(step)


@pytest.mark.parametrize("kind", ["right padding", "holes"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name, kind):
    model, given = long_model(name).train(), inputs(kind)
    assert_linear(lambda: model(**given).last_hidden_state.sum().backward())


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoders(name):
    """Their position tables and their cross-attention too."""
    model, given = long_model(name).train(), inputs("right padding")
    given["decoder_input_ids"] = given["input_ids"].flip(1)
    assert_linear(lambda: model(**given).logits.sum().backward())


def test_mask_functions_of_ones_own():
    """A prefix that all tokens see, and blocks of tokens that see each other."""
    blocks = torch.arange(LENGTH) // 50
    for overlay in (lambda b, h, q, k: k < 300, lambda b, h, q, k: blocks[q] == blocks[k]):
        config = transformers.LlamaConfig(**ZOO["Llama"].options)

        def make(overlay=overlay, config=config) -> None:
            transformers.masking_utils.create_causal_mask(
                config=config,
                inputs_embeds=torch.empty(2, LENGTH, 1),
                attention_mask=None,
                past_key_values=None,
                or_mask_function=overlay,
            )

        config._attn_implementation = "fastattn"
        assert_linear(make)


def test_the_measure_sees_what_others_make():
    model = long_model("Llama").eval()
    model.set_attn_implementation("sdpa")
    with pytest.raises(AssertionError), torch.no_grad():
        assert_linear(lambda: model(**inputs("left padding"), logits_to_keep=1))

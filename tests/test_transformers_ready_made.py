"""transformers' own tools with models on fastattn: pipelines, Trainer, the Auto classes, parts of a model."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from ready_made import tokenizer  # noqa: E402
from transformers_senses import SENSES, text_and_image  # noqa: E402
from transformers_support import counted  # noqa: E402
from transformers_texts import TEXTS  # noqa: E402

from fastattn.integrations.transformers import FastCache, register  # noqa: E402

register()
transformers.logging.set_verbosity_error()

PROMPTS = ["w5 w6 w7 w8 w9", "w10", "w11 w12 w13"]
LENGTHS = (9, 4, 7, 12, 5, 6, 11, 8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Mistral, whose window is shorter than the texts, with a tokenizer that pads on the left."""
    folder = tmp_path_factory.mktemp("model")
    next(each for each in TEXTS if each.name == "Mistral").build().save_pretrained(folder)
    tokenizer(padding_side="left").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 9}], ids=str)
def test_pipeline(saved, way):
    written = []
    for attention in ("eager", "fastattn"):
        pipe = transformers.pipeline(
            "text-generation", model=str(saved), model_kwargs={"attn_implementation": attention}, batch_size=3
        )
        torch.manual_seed(0)
        with counted() as seen:
            written.append(pipe(PROMPTS, max_new_tokens=9, min_new_tokens=9, **{"do_sample": False, **way}))
    assert seen and written[0] == written[1]


def test_pipeline_with_a_cache_of_ours(saved):
    pipe = transformers.pipeline(
        "text-generation", model=str(saved), model_kwargs={"attn_implementation": "fastattn"}
    )
    cache = FastCache(config=pipe.model.config)
    options = {"max_new_tokens": 9, "do_sample": False}
    assert pipe(PROMPTS[0], **options, past_key_values=cache) == pipe(PROMPTS[0], **options)
    assert cache.get_seq_length() >= 9


def losses(saved, tmp_path, attention, collator, **options):
    """Of two steps of training, and of an evaluation after them."""
    texts = [{"input_ids": [4 + at * step % 95 for at in range(step)]} for step in LENGTHS]
    for text in texts:
        text["labels"] = text["input_ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(saved, attn_implementation=attention)
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )
    trainer = transformers.Trainer(
        model, arguments, data_collator=collator, train_dataset=texts, eval_dataset=texts
    )
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor([*found, trainer.evaluate()["eval_loss"]])


def test_trainer(saved, tmp_path):
    pytest.importorskip("accelerate")
    pad = transformers.DataCollatorForSeq2Seq(tokenizer(padding_side="right"))
    want = losses(saved, tmp_path, "eager", pad)
    with counted() as seen:
        got = losses(saved, tmp_path, "fastattn", pad)
    assert seen and want[0] - want[-1] > 0.1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("has_starts", [False, True], ids=["positions", "cu_seq_lens"])
def test_trainer_of_packed_texts(saved, tmp_path, has_starts):
    """One text after the other in a single row: the losses of the same texts with padding."""
    pytest.importorskip("accelerate")
    pad = transformers.DataCollatorForSeq2Seq(tokenizer(padding_side="right"))
    flat = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=has_starts)
    want = losses(saved, tmp_path, "eager", pad, per_device_eval_batch_size=8)
    got = losses(saved, tmp_path, "fastattn", flat, per_device_eval_batch_size=8)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


def test_from_config(saved):
    config = transformers.AutoConfig.from_pretrained(saved)
    model = transformers.AutoModel.from_config(config, attn_implementation="fastattn")
    with counted() as seen:
        model(torch.ones(1, 5, dtype=torch.int64))
    assert len(seen) == 2


@pytest.mark.parametrize("ours", ["text_config", "vision_config"])
def test_parts_of_a_model(tmp_path, ours):
    (architecture,) = (each for each in SENSES if each.name == "CLIP")
    architecture.build().save_pretrained(tmp_path)
    logits = []
    for attention in ("eager", "fastattn"):
        chosen = {"text_config": "eager", "vision_config": "eager", ours: attention}
        model = transformers.CLIPModel.from_pretrained(tmp_path, attn_implementation=chosen).eval()
        with counted() as seen:
            logits.append(model(**text_and_image()).logits_per_image)
    assert len(seen) == 2
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_cache_from_inference_mode(saved):
    """Read on by the same mode, by no_grad and where autograd records."""
    model = transformers.AutoModelForCausalLM.from_pretrained(saved, attn_implementation="fastattn").eval()
    ids = torch.randint(3, 90, (2, 12))
    want = model(ids).logits[:, 8:]
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        cache = FastCache(config=model.config)
        with torch.inference_mode():
            model(ids[:, :8], past_key_values=cache)
        with mode():
            got = [model(ids[:, at : at + 2], past_key_values=cache).logits for at in (8, 10)]
        torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)

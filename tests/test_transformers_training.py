"""Training models of transformers on fastattn: torch.compile, gradient checkpointing, LoRA, dropout."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers_support import counted  # noqa: E402
from transformers_texts import TEXTS  # noqa: E402
from transformers_zoo import left_padded, right_padded, seq2seq, token_ids  # noqa: E402

from fastattn.integrations.transformers import register  # noqa: E402

register()
transformers.logging.set_verbosity_error()

BY_NAME = {architecture.name: architecture for architecture in TEXTS}


def trained(model, **inputs):
    """Loss and gradients of one step."""
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(**inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def labelled(inputs):
    name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    inputs = {**inputs, "labels": inputs[name].clone()}
    inputs.pop("decoder_input_ids", None)
    return inputs


def same(ours, theirs):
    """Two orders of the same operations in float64, summed up to the size of a loss."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * (1 + other.abs().max().item()))


def built(name, **changed):
    """The model in float64, running on fastattn."""
    model = BY_NAME[name].build(**changed).double()
    model.set_attn_implementation("fastattn")
    return model


@pytest.mark.parametrize("inputs", [left_padded, lambda: {"input_ids": token_ids()}], ids=["padded", "plain"])
@pytest.mark.parametrize("name", ["Llama", pytest.param("Mistral", marks=pytest.mark.slow)])
def test_compile(name, inputs):
    """One graph, masks included, that trains as eager does."""
    model = built(name, num_hidden_layers=1)
    inputs = {**labelled(inputs()), "use_cache": False}
    expected = trained(model, **inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    same(trained(compiled, **inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Gemma 2", "BERT", "T5", "Qwen2"])
def test_compile_of_others(name):
    model = built(name).eval()
    inputs = BY_NAME[name].inputs()
    output = BY_NAME[name].output
    expected = model(**inputs)[output]
    torch._dynamo.reset()
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs)[output]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_compiled_decoding_is_one_graph():
    """A static cache's length is a tensor, and the mask with it, so that no step compiles anew."""
    from transformers import CompileConfig

    model = built("Llama", num_hidden_layers=1).eval()
    inputs = left_padded()
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(**inputs, **greedy, disable_compile=True)
    config = CompileConfig(backend="aot_eager", mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(model.generate(**inputs, **greedy, compile_config=config), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_gradient_checkpointing(name, use_reentrant):
    """T5 hands its bias from layer to layer, across the checkpoints."""
    model = built(name).train()
    inputs = labelled(seq2seq() if name == "T5" else right_padded())
    expected = trained(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with counted() as seen:
        got = trained(model, **inputs)
    layers = 6 if name == "T5" else 2
    assert len(seen) == 2 * layers  # each computed again
    same(got, expected)


def test_lora():
    peft = pytest.importorskip("peft")
    results = []
    for attention in ("eager", "fastattn"):
        model = built("Llama")
        model.set_attn_implementation(attention)
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        results.append(trained(peft.get_peft_model(model, config), **labelled(right_padded())))
    assert len(results[0]) == 1 + 2 * 2 * 2  # the loss; A and B of two projections in two layers
    theirs, ours = results
    for one, other in zip(ours, theirs, strict=True):
        # Llama's eager softmax rounds to float32.
        torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-4, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("use_cache", [True, False])
def test_prefix_tuning(use_cache):
    """Its prefix is a cache that has keys before the first token: more keys than queries from the start."""
    peft = pytest.importorskip("peft")
    results = []
    for attention in ("eager", "fastattn"):
        model = built("Llama").float()
        model.set_attn_implementation(attention)
        torch.manual_seed(0)
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        tuned = peft.get_peft_model(model, config).eval()
        results.append(tuned(**right_padded(), use_cache=use_cache).logits)
    real = right_padded()["attention_mask"].bool()
    torch.testing.assert_close(results[1][real], results[0][real], rtol=1e-4, atol=1e-4)


def test_dropout_is_of_the_weights():
    """In training as much as the config says, none in evaluation; the seed decides."""
    model = built("BERT", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    inputs = right_padded()

    def once(seed):
        torch.manual_seed(seed)
        return model(**inputs).last_hidden_state

    model.train()
    assert torch.equal(once(1), once(1)) and not torch.equal(once(1), once(2))
    attentions = model(**inputs, output_attentions=True).attentions[0]
    kept = attentions[0] != 0  # a text without padding
    assert 0.3 < kept.double().mean() < 0.7
    model.eval()
    assert torch.equal(once(1), once(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    architecture = BY_NAME["Llama"]
    inputs = right_padded()
    real = inputs["attention_mask"].bool()
    outputs = {}
    model = architecture.build().eval()
    for attention in ("eager", "fastattn"):
        model.set_attn_implementation(attention)
        outputs[attention] = model.to(dtype)(**inputs).logits[real].double()
    expected = architecture.build().double().eval()(**inputs).logits[real]
    native = (outputs["eager"] - expected).abs().max()
    assert (outputs["fastattn"] - expected).abs().max() <= 2 * native


def test_autocast():
    model = built("Llama").float().eval()
    with torch.autocast("cpu", torch.bfloat16), counted() as seen:
        got = model(**left_padded()).logits
    real = left_padded()["attention_mask"].bool()
    model.set_attn_implementation("eager")
    with torch.autocast("cpu", torch.bfloat16):
        native = model(**left_padded()).logits
    exact = model(**left_padded()).logits
    assert seen
    assert (got - exact)[real].abs().max() <= 2 * (native - exact)[real].abs().max()

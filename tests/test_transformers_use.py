"""Models of transformers on fastattn in use: ways to write, half precision, threads, files, copies."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers_texts import TEXTS  # noqa: E402
from transformers_zoo import left_padded, right_padded  # noqa: E402

import fastattn  # noqa: E402
from fastattn.integrations.transformers import FastCache, register  # noqa: E402

register()
transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.usefixtures("native", "one_thread")

BY_NAME = {architecture.name: architecture for architecture in TEXTS}


def built(name="Llama", attention="fastattn", **changed):
    model = BY_NAME[name].build(**changed).double().eval()
    model.set_attn_implementation(attention)
    return model


# Ways to write. Those with a helper or guesses go on with one text only.
WAYS = {
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "guessing": {"prompt_lookup_num_tokens": 2},
    "assisted": {"assistant_model": ...},
    "static": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("cache", [None, FastCache])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_ways_to_write(name, way, cache):
    """The very tokens of PyTorch's attention, in float64. (Eager attention makes NaN of padding there.)"""
    if cache and way == "static":
        pytest.skip("a cache of its own")
    options, inputs = dict(WAYS[way]), left_padded()
    if way in ("guessing", "assisted"):
        inputs = {key: value[1:] for key, value in inputs.items()}
    texts = []
    for attention in ("sdpa", "fastattn"):
        model = built(name, attention)
        if way == "assisted":
            options["assistant_model"] = built(name, attention, num_hidden_layers=1)
        if cache and attention == "fastattn":
            options["past_key_values"] = cache(config=model.config)
        torch.manual_seed(0)
        texts.append(model.generate(**inputs, **options, max_new_tokens=10, min_new_tokens=10))
    assert torch.equal(*texts)


def scores_of(model, ids, mask, cache):
    """The scores after each of the last four tokens, read one by one as `generate` does: [B, 4, n]."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found, start = [], ids.shape[1] - 4
    for begin, end in ((0, start + 1), *((at, at + 1) for at in range(start + 1, ids.shape[1]))):
        out = model(
            ids[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, begin:end],
            past_key_values=cache,
        )
        found.append(out.logits[:, -1])
    return torch.stack(found, 1).double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "gpt-oss"])
@torch.no_grad()
def test_writing_in_half_precision(name, dtype):
    """With a FastCache in that dtype: as close to float32 as twice eager attention's distance."""
    ids, mask = left_padded().values()
    exact = scores_of(built(name, "eager").float(), ids, mask, FastCache())
    native = scores_of(built(name, "eager").to(dtype), ids, mask, FastCache())
    model = built(name).to(dtype)
    cache = FastCache(config=model.config)
    ours = scores_of(model, ids, mask, cache)
    assert cache.layers[0].keys.dtype == dtype
    assert (ours - exact).abs().max() <= 2 * (native - exact).abs().max()


def test_several_threads_write_at_once():
    """One model, patched or registered; a cache for each."""
    model = built("Mistral")
    prompts = [ids[None] for ids in torch.randint(3, 90, (4, 9))]

    def write(ids):
        cache = FastCache(config=model.config)
        return model.generate(ids, max_new_tokens=12, do_sample=False, past_key_values=cache)

    want, got = [write(ids) for ids in prompts], {}
    threads = [
        threading.Thread(target=lambda at=at, ids=ids: got.update({at: write(ids)}))
        for at, ids in enumerate(prompts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[at], text) for at, text in enumerate(want))


def test_saved_and_loaded(tmp_path):
    """The implementation is the program's choice, not the file's."""
    model, inputs = built(), right_padded()
    want = model(**inputs).logits
    model.save_pretrained(tmp_path)
    assert "fastattn" not in (tmp_path / "config.json").read_text()
    loads = transformers.AutoModelForCausalLM.from_pretrained
    ours = loads(tmp_path, attn_implementation="fastattn", dtype=torch.float64).eval()
    assert ours.config._attn_implementation == "fastattn"
    assert torch.equal(ours(**inputs).logits, want)
    assert loads(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_copies_of_a_patched_model(how):
    """They stay on fastattn when the original is undone, and the original when a copy is."""
    model, inputs = built(attention="sdpa"), right_padded()
    report = fastattn.patch(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    other.set_attn_implementation("eager")
    assert model.config._attn_implementation == "fastattn"
    other.set_attn_implementation("fastattn")
    report.undo()
    assert (model.config._attn_implementation, other.config._attn_implementation) == ("sdpa", "fastattn")
    assert set(fastattn.patch(other).left.values()) == {"it is fastattn's already"}


def test_patches_of_a_model_and_its_part():
    """In any order; what was set in between by name is another's."""
    model = built(attention="sdpa")
    whole, part = fastattn.patch(model), fastattn.patch(model.model)
    assert not part.replaced
    whole.undo()
    part.undo()
    assert model.config._attn_implementation == "sdpa"
    part, whole = fastattn.patch(model.model), fastattn.patch(model)
    assert part.replaced and not whole.replaced
    whole.undo()
    assert model.config._attn_implementation == "fastattn"
    part.undo()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_patched_and_compiled():
    """Compiled code notices what is undone."""
    inputs = {**right_padded(), "use_cache": False}
    model = built(attention="sdpa", num_hidden_layers=1)
    real = inputs["attention_mask"].bool()
    want = model(**inputs).logits[real]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        with fastattn.patch(compiled) as report:
            assert len(report.replaced) == 1
            torch.testing.assert_close(compiled(**inputs).logits[real], want)
        torch.testing.assert_close(compiled(**inputs).logits[real], want)
    torch._dynamo.reset()

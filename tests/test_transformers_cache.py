"""FastCache: the same texts as with transformers' DynamicCache, without its copies."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, EncoderDecoderCache  # noqa: E402
from transformers_texts import TEXTS  # noqa: E402
from transformers_zoo import left_padded, right_padded  # noqa: E402

from fastattn.integrations.transformers import FastCache, register  # noqa: E402
from fastattn.integrations.transformers.cache import FastLayer, FastSlidingLayer  # noqa: E402

register()
transformers.logging.set_verbosity_error()

BY_NAME = {architecture.name: architecture for architecture in TEXTS}


def built(name):
    model = BY_NAME[name].build().eval()
    model.set_attn_implementation("fastattn")
    return model


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "guessed": {"prompt_lookup_num_tokens": 2},  # wrong guesses are cropped
    "in chunks": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["Llama", "Mistral", pytest.param("Gemma 2", marks=pytest.mark.slow)])
def test_generate(name, way):
    """Mistral's and Gemma's windows are shorter than the text, so that tokens leave the cache."""
    model, inputs = built(name), left_padded()
    if way == "guessed":  # for one text only
        inputs = {key: value[:1] for key, value in inputs.items()}
    texts = [
        model.generate(**inputs, max_new_tokens=14, do_sample=False, past_key_values=cache, **WAYS[way])
        for cache in (
            DynamicCache(config=model.config),
            FastCache(config=model.config),
            FastCache(model.config, capacity=40),
            FastCache(),
        )
    ]
    for text in texts[1:]:
        assert torch.equal(text, texts[0])


def test_encoder_decoder():
    model = built("T5")
    options = {**right_padded(), "max_new_tokens": 6, "do_sample": False}
    cache = EncoderDecoderCache(FastCache(), FastCache())
    assert torch.equal(model.generate(**options, past_key_values=cache), model.generate(**options))


def states(length, batch=2):
    return torch.randn(batch, 2, length, 4), torch.randn(batch, 2, length, 3)


@torch.no_grad()
def test_tokens_are_appended_in_place():
    """A token costs its own size: the buffer stays where it is until it is full, then doubles."""
    layer = FastLayer()
    layer.update(*states(8))
    moves, address = 0, layer.keys.data_ptr()
    for _ in range(100):
        keys, values = states(1)
        layer.update(keys, values)
        assert torch.equal(layer.keys[:, :, -1:], keys) and torch.equal(layer.values[:, :, -1:], values)
        moves, address = moves + (layer.keys.data_ptr() != address), layer.keys.data_ptr()
    assert layer.get_seq_length() == 108 and moves == 4  # 16, 32, 64, 128
    reserved = FastLayer(capacity=108)
    reserved.update(*states(8))
    address = reserved.keys.data_ptr()
    for _ in range(100):
        reserved.update(*states(1))
    assert reserved.keys.data_ptr() == address


@torch.no_grad()
def test_sliding_layers_forget():
    """As transformers' own, token for token; the buffer stays two windows long."""
    ours, theirs = FastSlidingLayer(6), transformers.cache_utils.DynamicSlidingWindowLayer(6)
    for length in (9, 1, 1, 4, 1, 1, 1, 12, 1, 1):
        new = states(length)
        for got, want in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(got, want)
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
    for _ in range(50):
        ours.update(*states(1))
    assert ours.cache.capacity == 12


@pytest.mark.parametrize("make", [FastLayer, lambda: FastSlidingLayer(6)], ids=["full", "sliding"])
def test_batches_and_resets(make):
    layer, other = make(), make()
    new = states(4)
    layer.update(*new), other.update(*new)
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.keys, new[0].repeat_interleave(2, 0))
    layer.batch_select_indices(torch.tensor([3, 0]))
    assert torch.equal(layer.values, new[1].flip(0))
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.keys, new[0])
    layer.crop(-2)
    assert layer.get_seq_length() == 2 and torch.equal(layer.keys, new[0][:, :, :2])
    more = states(1)
    layer.update(*more)
    assert torch.equal(layer.keys, torch.cat([new[0][:, :, :2], more[0]], 2))
    layer.reset()
    assert layer.get_seq_length() == 0
    layer.update(*new)
    assert torch.equal(layer.keys, other.keys)


def test_copies_are_independent():
    """A prompt's cache may be copied and continued in several ways."""
    model = built("Llama")
    ids = right_padded()["input_ids"][:1]
    with torch.no_grad():
        prompt = FastCache(config=model.config)
        model(ids[:, :8], past_key_values=prompt)
        outputs = [
            model(ids[:, 8:], past_key_values=copy.deepcopy(prompt)).logits,
            model(ids[:, 8:], past_key_values=prompt).logits,
            model(ids).logits[:, 8:],
        ]
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[1], outputs[2], rtol=1e-4, atol=1e-4)


def test_training_through_a_cache():
    """Where gradients flow, nothing is written in place."""
    model = built("Llama").double()
    ids = right_padded()["input_ids"][:1]
    gradients = []
    for cache in (FastCache(config=model.config), DynamicCache(config=model.config)):
        model.zero_grad()
        model(ids[:, :8], past_key_values=cache)
        model(ids[:, 8:], past_key_values=cache).logits.sin().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_training_of_queries_alone():
    """Keys that need no gradient are still wanted by the queries' backward, as they were."""
    model = built("Llama").double().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.requires_grad_(True)
    ids = right_padded()["input_ids"][:1]
    gradients = []
    for cache in (FastCache(model.config, capacity=30), DynamicCache(config=model.config)):
        model.zero_grad()
        total = model(ids[:, :6], past_key_values=cache).logits.sin().sum()
        cache.crop(-2)
        for part in (ids[:, 4:7], ids[:, 7:]):
            total = total + model(part, past_key_values=cache).logits.sin().sum()
        total.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("is_recording", [False, True])
@pytest.mark.parametrize(
    "choose",
    [
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([-1])),
    ],
    ids=["reorder", "repeat", "select"],
)
@torch.no_grad()
def test_sliding_layers_choose_what_they_recorded(choose, is_recording):
    ours, theirs = FastSlidingLayer(5), transformers.cache_utils.DynamicSlidingWindowLayer(5)
    first, second = states(6), states(3)
    for layer in (ours, theirs):
        layer.update(*first)
        if is_recording:
            layer.activate_past_recording()
        layer.update(*second)
        choose(layer)
    new = states(1, batch=theirs.keys.shape[0])
    for _ in range(2):
        for got, want in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(got, want)
        if is_recording:
            ours.crop(-1), theirs.crop(-1)
            choose(ours), choose(theirs)
            new = states(2, batch=theirs.keys.shape[0])


@torch.no_grad()
def test_keys_that_were_handed_out_stay_what_they_were():
    layer = FastLayer(capacity=20)
    keys, _ = layer.update(*states(6))
    before = keys.clone()
    layer.crop(-2)
    for _ in range(2):
        longer, _ = layer.update(*states(2))
        assert torch.equal(keys, before) and torch.equal(longer[:, :, :4], before[:, :, :4])
    address = layer.keys.data_ptr()
    layer.update(*states(1))
    assert layer.keys.data_ptr() == address  # copied once only


@pytest.mark.parametrize("capacity, error", [(-1, ValueError), (1.5, TypeError)])
def test_capacity_is_checked(capacity, error):
    with pytest.raises(error, match="capacity must be"):
        FastCache(capacity=capacity)


def test_repr():
    assert (
        repr(FastCache(config=built("Gemma 2").config)) == "FastCache(layers=[FastSlidingLayer, FastLayer])"
    )

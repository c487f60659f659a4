"""Positions are those of Hugging Face transformers: T5's buckets, rotary layouts, ALiBi's slopes."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch

from fastattn.biases import RelativePosition
from fastattn.nn import ALiBiBias, RotaryEmbedding

pytest.importorskip("transformers")

AT = torch.arange(5, 14)


def modeling(name: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def check_rotary(rotary: RotaryEmbedding, x: torch.Tensor, want: torch.Tensor) -> None:
    # Their angles are float32, each off by up to 2^-24 of itself; then there are products and a sum to round.
    bound = 2 * float(x.abs().max()) * (float(AT.max()) + 4) * 2**-24
    torch.testing.assert_close(rotary(x, offset=int(AT[0])), want, rtol=0, atol=bound)
    torch.testing.assert_close(rotary(x, positions=AT), want, rtol=0, atol=bound)
    assert not torch.allclose(rotary(x), want, atol=0.1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (64, 256), (8, 20)])
def test_t5_buckets(bidirectional, num_buckets, max_distance):
    relative = torch.arange(-1500, 1501)
    bias = RelativePosition(torch.zeros(num_buckets, 1), bidirectional, max_distance)
    want = modeling("t5").T5Attention._relative_position_bucket(
        relative, bidirectional, num_buckets, max_distance
    )
    assert torch.equal(bias.buckets(relative), want)


@pytest.mark.parametrize("model, part", [("llama", {}), ("gpt_neox", {"rotary_pct": 0.5})])
def test_rotary_by_halves(model, part):
    from transformers import AutoConfig

    theirs, x = modeling(model), torch.randn(2, 4, len(AT), 16)
    config = AutoConfig.for_model(model, hidden_size=64, num_attention_heads=4, **part)
    embedding = {"llama": "LlamaRotaryEmbedding", "gpt_neox": "GPTNeoXRotaryEmbedding"}[model]
    cos, sin = getattr(theirs, embedding)(config)(x, AT.expand(2, -1))
    want, _ = theirs.apply_rotary_pos_emb(x, x, cos, sin)
    assert cos.shape[-1] == (8 if part else 16)
    check_rotary(RotaryEmbedding(16, rotary_dim=cos.shape[-1]), x, want)


def test_rotary_interleaved_of_a_part():
    theirs, x = modeling("gptj"), torch.randn(2, 4, len(AT), 16)
    sin, cos = theirs.create_sinusoidal_positions(64, 8)[AT.expand(2, -1)].split(4, -1)
    turned = theirs.apply_rotary_pos_emb(x[..., :8].transpose(1, 2), sin, cos).transpose(1, 2)
    rotary = RotaryEmbedding(16, rotary_dim=8, layout="interleaved")
    check_rotary(rotary, x, torch.cat([turned, x[..., 8:]], -1))


@pytest.mark.parametrize("heads", [8, 12])
def test_alibi_slopes(heads):
    bias = modeling("bloom").build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)
    torch.testing.assert_close(ALiBiBias(heads).slopes, bias[:, 0, 1], rtol=4 * 2**-23, atol=0)

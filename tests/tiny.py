"""Sizes of the tiny models of transformers that the tests build, by the names of transformers' options."""

from __future__ import annotations

from typing import Any

LAYERS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
ENCODER_DECODER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
MARKS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT: dict[str, Any] = {**LAYERS, "max_position_embeddings": 64, **MARKS}
IMAGE: dict[str, Any] = {**LAYERS, "image_size": 32, "patch_size": 8}

"""Tiny models of pictures, sounds and pages whose attention is not on transformers' interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from off_interface_zoo import GPT, STAGES, SWIN, TEXT
from patch_support import rand
from tiny import IMAGE
from torch import Tensor

B, L = 2, 8
IDS = torch.randint(4, 60, (B, L), generator=torch.Generator().manual_seed(0))
REAL = torch.ones(B, L, dtype=torch.long)
REAL[1, 5:] = 0


def pixels() -> dict[str, Any]:
    return {"pixel_values": rand(B, 3, 32, 32)}


def text() -> dict[str, Any]:
    return {"input_ids": IDS, "attention_mask": REAL}


def page() -> dict[str, Any]:
    corners = torch.randint(0, 30, (B, L, 2), generator=torch.Generator().manual_seed(1))
    return {**text(), "bbox": torch.cat([corners, corners + 4], -1)}


@dataclass(frozen=True)
class Sense:
    """One model.

    Args:
        model, config: names of transformers' classes.
        options: of the config.
        inputs: makes the model's arguments.
        asks: whether the model returns weights for `output_attentions=True`.
    """

    model: str
    config: str
    options: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    asks: bool = True


def waves() -> dict[str, Tensor]:
    real = torch.ones(B, 160, dtype=torch.long)
    real[1, 120:] = 0
    return {"input_values": rand(B, 160), "attention_mask": real}


WAVES = {
    **{key: value for key, value in TEXT.items() if key != "max_position_embeddings"},
    "conv_dim": [16, 16],
    "conv_stride": [4, 2],
    "conv_kernel": [8, 4],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
}
BARK = {
    "block_size": 64,
    "input_vocab_size": 64,
    "output_vocab_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_size": 32,
}
SAM = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 48,
}
IMAGE_TEXT = {"vision_config": {**IMAGE}}

SENSES: dict[str, Sense] = {
    "Vilt": Sense("ViltModel", "ViltConfig", {**TEXT, **IMAGE}, lambda: {**text(), **pixels()}),
    "WavLM": Sense(
        "WavLMModel", "WavLMConfig", {**WAVES, "num_buckets": 32, "max_bucket_distance": 40}, waves
    ),
    "Git": Sense("GitModel", "GitConfig", {**TEXT, **IMAGE_TEXT}, lambda: {**text(), **pixels()}),
    "BlipText": Sense("BlipTextModel", "BlipTextConfig", {**TEXT, "encoder_hidden_size": 32}, text),
    "BlipVision": Sense("BlipVisionModel", "BlipVisionConfig", IMAGE, pixels),
    "FlavaText": Sense("FlavaTextModel", "FlavaTextConfig", TEXT, text),
    "FlavaImage": Sense("FlavaImageModel", "FlavaImageConfig", IMAGE, pixels),
    "Bros": Sense(
        "BrosModel",
        "BrosConfig",
        {**TEXT, "hidden_size": 64},
        lambda: {**text(), "bbox": torch.rand(B, L, 8, generator=torch.Generator().manual_seed(1))},
    ),
    "LayoutLMv3": Sense(
        "LayoutLMv3Model",
        "LayoutLMv3Config",
        {
            **TEXT,
            "coordinate_size": 6,
            "shape_size": 4,
            "max_2d_position_embeddings": 64,
            "input_size": 32,
            "patch_size": 8,
        },
        lambda: {**page(), **pixels()},
    ),
    "Lilt": Sense(
        "LiltModel", "LiltConfig", {**TEXT, "hidden_size": 48, "max_2d_position_embeddings": 64}, page
    ),
    "BarkSemantic": Sense("BarkSemanticModel", "BarkSemanticConfig", BARK, text),
    "CodeGen": Sense(
        "CodeGenModel",
        "CodeGenConfig",
        {**GPT, "rotary_dim": 4},
        lambda: {"input_ids": IDS, "attention_mask": REAL},
    ),
    "ImageGPT": Sense("ImageGPTModel", "ImageGPTConfig", GPT, text),
    "ImageGPT in float32": Sense(
        "ImageGPTModel", "ImageGPTConfig", {**GPT, "reorder_and_upcast_attn": True}, text
    ),
    "Cvt": Sense(
        "CvtModel",
        "CvtConfig",
        {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
        lambda: {"pixel_values": rand(B, 3, 64, 64)},
        False,
    ),
    "Levit": Sense(
        "LevitModel",
        "LevitConfig",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [4, 4, 4],
        },
        lambda: {"pixel_values": rand(B, 3, 64, 64)},
        False,
    ),
    "MobileViT": Sense(
        "MobileViTModel",
        "MobileViTConfig",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32]},
        lambda: {"pixel_values": rand(B, 3, 64, 64)},
        False,
    ),
    "PvtV2": Sense("PvtV2Model", "PvtV2Config", {**STAGES, "image_size": 32}, pixels),
    "Mgpstr": Sense(
        "MgpstrModel",
        "MgpstrConfig",
        {
            "image_size": [32, 32],
            "patch_size": 8,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        pixels,
    ),
    "GroupViTVision": Sense(
        "GroupViTVisionModel",
        "GroupViTVisionConfig",
        {
            **IMAGE,
            "depths": [1, 1, 1],
            "num_hidden_layers": 3,
            "num_group_tokens": [4, 2, 0],
            "num_output_groups": [4, 2, 2],
        },
        pixels,
        False,
    ),
    "SegGpt": Sense(
        "SegGptModel",
        "SegGptConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": [64, 32],
            "patch_size": 8,
            "pretrain_image_size": 32,
            "merge_index": 0,
            "intermediate_hidden_state_indices": [0, 1],
            "decoder_hidden_size": 8,
        },
        lambda: {
            name: rand(B, 3, 32, 32, seed=at)
            for at, name in enumerate(("pixel_values", "prompt_pixel_values", "prompt_masks"))
        },
    ),
    "SpeechT5": Sense(
        "SpeechT5EncoderWithTextPrenet",
        "SpeechT5Config",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_layers": 1,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 48,
        },
        lambda: {"input_values": IDS, "attention_mask": REAL},
    ),
    "TrOCR": Sense(
        "TrOCRForCausalLM",
        "TrOCRConfig",
        {
            "vocab_size": 64,
            "d_model": 32,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
        },
        text,
    ),
    "MaskFormerSwin": Sense("MaskFormerSwinModel", "MaskFormerSwinConfig", SWIN, pixels, False),
    "Swin2SR": Sense(
        "Swin2SRModel",
        "Swin2SRConfig",
        {**SWIN, "patch_size": 1, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4},
        pixels,
    ),
    "ClapAudio": Sense(
        "ClapAudioModel",
        "ClapAudioConfig",
        {
            "window_size": 4,
            "num_mel_bins": 16,
            "spec_size": 64,
            "patch_embeds_hidden_size": 16,
            "hidden_size": 32,
            "depths": [1, 1],
            "num_hidden_layers": 2,
            "num_attention_heads": [2, 2],
        },
        lambda: {"input_features": rand(B, 1, 60, 16), "is_longer": torch.zeros(B, 1, dtype=torch.bool)},
    ),
    "ClvpEncoder": Sense(
        "ClvpEncoder",
        "ClvpEncoderConfig",
        {**TEXT, "hidden_size": 128, "projection_dim": 16},
        text,
    ),
    "SamVision": Sense("SamVisionModel", "SamVisionConfig", SAM, pixels, False),
    "GotOcr2Vision": Sense("GotOcr2VisionEncoder", "GotOcr2VisionConfig", SAM, pixels),
    "PegasusX": Sense(
        "PegasusXModel",
        "PegasusXConfig",
        {
            "vocab_size": 64,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_global_tokens": 2,
            "block_size": 4,
            "max_position_embeddings": 64,
        },
        lambda: {**text(), "decoder_input_ids": IDS},
    ),
    "FastSpeech2Conformer": Sense(
        "FastSpeech2ConformerModel",
        "FastSpeech2ConformerConfig",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_linear_units": 32,
            "decoder_linear_units": 32,
            "num_mel_bins": 8,
            "speech_decoder_postnet_units": 16,
            "speech_decoder_postnet_layers": 2,
            "pitch_predictor_channels": 16,
            "energy_predictor_channels": 16,
            "duration_predictor_channels": 16,
        },
        text,
    ),
}

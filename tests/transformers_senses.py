"""Tiny random models that see, hear, or do several things at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import tiny
import torch
from tiny import IMAGE as VISION
from transformers_texts import GROUPED, TEXT
from transformers_zoo import (
    VOCABULARY,
    Architecture,
    Inputs,
    floats,
    left_padded,
    right_padded,
    token_ids,
)

PICTURE_TOKEN = VOCABULARY

SPEECH = {
    **tiny.LAYERS,
    "vocab_size": VOCABULARY,
    "conv_dim": (16, 16),
    "conv_kernel": (5, 3),
    "conv_stride": (4, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
    "feat_extract_norm": "layer",
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}


def image() -> Inputs:
    return {"pixel_values": floats(2, 3, 32, 32)}


def waveform() -> Inputs:
    """Two sounds, the second of which ends in padding."""
    mask = torch.ones(2, 400, dtype=torch.int64)
    mask[1, 250:] = 0
    return {"input_values": floats(2, 400) * mask, "attention_mask": mask}


def spectrogram() -> Inputs:
    """Two sounds for Whisper, which knows no padding, and the text so far."""
    return {"input_features": floats(2, 8, 40), "decoder_input_ids": token_ids(7)}


def padded_features() -> Inputs:
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, 28:] = 0
    return {"input_features": floats(2, 40, 8), "attention_mask": mask, "decoder_input_ids": token_ids(7)}


def spectrum() -> Inputs:
    return {"input_values": floats(2, 24, 16)}


def text_and_image() -> Inputs:
    return {**right_padded(), **image()}


def picture_in_text(padded: Callable[[int], Inputs] = right_padded) -> Inputs:
    """Padded texts that begin with the 16 patches of a picture."""
    inputs = padded(24)
    inputs["input_ids"][:, 4:20] = PICTURE_TOKEN
    return {**inputs, **image()}


def marked_picture_in_text(padded: Callable[[int], Inputs] = right_padded) -> Inputs:
    """The same for models that are told where the picture is."""
    inputs = picture_in_text(padded)
    return {**inputs, "token_type_ids": (inputs["input_ids"] == PICTURE_TOKEN).long()}


def patches_in_text(padded: Callable[[int], Inputs] = right_padded) -> Inputs:
    """The same for Qwen2-VL: 16 patches, merged four to a token, after the mark of a picture's start."""
    inputs = padded(14)
    inputs["input_ids"][:, 4] = 1
    inputs["input_ids"][:, 5:9] = PICTURE_TOKEN
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == PICTURE_TOKEN).int()
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    return {**inputs, "pixel_values": floats(32, 3 * 2 * 8 * 8), "image_grid_thw": grid}


def sound_in_text(padded: Callable[[int], Inputs] = right_padded) -> Inputs:
    """The same for Qwen2-Audio: 40 frames, pooled four to a token."""
    inputs = padded(18)
    inputs["input_ids"][:, 4:14] = PICTURE_TOKEN
    frames = torch.ones(2, 40, dtype=torch.int64)
    return {**inputs, "input_features": floats(2, 8, 40), "feature_attention_mask": frames}


def begun_transcripts() -> Inputs:
    """Two sounds, and what was written of them so far, the first padded on the left."""
    texts = {f"decoder_{name}": value for name, value in left_padded(6).items()}
    return {"input_features": floats(2, 8, 40), **texts}


def trajectory() -> Inputs:
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[0, :2] = 0
    return {
        "states": floats(2, 5, 3),
        "actions": floats(2, 5, 2),
        "rewards": floats(2, 5, 1),
        "returns_to_go": floats(2, 5, 1),
        "timesteps": torch.arange(5).expand(2, 5),
        "attention_mask": mask,
    }


def series() -> Inputs:
    return {"past_values": floats(2, 24, 2)}


def _see(name: str, model: str, options: dict[str, Any], **more: Any) -> Architecture:
    config = more.pop("config", f"{model}Config")
    more.setdefault("output", "last_hidden_state")
    return Architecture(name, "vision", f"{model}Model", config, options, image, **more)


_RESNET = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 8],
        "depths": [1, 1],
        "out_features": ["stage2"],
    },
    **tiny.ENCODER_DECODER,
    "num_queries": 5,
}

VISIONS = [
    _see("ViT", "ViT", VISION),
    _see("DeiT", "DeiT", VISION),
    _see("BEiT", "Beit", {**VISION, "use_relative_position_bias": True, "layer_scale_init_value": 0.5}),
    _see(
        "Swin",
        "Swin",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "drop_path_rate": 0.0,
        },
    ),
    _see("DINOv2", "Dinov2", {**VISION, "mlp_ratio": 2}),
    _see("SigLIP vision", "SiglipVision", VISION),
    _see("YOLOS", "Yolos", {**VISION, "image_size": [32, 32], "num_detection_tokens": 5}),
    _see("DETR", "Detr", _RESNET),
    _see("Conditional DETR", "ConditionalDetr", _RESNET),
]


def _hear(name: str, model: str, options: dict[str, Any], inputs: Any, **more: Any) -> Architecture:
    return Architecture(name, "audio", model, more.pop("config"), options, inputs, **more)


_SPEECH_TO_TEXT = {
    **tiny.ENCODER_DECODER,
    **tiny.MARKS,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 1,
}

AUDIOS = [
    _hear(
        "Whisper",
        "WhisperForConditionalGeneration",
        {
            **_SPEECH_TO_TEXT,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 40,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        spectrogram,
        config="WhisperConfig",
        prompts=begun_transcripts,
    ),
    _hear(
        "Speech2Text",
        "Speech2TextForConditionalGeneration",
        {
            **_SPEECH_TO_TEXT,
            "input_feat_per_channel": 8,
            "num_conv_layers": 1,
            "conv_kernel_sizes": (3,),
            "conv_channels": 16,
            "max_source_positions": 60,
            "max_target_positions": 40,
        },
        padded_features,
        config="Speech2TextConfig",
        prompts=padded_features,
        ignores_padding=False,  # its convolutions see the padding
    ),
    *(
        _hear(name, f"{model}Model", SPEECH, waveform, config=f"{model}Config", output="last_hidden_state")
        for name, model in (
            ("wav2vec2", "Wav2Vec2"),
            ("HuBERT", "Hubert"),
            ("UniSpeech", "UniSpeech"),
            ("Data2Vec audio", "Data2VecAudio"),
        )
    ),
    _hear(
        "AST",
        "ASTModel",
        {**VISION, "num_mel_bins": 16, "max_length": 24},
        spectrum,
        config="ASTConfig",
        output="last_hidden_state",
    ),
]

_CLIP_TEXT = {**TEXT, "eos_token_id": 98}
MULTIMODAL = [
    Architecture(
        "CLIP",
        "multimodal",
        "CLIPModel",
        "CLIPConfig",
        {"text_config": _CLIP_TEXT, "vision_config": VISION, "projection_dim": 16},
        text_and_image,
        "logits_per_image",
    ),
    Architecture(
        "SigLIP",
        "multimodal",
        "SiglipModel",
        "SiglipConfig",
        {"text_config": _CLIP_TEXT, "vision_config": VISION},
        text_and_image,
        "logits_per_image",
    ),
    Architecture(
        "LLaVA",
        "multimodal",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {**GROUPED, "vocab_size": VOCABULARY + 1, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "image_token_index": PICTURE_TOKEN,
            "vision_feature_layer": -1,
        },
        picture_in_text,
        prompts=partial(picture_in_text, left_padded),
    ),
    Architecture(
        "PaliGemma",
        "multimodal",
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {
            "text_config": {**GROUPED, "vocab_size": VOCABULARY + 1, "model_type": "gemma", "head_dim": 8},
            "vision_config": {**VISION, "model_type": "siglip_vision_model", "projection_dim": 32},
            "image_token_index": PICTURE_TOKEN,
            "projection_dim": 32,
            "hidden_size": 32,
        },
        marked_picture_in_text,
        prompts=partial(marked_picture_in_text, left_padded),
    ),
    Architecture(
        "Gemma 3 multimodal",
        "multimodal",
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {
                **GROUPED,
                "vocab_size": VOCABULARY + 1,
                "model_type": "gemma3_text",
                "head_dim": 8,
                "sliding_window": 4,
            },
            "vision_config": {**VISION, "model_type": "siglip_vision_model"},
            "image_token_index": PICTURE_TOKEN,
            "mm_tokens_per_image": 16,
        },
        marked_picture_in_text,
        prompts=partial(marked_picture_in_text, left_padded),
    ),
    Architecture(
        "Qwen2-VL",
        "multimodal",
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": {
                **GROUPED,
                "vocab_size": VOCABULARY + 1,
                "rope_parameters": {
                    "rope_type": "default",
                    "mrope_section": [1, 1, 2],
                    "rope_theta": 10000.0,
                },
            },
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 8,
                "spatial_merge_size": 2,
            },
            "image_token_id": PICTURE_TOKEN,
            "vision_start_token_id": 1,
        },
        patches_in_text,
        prompts=partial(patches_in_text, left_padded),
    ),
    Architecture(
        "Qwen2-Audio",
        "multimodal",
        "Qwen2AudioForConditionalGeneration",
        "Qwen2AudioConfig",
        {
            "text_config": {**GROUPED, "vocab_size": VOCABULARY + 1, "model_type": "qwen2"},
            "audio_config": {
                "num_mel_bins": 8,
                "d_model": 32,
                "encoder_layers": 2,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 48,
                "max_source_positions": 20,
                "model_type": "qwen2_audio_encoder",
            },
            "audio_token_index": PICTURE_TOKEN,
        },
        sound_in_text,
        prompts=partial(sound_in_text, left_padded),
    ),
]

OTHERS = [
    Architecture(
        "DecisionTransformer",
        "other",
        "DecisionTransformerModel",
        "DecisionTransformerConfig",
        {"state_dim": 3, "act_dim": 2, "hidden_size": 32, "n_layer": 2, "n_head": 4, "max_ep_len": 16},
        trajectory,
        "action_preds",
    ),
    Architecture(
        "PatchTST",
        "other",
        "PatchTSTModel",
        "PatchTSTConfig",
        {
            "num_input_channels": 2,
            "context_length": 24,
            "patch_length": 4,
            "patch_stride": 4,
            "d_model": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 48,
        },
        series,
        "last_hidden_state",
    ),
]

SENSES = [*VISIONS, *AUDIOS, *MULTIMODAL, *OTHERS]

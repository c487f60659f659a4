"""Single attention modules of transformers off its interface, of models too large to build for a test."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from patch_support import rand
from torch import Tensor

CONFIG = SimpleNamespace(
    hidden_size=32,
    num_attention_heads=4,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    attention_dropout=0.0,
    attention_probs_dropout_prob=0.0,
    hidden_dropout_prob=0.0,
    layer_norm_eps=1e-5,
    qkv_bias=True,
    use_bias=True,
    is_decoder=False,
    fast_qkv=True,
    has_relative_attention_bias=True,
    has_spatial_attention_bias=True,
    window_size=2,
    # Granite's conformer
    hidden_dim=32,
    num_heads=4,
    dim_head=8,
    context_size=4,
    max_pos_emb=8,
    dropout=0.0,
    # LongT5
    d_model=32,
    d_kv=8,
    dropout_rate=0.0,
    local_radius=2,
    global_block_size=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    layer_norm_epsilon=1e-5,
    # SAM
    image_size=16,
    patch_size=4,
    use_rel_pos=True,
)
X, Y = rand(2, 6, 32), rand(2, 5, 32, seed=1)
MAP = rand(2, 32, 3, 3)
MASK = torch.zeros(2, 1, 1, 6, dtype=torch.bool)
MASK[0, ..., 4:] = True
ADDED = MASK * torch.finfo(torch.float32).min
BIASES = {"rel_pos": rand(2, 4, 6, 6, seed=2), "rel_2d_pos": rand(2, 4, 6, 6, seed=3)}
DISTANCES = torch.arange(4)[:, None] - torch.arange(4) + 8

Part = tuple[str, tuple[Any, ...], Callable[[Any], Any]]

# class -> (the module of transformers.models that it is in, arguments of the class, a call of the module)
PARTS: dict[str, Part] = {
    "GroundingDinoMultiheadAttention": ("grounding_dino", (CONFIG, 4), lambda m: m(X, Y, Y)),
    "MMGroundingDinoMultiheadAttention": ("mm_grounding_dino", (CONFIG, 4), lambda m: m(X, Y, Y)),
    "OmDetTurboMultiheadAttention": ("omdet_turbo", (None, 32, 4, 0.0), lambda m: m(X, Y, Y)),
    "ZoeDepthMultiheadAttention": ("zoedepth", (32, 4, 0.0), lambda m: m(X, Y, Y)),
    "TableTransformerAttention": ("table_transformer", (32, 4), lambda m: m(X, object_queries=0.5 * X)),
    "Mask2FormerAttention": ("mask2former", (32, 4), lambda m: m(X, position_embeddings=0.5 * X)),
    "OneFormerAttention": ("oneformer", (32, 4), lambda m: m(X, position_embeddings=0.5 * X)),
    "OneFormerTextMapperAttention": ("oneformer", (32, 4), lambda m: m(X, Y, Y)),
    "DetrAttention": ("dab_detr", (CONFIG,), lambda m: m(X, object_queries=0.5 * X)),
    "DabDetrAttention": ("dab_detr", (CONFIG,), lambda m: m(X, key_states=Y, value_states=Y)),
    "EvollaSequenceCompressorAttention": (
        "evolla",
        (32, 8, 4),
        lambda m: m(X, Y, torch.cat([~MASK[:, 0, 0], torch.ones(2, 5)], 1).bool()),
    ),
    "Aimv2AttentionPoolingHead": ("aimv2", (CONFIG,), lambda m: m(X)),
    "Data2VecVisionSelfAttention": (
        "data2vec_vision",
        (CONFIG,),
        lambda m: m(X, relative_position_bias=BIASES["rel_pos"][:1]),
    ),
    "TvpAttention": ("tvp", (CONFIG,), lambda m: m(X, ADDED)),
    "PPDocLayoutV2ReadingOrderSelfAttention": ("pp_doclayout_v2", (CONFIG,), lambda m: m(X, ADDED, **BIASES)),
    "LayoutLMv2SelfAttention": ("layoutlmv2", (CONFIG,), lambda m: m(X, MASK, **BIASES)),
    "SuperGlueSelfAttention": ("superglue", (CONFIG,), lambda m: m(X, ADDED)),
    "VitsAttention": ("vits", (CONFIG,), lambda m: m(X)),
    "BigBirdPegasusSelfAttention": ("bigbird_pegasus", (CONFIG,), lambda m: m(X, ADDED)),
    "JanusVQVAEAttnBlock": ("janus", (32,), lambda m: m(MAP)),
    "ChameleonVQVAEEncoderAttnBlock": ("chameleon", (32,), lambda m: m(MAP)),
    "GraniteSpeechConformerAttention": ("granite_speech", (CONFIG,), lambda m: m(X, DISTANCES)),
    "GraniteSpeechPlusConformerAttention": ("granite_speech_plus", (CONFIG,), lambda m: m(X, DISTANCES)),
    "SamHQVisionSdpaAttention": ("sam_hq", (CONFIG, 4), lambda m: m(rand(2, 4, 4, 32))),
    "DeepseekOcr2SamVisionSdpaAttention": ("deepseek_ocr2", (CONFIG, 4), lambda m: m(rand(2, 4, 4, 32))),
    "UnlimitedOcrSamVisionSdpaAttention": ("unlimited_ocr", (CONFIG, 4), lambda m: m(rand(2, 4, 4, 32))),
    "LongT5LocalAttention": ("longt5", (CONFIG, True), lambda m: m(X)),
    "LongT5TransientGlobalAttention": (
        "longt5",
        (CONFIG, True),
        lambda m: m(X, mask=(~MASK[:, 0, 0]).long()),
    ),
    "EsmFoldSelfAttention": ("esmfold", (32, 4, 8), lambda m: m(X)),
    "EsmFoldAttention": ("esmfold", (32, 32, 32, 8, 4), lambda m: m(X, Y)),
}

# Modules that no test runs, which the docs name.
UNTRIED = frozenset(
    {
        "EsmFoldInvariantPointAttention",
        "EvollaSequenceAlignerCrossAttention",
        "Gemma4AudioAttention",
        "GroundingDinoBiMultiHeadAttention",
        "MMGroundingDinoBiMultiHeadAttention",
    }
)

# A softmax and products in one class that are no attention: losses, routers, indices of keys.
NOT_ATTENTION = frozenset(
    {
        "AXK2Indexer",
        "ClapModel",
        "DeepseekV32Indexer",
        "DogeCDMoE",
        "Dots3NoteTextIndexer",
        "EfficientLoFTRForKeypointMatching",
        "EsmFold2ConfidenceHead",
        "Glm5NextTextIndexer",
        "GlmMoeDsaIndexer",
        "GroupViTModel",
        "HYV4Indexer",
        "Inkling2BlockAttentionResidual",
        "MistralLarge4TextIndexer",
        "RagTokenForGeneration",
        "XCLIPModel",
    }
)


def tensors(output: Any) -> list[Tensor]:
    found = output if isinstance(output, tuple) else (output,)
    return [t for t in found if isinstance(t, Tensor)]

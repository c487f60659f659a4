"""Tiny configurations of transformers' models whose attention is not on its interface."""

from __future__ import annotations

from typing import Any

import tiny

TEXT = {"vocab_size": 64, **tiny.TEXT}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BART = {"vocab_size": 64, **tiny.ENCODER_DECODER}
XLM = {"vocab_size": 64, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
STAGES = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "hidden_sizes": [16, 32],
    "num_attention_heads": [2, 4],
    "sr_ratios": [2, 1],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "mlp_ratios": [2, 2],
}
SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 1],
    "num_heads": [2, 2],
    "window_size": 2,
}
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}

# Decoders, which generate: name of the config -> its options.
DECODERS: dict[str, dict[str, Any]] = {
    "Bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Falcon": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "alibi": True,
    },
    "Mpt": {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "GPTJ": {**GPT, "rotary_dim": 4},
    "GPTNeo": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
        "max_position_embeddings": 64,
        "intermediate_size": 48,
    },
    "GPTNeoXJapanese": {**TEXT, "intermediate_multiple_size": 1},
    "XGLM": {
        "vocab_size": 64,
        "d_model": 32,
        "num_layers": 2,
        "attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 64,
    },
    "OpenAIGPT": GPT,
}

# All others: the same.
OTHERS: dict[str, dict[str, Any]] = {
    "XLNet": {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "Deberta": {**TEXT, **DEBERTA},
    "DebertaV2": {**TEXT, **DEBERTA, "position_buckets": 8},
    "BigBird": {**TEXT, "attention_type": "original_full"},
    "Longformer": {**TEXT, "attention_window": 4},
    "LED": {
        **BART,
        "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64,
        "attention_window": 4,
    },
    "RoFormer": TEXT,
    "RemBert": {**TEXT, "input_embedding_size": 16, "output_embedding_size": 16},
    "Canine": {**TEXT, "num_hash_functions": 2, "num_hash_buckets": 16},
    "Tapas": TEXT,
    "ConvBert": {**TEXT, "head_ratio": 2, "embedding_size": 32},
    "IBert": TEXT,
    "MPNet": TEXT,
    "MegatronBert": TEXT,
    "Luke": {**TEXT, "entity_vocab_size": 8, "entity_emb_size": 16},
    "SqueezeBert": {**TEXT, "embedding_size": 32},
    "Yoso": TEXT,
    "Flaubert": XLM,
    "XLM": XLM,
    "ProphetNet": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
    },
    "FSMT": {
        **tiny.ENCODER_DECODER,
        "src_vocab_size": 64,
        "tgt_vocab_size": 64,
        "max_position_embeddings": 64,
    },
    "Mvp": {**BART, "max_position_embeddings": 64},
    "Funnel": {
        "vocab_size": 64,
        "block_sizes": [1, 1],
        "d_model": 32,
        "n_head": 4,
        "d_head": 8,
        "d_inner": 48,
    },
    "VisualBert": {**TEXT, "visual_embedding_dim": 16},
    "Lxmert": {**TEXT, "l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 16},
    "CpmAnt": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "dim_head": 8,
        "dim_ff": 48,
        "num_hidden_layers": 2,
    },
    "Perceiver": {
        "num_latents": 4,
        "d_latents": 32,
        "d_model": 16,
        "num_blocks": 1,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "Swinv2": SWIN,
    "DonutSwin": SWIN,
    "Pvt": {
        **{key: value for key, value in STAGES.items() if key != "sr_ratios"},
        "image_size": 32,
        "sequence_reduction_ratios": [2, 1],
        "patch_sizes": [4, 2],
    },
    "GLPN": {**STAGES, "decoder_hidden_size": 16},
    "VitDet": {
        **{key: value for key, value in tiny.IMAGE.items() if key != "intermediate_size"},
        "window_size": 2,
        "window_block_indices": [0],
        "use_relative_position_embeddings": True,
        "pretrain_image_size": 32,
    },
    "Data2VecVision": {**tiny.IMAGE, "use_relative_position_bias": True},
    "Timesformer": {**tiny.IMAGE, "num_frames": 2},
    "Hiera": {
        "embed_dim": 16,
        "image_size": [32, 32],
        "patch_size": [7, 7],
        "patch_stride": [4, 4],
        "patch_padding": [3, 3],
        "mlp_ratio": 2.0,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "embed_dim_multiplier": 2.0,
        "num_query_pool": 1,
        "query_stride": [2, 2],
        "masked_unit_size": [4, 4],
        "masked_unit_attention": [True, False],
    },
}

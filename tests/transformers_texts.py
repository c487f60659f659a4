"""Tiny random models of text, with options that make each feature of their attention bite."""

from __future__ import annotations

from typing import Any

import tiny
from transformers_zoo import VOCABULARY, Architecture, left_padded, right_padded, seq2seq, sources

TEXT = {"vocab_size": VOCABULARY, **tiny.TEXT}
GROUPED = {**TEXT, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _decoder(
    name: str, model: str, options: dict[str, Any], family: str = "decoder", **more: Any
) -> Architecture:
    config = more.pop("config", f"{model}Config")
    suffix = more.pop("suffix", "ForCausalLM")
    return Architecture(
        name, family, f"{model}{suffix}", config, options, right_padded, prompts=left_padded, **more
    )


def _encoder(name: str, model: str, options: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(
        name, "encoder", f"{model}Model", f"{model}Config", options, right_padded, "last_hidden_state", **more
    )


DECODERS = [
    _decoder("Llama", "Llama", GROUPED),
    _decoder(
        "Mistral", "Mistral", {**GROUPED, "sliding_window": 4}, without={"window": {"sliding_window": None}}
    ),
    _decoder(
        "Qwen2",
        "Qwen2",
        {**GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        without={"window": {"use_sliding_window": False, "layer_types": ["full_attention"] * 2}},
    ),
    _decoder("Qwen3", "Qwen3", {**GROUPED, "head_dim": 8}),
    _decoder(
        "Gemma 2",
        "Gemma2",
        {**GROUPED, "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 0.5},
        without={"softcap": {"attn_logit_softcapping": None}, "window": {"sliding_window": 64}},
    ),
    _decoder(
        "Gemma 3",
        "Gemma3",
        {
            **GROUPED,
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        config="Gemma3TextConfig",
        without={"window": {"sliding_window": 64}},
    ),
    _decoder("GPT-2", "GPT2", {**TEXT, "n_inner": 48}, suffix="LMHeadModel"),
    _decoder("GPT-NeoX", "GPTNeoX", TEXT),
    _decoder("OPT", "OPT", {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    _decoder("Phi-3", "Phi3", {**GROUPED, "sliding_window": 4}, without={"window": {"sliding_window": None}}),
    _decoder("StableLM", "StableLm", GROUPED),
    _decoder("Starcoder2", "Starcoder2", {**GROUPED, "sliding_window": 4}),
    _decoder(
        "Cohere 2",
        "Cohere2",
        {**GROUPED, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    _decoder("OLMo 2", "Olmo2", GROUPED),
    _decoder("Granite", "Granite", {**GROUPED, "attention_multiplier": 0.9}),
    _decoder("SmolLM3", "SmolLM3", GROUPED),
    _decoder(
        "EXAONE 4",
        "Exaone4",
        {**GROUPED, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        without={"window": {"sliding_window": 64}},
    ),
]

MOE = [
    _decoder("Mixtral", "Mixtral", {**GROUPED, "num_local_experts": 4, "sliding_window": 4}, "MoE"),
    _decoder("Qwen3-MoE", "Qwen3Moe", {**GROUPED, **EXPERTS, "num_experts": 4, "head_dim": 8}, "MoE"),
    _decoder(
        "gpt-oss",
        "GptOss",
        {
            **GROUPED,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "MoE",
        without={"window": {"sliding_window": 64}},
        bites=("sinks",),
    ),
    _decoder(
        "DeepSeek-V3",
        "DeepseekV3",
        {
            **TEXT,
            **EXPERTS,
            "n_routed_experts": 4,
            "num_key_value_heads": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
        },
        "MoE",
    ),
    _decoder(
        "Llama 4",
        "Llama4",
        {
            **GROUPED,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "head_dim": 8,
            "attention_chunk_size": 4,
            "layer_types": ["chunked_attention", "full_attention"],
        },
        "MoE",
        config="Llama4TextConfig",
        without={"chunks": {"attention_chunk_size": 64}},
    ),
]

ENCODERS = [
    _encoder("BERT", "Bert", TEXT),
    _encoder("RoBERTa", "Roberta", {**TEXT, "max_position_embeddings": 80}),
    _encoder(
        "DistilBERT",
        "DistilBert",
        {"vocab_size": VOCABULARY, "dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 48},
    ),
    _encoder("ELECTRA", "Electra", {**TEXT, "embedding_size": 16}),
    _encoder("ALBERT", "Albert", {**TEXT, "embedding_size": 16}),
    _encoder(
        "ModernBERT",
        "ModernBert",
        {**TEXT, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2},
        without={"window": {"local_attention": 64}},
    ),
    _encoder("ESM", "Esm", {**TEXT, "position_embedding_type": "rotary", "mask_token_id": 3}),
    _encoder("EuroBERT", "EuroBert", GROUPED),
]

_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_max_distance": 9,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "dropout_rate": 0.0,
}
_BART = {
    **tiny.ENCODER_DECODER,
    **tiny.MARKS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}


def _seq2seq(name: str, model: str, options: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(
        name,
        "encoder-decoder",
        f"{model}ForConditionalGeneration" if "head" not in more else more.pop("head"),
        f"{model}Config",
        options,
        seq2seq,
        prompts=sources,
        **more,
    )


ENCODER_DECODERS = [
    _seq2seq("T5", "T5", _T5),
    _seq2seq("mT5", "MT5", _T5),
    _seq2seq("UMT5", "UMT5", _T5),
    _seq2seq("LongT5", "LongT5", {**_T5, "local_radius": 3}),
    _seq2seq(
        "Switch Transformers",
        "SwitchTransformers",
        {**_T5, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    ),
    _seq2seq("BART", "Bart", _BART),
    _seq2seq("mBART", "MBart", _BART),
    _seq2seq("Pegasus", "Pegasus", _BART),
    _seq2seq("M2M100", "M2M100", _BART),
    _seq2seq("Marian", "Marian", _BART, head="MarianMTModel"),
    _seq2seq("Blenderbot", "Blenderbot", _BART),
]

TEXTS = [*DECODERS, *MOE, *ENCODERS, *ENCODER_DECODERS]

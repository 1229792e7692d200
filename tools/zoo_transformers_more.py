"""More architectures of transformers: later language models, state spaces, experts, hybrid and image encoders."""

from __future__ import annotations

from typing import Any

from zoo_subject import Build
from zoo_transformers import (
    BART,
    CAUSAL,
    GROUPED,
    SIZES,
    T5,
    VISION,
    WIDTH,
    WORDS,
    of_image,
    of_text,
)

_MORE_TEXT: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 16, "sliding_window": 8, **CAUSAL}, "Gemma2ForCausalLM"),
    "granite": ("GraniteConfig", {**GROUPED, **CAUSAL}, "GraniteForCausalLM"),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **SIZES,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
            **CAUSAL,
        },
        "DeepseekV3ForCausalLM",
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**GROUPED, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, **CAUSAL},
        "Qwen3MoeForCausalLM",
    ),
    "gpt_oss": (
        "GptOssConfig",
        {**GROUPED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, **CAUSAL},
        "GptOssForCausalLM",
    ),
    "llama4_text": (
        "Llama4TextConfig",
        {
            **GROUPED,
            "head_dim": 16,
            "num_local_experts": 4,
            "intermediate_size_mlp": 64,
            "pad_token_id": 0,
            "attention_chunk_size": 8,
            **CAUSAL,
        },
        "Llama4ForCausalLM",
    ),
    "mamba2": (
        "Mamba2Config",
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 2,
            "vocab_size": WORDS,
            "chunk_size": 8,
            **CAUSAL,
        },
        "Mamba2ForCausalLM",
    ),
    "falcon_mamba": (
        "FalconMambaConfig",
        {"hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 8, "vocab_size": WORDS, **CAUSAL},
        "FalconMambaForCausalLM",
    ),
    "rwkv": (
        "RwkvConfig",
        {"hidden_size": WIDTH, "num_hidden_layers": 2, "attention_hidden_size": WIDTH, "vocab_size": WORDS, **CAUSAL},
        "RwkvForCausalLM",
    ),
    "mbart": ("MBartConfig", {**BART, **CAUSAL}, "MBartForConditionalGeneration"),
    "bigbird": (
        "BigBirdConfig",
        {**SIZES, "max_position_embeddings": 64, "attention_type": "original_full"},
        "BigBirdForSequenceClassification",
    ),
    "yoso": (
        "YosoConfig",
        {**SIZES, "max_position_embeddings": 64, "use_expectation": True},
        "YosoForSequenceClassification",
    ),
    "funnel": (
        "FunnelConfig",
        {"d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 128, "block_sizes": [1, 1], "vocab_size": WORDS},
        "FunnelBaseModel",
    ),
    "ibert": ("IBertConfig", SIZES, "IBertForSequenceClassification"),
    "deberta_v1": (
        "DebertaConfig",
        {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        "DebertaModel",
    ),
    "xlm": (
        "XLMConfig",
        {"emb_dim": WIDTH, "n_layers": 2, "n_heads": 4, "vocab_size": WORDS, "n_words": WORDS},
        "XLMModel",
    ),
    "ctrl": (
        "CTRLConfig",
        {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "dff": 128, "vocab_size": WORDS, **CAUSAL},
        "CTRLModel",
    ),
    "umt5": ("UMT5Config", T5, "UMT5EncoderModel"),
    "bitnet": ("BitNetConfig", {**GROUPED, **CAUSAL}, "BitNetForCausalLM"),
    "lfm2": ("Lfm2Config", {**GROUPED, "layer_types": ["conv", "full_attention"], **CAUSAL}, "Lfm2ForCausalLM"),
    "zamba2": (
        "Zamba2Config",
        {
            **SIZES,
            "mamba_d_state": 8,
            "mamba_headdim": 16,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "layers_block_type": ["mamba", "hybrid"],
            "num_mem_blocks": 1,
            "adapter_rank": 8,
            **CAUSAL,
        },
        "Zamba2ForCausalLM",
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {
            **SIZES,
            "num_key_value_heads": 1,
            "lru_width": 64,
            "attention_window_size": 8,
            "block_types": ["recurrent", "attention"],
            **CAUSAL,
        },
        "RecurrentGemmaForCausalLM",
    ),
    "esm": ("EsmConfig", {**SIZES, "pad_token_id": 1, "position_embedding_type": "rotary"}, "EsmModel"),
}
_MORE_IMAGES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "poolformer": (
        "PoolFormerConfig",
        {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]},
        "PoolFormerForImageClassification",
        64,
    ),
    "pvt": (
        "PvtConfig",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 40, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 8],
        },
        "PvtForImageClassification",
        64,
    ),
    "swinv2": (
        "Swinv2Config",
        {"image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        "Swinv2ForImageClassification",
        32,
    ),
    "mobilenet_v2": ("MobileNetV2Config", {"image_size": 64}, "MobileNetV2ForImageClassification", 64),
    "resnet_hf": (
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]},
        "ResNetForImageClassification",
        64,
    ),
    "regnet_hf": (
        "RegNetConfig",
        {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "groups_width": 8},
        "RegNetForImageClassification",
        64,
    ),
    "cvt": (
        "CvtConfig",
        {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
        "CvtForImageClassification",
        64,
    ),
    "levit_hf": (
        "LevitConfig",
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        "LevitForImageClassification",
        64,
    ),
    "focalnet_hf": (
        "FocalNetConfig",
        {"image_size": 32, "embed_dim": 24, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3]},
        "FocalNetForImageClassification",
        32,
    ),
    "glpn": (
        "GLPNConfig",
        {
            "hidden_sizes": [16, 32, 40, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 8],
            "decoder_hidden_size": 16,
        },
        "GLPNForDepthEstimation",
        64,
    ),
    "data2vec_vision": ("Data2VecVisionConfig", VISION, "Data2VecVisionForImageClassification", 32),
    "dinov2_registers": ("Dinov2WithRegistersConfig", VISION, "Dinov2WithRegistersForImageClassification", 32),
    "ijepa": ("IJepaConfig", VISION, "IJepaForImageClassification", 32),
    "hiera_hf": (
        "HieraConfig",
        {
            "image_size": [64, 64],
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "query_stride": [2, 2],
            "num_query_pool": 1,
            "masked_unit_size": [4, 4],
            "embed_dim_multiplier": 2.0,
        },
        "HieraForImageClassification",
        64,
    ),
}


def subjects() -> dict[str, Build]:
    """Return a builder for each architecture."""
    found: dict[str, Build] = {name: of_text(*how) for name, how in _MORE_TEXT.items()}
    found |= {name: of_image(*how) for name, how in _MORE_IMAGES.items()}
    return found

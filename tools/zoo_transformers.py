"""Architectures of transformers, built from small configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zoo_subject import Build, Subject, image, without_torchvision_operators

WIDTH, _LAYERS, _HEADS, _INNER, WORDS, _LENGTH = 64, 2, 4, 128, 99, 11

SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "intermediate_size": _INNER,
    "vocab_size": WORDS,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
VISION = {
    "hidden_size": WIDTH,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "intermediate_size": _INNER,
    "image_size": 32,
    "patch_size": 8,
}
BART = {
    "d_model": WIDTH,
    "encoder_layers": _LAYERS,
    "decoder_layers": _LAYERS,
    "encoder_attention_heads": _HEADS,
    "decoder_attention_heads": _HEADS,
    "encoder_ffn_dim": _INNER,
    "decoder_ffn_dim": _INNER,
    "vocab_size": WORDS,
}
T5 = {"d_model": WIDTH, "d_kv": 16, "d_ff": _INNER, "num_layers": _LAYERS, "num_heads": _HEADS, "vocab_size": WORDS}
_OF_CLIP = {"vocab_size": WORDS, "projection_dim": 32}
_TEXT_TOWER = {k: v for k, v in SIZES.items() if k != "vocab_size"} | _OF_CLIP
CAUSAL = {"use_cache": False}

# Name: (configuration class, its options, model class, kind of input).
_TEXT: dict[str, tuple[str, dict[str, Any], str]] = {
    "albert": ("AlbertConfig", {**SIZES, "embedding_size": 32}, "AlbertForSequenceClassification"),
    "bart": ("BartConfig", {**BART, **CAUSAL}, "BartModel"),
    "bert": ("BertConfig", SIZES, "BertForSequenceClassification"),
    "bert_masked": ("BertConfig", SIZES, "BertForMaskedLM"),
    "bloom": (
        "BloomConfig",
        {"hidden_size": WIDTH, "n_layer": 2, "n_head": 4, "vocab_size": WORDS, **CAUSAL},
        "BloomForCausalLM",
    ),
    "deberta": (
        "DebertaV2Config",
        {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        "DebertaV2Model",
    ),
    "distilbert": (
        "DistilBertConfig",
        {"dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": _INNER, "vocab_size": WORDS},
        "DistilBertForSequenceClassification",
    ),
    "electra": ("ElectraConfig", {**SIZES, "embedding_size": 32}, "ElectraForSequenceClassification"),
    "falcon": (
        "FalconConfig",
        {**SIZES, "ffn_hidden_size": _INNER, "new_decoder_architecture": True, "num_kv_heads": 2, **CAUSAL},
        "FalconForCausalLM",
    ),
    "fnet": ("FNetConfig", SIZES, "FNetForSequenceClassification"),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 16, "sliding_window": 8, **CAUSAL}, "Gemma3ForCausalLM"),
    "gpt2": (
        "GPT2Config",
        {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "vocab_size": WORDS, **CAUSAL},
        "GPT2LMHeadModel",
    ),
    "gpt_neox": ("GPTNeoXConfig", {**SIZES, **CAUSAL}, "GPTNeoXForCausalLM"),
    "gptj": (
        "GPTJConfig",
        {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": WORDS, **CAUSAL},
        "GPTJForCausalLM",
    ),
    "llama": ("LlamaConfig", {**GROUPED, **CAUSAL}, "LlamaForCausalLM"),
    "mamba": (
        "MambaConfig",
        {"hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 8, "vocab_size": WORDS, **CAUSAL},
        "MambaForCausalLM",
    ),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 8, **CAUSAL}, "MistralForCausalLM"),
    "mixtral": (
        "MixtralConfig",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, **CAUSAL},
        "MixtralForCausalLM",
    ),
    "modernbert": (
        "ModernBertConfig",
        {**SIZES, "pad_token_id": 0, "attn_implementation": "sdpa"},
        "ModernBertForSequenceClassification",
    ),
    "mpnet": ("MPNetConfig", SIZES, "MPNetForSequenceClassification"),
    "olmo2": ("Olmo2Config", {**GROUPED, **CAUSAL}, "Olmo2ForCausalLM"),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": _INNER,
            "vocab_size": WORDS,
            "word_embed_proj_dim": 32,
            **CAUSAL,
        },
        "OPTForCausalLM",
    ),
    "phi3": ("Phi3Config", {**GROUPED, "pad_token_id": 0, **CAUSAL}, "Phi3ForCausalLM"),
    "qwen2": ("Qwen2Config", {**GROUPED, **CAUSAL}, "Qwen2ForCausalLM"),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**GROUPED, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, **CAUSAL},
        "Qwen2MoeForCausalLM",
    ),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 16, **CAUSAL}, "Qwen3ForCausalLM"),
    "roberta": ("RobertaConfig", SIZES, "RobertaForSequenceClassification"),
    "roformer": ("RoFormerConfig", SIZES, "RoFormerForSequenceClassification"),
    "squeezebert": ("SqueezeBertConfig", {**SIZES, "embedding_size": WIDTH}, "SqueezeBertForSequenceClassification"),
    "stablelm": ("StableLmConfig", {**GROUPED, **CAUSAL}, "StableLmForCausalLM"),
    "t5_encoder": ("T5Config", T5, "T5EncoderModel"),
    "t5_gated": ("T5Config", {**T5, "feed_forward_proj": "gated-gelu", **CAUSAL}, "T5ForConditionalGeneration"),
    "xlnet": (
        "XLNetConfig",
        {"d_model": WIDTH, "n_layer": 2, "n_head": 4, "d_inner": _INNER, "vocab_size": WORDS},
        "XLNetForSequenceClassification",
    ),
}
_IMAGE: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "beit": ("BeitConfig", VISION, "BeitForImageClassification", 32),
    "clip_vision": ("CLIPVisionConfig", {**VISION, "projection_dim": 32}, "CLIPVisionModelWithProjection", 32),
    "convnext": (
        "ConvNextConfig",
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
        "ConvNextForImageClassification",
        64,
    ),
    "deit": ("DeiTConfig", VISION, "DeiTForImageClassification", 32),
    "dinov2": ("Dinov2Config", VISION, "Dinov2ForImageClassification", 32),
    "dpt": (
        "DPTConfig",
        {
            **VISION,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 24, 32, 48],
            "fusion_hidden_size": 32,
        },
        "DPTForDepthEstimation",
        32,
    ),
    "mobilevit": ("MobileViTConfig", {"image_size": 64}, "MobileViTForImageClassification", 64),
    "segformer": (
        "SegformerConfig",
        {
            "hidden_sizes": [16, 32, 40, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 8],
            "decoder_hidden_size": 48,
        },
        "SegformerForSemanticSegmentation",
        64,
    ),
    "siglip_vision": ("SiglipVisionConfig", VISION, "SiglipVisionModel", 32),
    "swin": (
        "SwinConfig",
        {"image_size": 56, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 7},
        "SwinForImageClassification",
        56,
    ),
    "vit": ("ViTConfig", VISION, "ViTForImageClassification", 32),
    "vit_msn": ("ViTMSNConfig", VISION, "ViTMSNForImageClassification", 32),
    "yolos": (
        "YolosConfig",
        {**VISION, "image_size": [32, 32], "num_detection_tokens": 5},
        "YolosForObjectDetection",
        32,
    ),
}


class FirstTensor(nn.Module):
    """Returns the first tensor of a model's output that is no loss, called with inputs by name."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=True)
        return next(value for name, value in output.items() if isinstance(value, Tensor) and name != "loss")


def subjects() -> dict[str, Build]:
    """Return a builder for each architecture."""
    found: dict[str, Build] = {}
    for name, (config, options, model) in _TEXT.items():
        found[name] = of_text(config, options, model)
    for name, (config, options, model, size) in _IMAGE.items():
        found[name] = of_image(config, options, model, size)
    found["clip"] = _clip
    found["wav2vec2"] = _speech("Wav2Vec2Config", "Wav2Vec2ForSequenceClassification")
    found["hubert"] = _speech("HubertConfig", "HubertForSequenceClassification")
    found["whisper_encoder"] = _whisper
    return found


def make(config: str, options: dict[str, Any], model: str) -> nn.Module:
    without_torchvision_operators()
    import transformers

    settings = getattr(transformers, config)(**options)
    kind: Callable[[Any], nn.Module] = getattr(transformers, model)
    return kind(settings).eval()


def tokens() -> Tensor:
    return torch.randint(3, WORDS, (2, _LENGTH), generator=torch.Generator().manual_seed(0))


def of_text(config: str, options: dict[str, Any], model: str) -> Build:
    def build() -> Subject:
        names: tuple[str, ...] = ("input_ids", "attention_mask")
        inputs = [tokens(), torch.ones(2, _LENGTH, dtype=torch.long)]
        if config in ("FNetConfig", "MambaConfig"):
            names, inputs = names[:1], inputs[:1]
        if model == "T5ForConditionalGeneration":
            names, inputs = (*names, "decoder_input_ids"), [*inputs, tokens()[:, :5]]
        return Subject(FirstTensor(make(config, options, model), names), tuple(inputs))

    return build


def of_image(config: str, options: dict[str, Any], model: str, size: int) -> Build:
    return lambda: Subject(FirstTensor(make(config, options, model), ("pixel_values",)), (image(size),))


def _clip() -> Subject:
    options = {"text_config": _TEXT_TOWER, "vision_config": {**VISION, "projection_dim": 32}, "projection_dim": 32}
    model = FirstTensor(make("CLIPConfig", options, "CLIPModel"), ("input_ids", "pixel_values"))
    return Subject(model, (tokens(), image(32)))


def _speech(config: str, model: str) -> Build:
    options = {
        **SIZES,
        "conv_dim": (16, 24, 32),
        "conv_kernel": (10, 3, 3),
        "conv_stride": (5, 2, 2),
        "num_feat_extract_layers": 3,
        "num_conv_pos_embedding_groups": 4,
        "num_conv_pos_embeddings": 16,
    }
    return lambda: Subject(FirstTensor(make(config, options, model), ("input_values",)), (torch.randn(2, 400),))


def _whisper() -> Subject:
    sizes = {**BART, "num_mel_bins": 16, "max_source_positions": 20, "pad_token_id": 0}
    model = make("WhisperConfig", sizes, "WhisperModel").get_submodule("encoder")
    return Subject(FirstTensor(model, ("input_features",)), (torch.randn(2, 16, 40),))

"""Architectures of transformers beyond text and image classification: detection, segmentation, video, series, pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from zoo_subject import Build, Subject
from zoo_transformers import CAUSAL, GROUPED, SIZES, T5, VISION, WIDTH, WORDS, FirstTensor, make

_Shape = tuple[int, ...]
_LENGTH = 12
_TOKENS = {"input_ids": "words", "attention_mask": "ones"}
_PAIR = {"input_ids": "words", "pixel_values": (2, 3, 32, 32)}
_CLIP = {
    "text_config": {k: v for k, v in SIZES.items() if k != "vocab_size"} | {"vocab_size": WORDS},
    "vision_config": VISION,
    "projection_dim": 32,
}
_RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 48, 64],
    "depths": [1, 1, 1, 1],
}
_SWIN = {
    "model_type": "swin",
    "embed_dim": 24,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 4, 8],
    "window_size": 4,
    "image_size": 128,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
_DETR = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "num_queries": 7,
}
_VIDEO = {**VISION, "num_frames": 4}

# Name: (configuration class, its options, model class, inputs by name: a shape of random numbers, or a kind of words).
_MODELS: dict[str, tuple[str, dict[str, Any], str, dict[str, _Shape | str]]] = {
    "detr": (
        "DetrConfig",
        {**_DETR, "backbone_config": {**_RESNET, "out_features": ["stage4"]}},
        "DetrForObjectDetection",
        {"pixel_values": (2, 3, 64, 64)},
    ),
    "deformable_detr": (
        "DeformableDetrConfig",
        {**_DETR, "backbone_config": {**_RESNET, "out_features": ["stage2", "stage3", "stage4"]}},
        "DeformableDetrForObjectDetection",
        {"pixel_values": (2, 3, 64, 64)},
    ),
    "owlvit": (
        "OwlViTConfig",
        {**_CLIP, "projection_dim": WIDTH},
        "OwlViTForObjectDetection",
        {"input_ids": "words", "pixel_values": (2, 3, 32, 32)},
    ),
    "maskformer": (
        "MaskFormerConfig",
        {
            "backbone_config": _SWIN,
            "decoder_config": {"model_type": "detr", **_DETR},
            "fpn_feature_size": 32,
            "mask_feature_size": 32,
        },
        "MaskFormerForInstanceSegmentation",
        {"pixel_values": (2, 3, 64, 64)},
    ),
    "mask2former": (
        "Mask2FormerConfig",
        {
            "backbone_config": _SWIN,
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "num_attention_heads": 4,
            "num_queries": 7,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "dim_feedforward": 96,
            "encoder_feedforward_dim": 96,
        },
        "Mask2FormerForUniversalSegmentation",
        {"pixel_values": (2, 3, 64, 64)},
    ),
    "swin2sr": (
        "Swin2SRConfig",
        {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "image_size": 32},
        "Swin2SRForImageSuperResolution",
        {"pixel_values": (2, 3, 16, 16)},
    ),
    "timesformer": (
        "TimesformerConfig",
        _VIDEO,
        "TimesformerForVideoClassification",
        {"pixel_values": (2, 4, 3, 32, 32)},
    ),
    "vivit": (
        "VivitConfig",
        {**_VIDEO, "tubelet_size": [2, 8, 8]},
        "VivitForVideoClassification",
        {"pixel_values": (2, 4, 3, 32, 32)},
    ),
    "groupvit": (
        "GroupViTConfig",
        {
            **_CLIP,
            "vision_config": {
                **VISION,
                "depths": [1, 1, 1],
                "num_group_tokens": [8, 4, 0],
                "num_output_groups": [8, 4, 0],
            },
        },
        "GroupViTModel",
        _PAIR,
    ),
    "blip": ("BlipConfig", _CLIP, "BlipForImageTextRetrieval", {**_PAIR, "attention_mask": "ones"}),
    "llava": (
        "LlavaConfig",
        {
            "image_token_index": WORDS - 1,
            "vision_config": {"model_type": "clip_vision_model", **VISION, "num_hidden_layers": 3},
            "text_config": {"model_type": "llama", **GROUPED, **CAUSAL},
        },
        "LlavaForConditionalGeneration",
        {"input_ids": "image and words", "pixel_values": (2, 3, 32, 32)},
    ),
    "layoutlmv3": (
        "LayoutLMv3Config",
        {
            **SIZES,
            "coordinate_size": 11,
            "shape_size": 10,
            "input_size": 32,
            "patch_size": 8,
            "max_2d_position_embeddings": 64,
        },
        "LayoutLMv3ForTokenClassification",
        {**_TOKENS, "bbox": "boxes", "pixel_values": (2, 3, 32, 32)},
    ),
    "tapas": ("TapasConfig", {**SIZES, "type_vocab_sizes": [3, 9, 9, 2, 9, 9, 10]}, "TapasForMaskedLM", _TOKENS),
    "canine": (
        "CanineConfig",
        {**SIZES, "num_hash_buckets": 64, "max_position_embeddings": 64, "local_transformer_stride": 16},
        "CanineForSequenceClassification",
        _TOKENS,
    ),
    "convbert": ("ConvBertConfig", {**SIZES, "embedding_size": WIDTH}, "ConvBertForMaskedLM", _TOKENS),
    "mobilebert": (
        "MobileBertConfig",
        {**SIZES, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
        "MobileBertForMaskedLM",
        _TOKENS,
    ),
    "nystromformer": ("NystromformerConfig", SIZES, "NystromformerForMaskedLM", _TOKENS),
    "longt5": (
        "LongT5Config",
        {**T5, "encoder_attention_type": "transient-global", "local_radius": 3, "global_block_size": 4},
        "LongT5ForConditionalGeneration",
        {**_TOKENS, "decoder_input_ids": "words"},
    ),
    "xlstm": (
        "xLSTMConfig",
        {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_heads": 4, "vocab_size": WORDS, "chunk_size": 8, **CAUSAL},
        "xLSTMForCausalLM",
        {"input_ids": "words"},
    ),
    "dac": (
        "DacConfig",
        {
            "encoder_hidden_size": 8,
            "decoder_hidden_size": 64,
            "downsampling_ratios": [2, 4],
            "upsampling_ratios": [4, 2],
            "n_codebooks": 2,
            "codebook_size": 32,
            "codebook_dim": 4,
            "hidden_size": 32,
        },
        "DacModel",
        {"input_values": (2, 1, 640)},
    ),
    "patchtst": (
        "PatchTSTConfig",
        {
            "num_input_channels": 3,
            "context_length": 16,
            "patch_length": 4,
            "patch_stride": 4,
            "d_model": 64,
            "num_attention_heads": 4,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "prediction_length": 6,
        },
        "PatchTSTForPrediction",
        {"past_values": (2, 16, 3)},
    ),
    "patchtsmixer": (
        "PatchTSMixerConfig",
        {
            "num_input_channels": 3,
            "context_length": 16,
            "patch_length": 4,
            "patch_stride": 4,
            "d_model": 16,
            "num_layers": 2,
            "prediction_length": 6,
            "mode": "mix_channel",
        },
        "PatchTSMixerForPrediction",
        {"past_values": (2, 16, 3)},
    ),
}


def subjects() -> dict[str, Build]:
    """Return a builder for each architecture."""
    return {name: _of(*how) for name, how in _MODELS.items()}


def _of(config: str, options: dict[str, Any], model: str, inputs: dict[str, _Shape | str]) -> Build:
    def build() -> Subject:
        generator = torch.Generator().manual_seed(0)
        made = [_input(how, generator) for how in inputs.values()]
        return Subject(FirstTensor(make(config, options, model), tuple(inputs)), tuple(made))

    return build


def _input(how: _Shape | str, generator: torch.Generator) -> Tensor:
    """Return random numbers of a shape, or words, a mask of them, their boxes, 16 places of an image before them."""
    if isinstance(how, tuple):
        return torch.randn(how, generator=generator)
    words = torch.randint(3, WORDS - 2, (2, _LENGTH), generator=generator)
    if how == "words":
        return words
    if how == "ones":
        return torch.ones_like(words)
    if how == "boxes":
        corner = torch.randint(0, 50, (2, _LENGTH, 2), generator=generator)
        return torch.cat([corner, corner + 10], -1)
    return torch.cat([torch.full((2, 16), WORDS - 1), words], 1)

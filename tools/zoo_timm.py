"""Architectures of timm, one small member of each family."""

from __future__ import annotations

from typing import Any

from zoo_subject import Build, Subject, image, without_torchvision_operators

# Name: image size, and options of the constructor where the default is not wanted.
_MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "beit_base_patch16_224": (224, {"depth": 3}),
    "cait_xxs24_224": (224, {"depth": 3}),
    "coat_tiny": (224, {}),
    "coatnet_nano_rw_224": (224, {}),
    "convit_tiny": (224, {"depth": 3, "local_up_to_layer": 2}),
    "convmixer_768_32": (64, {}),
    "convnext_atto": (64, {}),
    "convnextv2_atto": (64, {}),
    "crossvit_tiny_240": (240, {}),
    "cspdarknet53": (64, {}),
    "darknet53": (64, {}),
    "davit_tiny": (64, {}),
    "deit3_small_patch16_224": (224, {"depth": 3}),
    "deit_tiny_distilled_patch16_224": (224, {"depth": 3}),
    "densenet121": (64, {}),
    "dla34": (64, {}),
    "dm_nfnet_f0": (64, {}),
    "dpn68": (64, {}),
    "eca_resnet33ts": (64, {}),
    "edgenext_xx_small": (64, {}),
    "efficientformer_l1": (224, {}),
    "efficientnet_b0": (64, {}),
    "efficientvit_b0": (64, {}),
    "efficientvit_m0": (224, {}),
    "eva02_tiny_patch14_224": (224, {"depth": 3}),
    "fastvit_t8": (64, {}),
    "focalnet_tiny_srf": (64, {}),
    "gcvit_xxtiny": (224, {}),
    "gernet_s": (64, {}),
    "ghostnet_100": (64, {}),
    "gmixer_24_224": (224, {}),
    "gmlp_s16_224": (224, {}),
    "halonet26t": (256, {}),
    "hardcorenas_a": (64, {}),
    "hiera_tiny_224": (224, {}),
    "hrnet_w18_small": (64, {}),
    "inception_next_atto": (64, {}),
    "inception_v4": (128, {}),
    "lambda_resnet26t": (256, {}),
    "lcnet_050": (64, {}),
    "levit_128s": (224, {}),
    "maxvit_pico_rw_256": (256, {}),
    "mixer_s32_224": (224, {}),
    "mixnet_s": (64, {}),
    "mobilenetv3_small_100": (64, {}),
    "mobilenetv4_conv_small": (64, {}),
    "mobileone_s0": (64, {}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "mvitv2_tiny": (224, {}),
    "nest_tiny": (224, {}),
    "nf_resnet26": (64, {}),
    "nfnet_l0": (64, {}),
    "pit_ti_224": (224, {}),
    "poolformer_s12": (64, {}),
    "pvt_v2_b0": (64, {}),
    "regnetz_b16": (64, {}),
    "repghostnet_050": (64, {}),
    "repvgg_a0": (64, {}),
    "repvit_m0_9": (64, {}),
    "res2net50_14w_8s": (64, {}),
    "resmlp_12_224": (224, {}),
    "resnest14d": (64, {}),
    "resnetv2_50": (64, {}),
    "rexnet_100": (64, {}),
    "selecsls42": (64, {}),
    "sequencer2d_s": (224, {}),
    "skresnet18": (64, {}),
    "swin_tiny_patch4_window7_224": (224, {}),
    "swinv2_cr_tiny_ns_224": (224, {}),
    "tnt_s_patch16_224": (224, {}),
    "tresnet_m": (64, {}),
    "twins_svt_small": (224, {}),
    "vgg11_bn": (64, {}),
    "visformer_tiny": (224, {}),
    "vit_small_patch16_224": (224, {"depth": 3}),
    "vit_relpos_small_patch16_224": (224, {"depth": 3}),
    "volo_d1_224": (224, {}),
    "xception41": (64, {}),
    "xcit_nano_12_p16_224": (224, {"depth": 3}),
}


def subjects() -> dict[str, Build]:
    """Return a builder for each architecture."""
    return {name: _builder(name, size, options) for name, (size, options) in _MODELS.items()}


def _builder(name: str, size: int, options: dict[str, Any]) -> Build:
    def build() -> Subject:
        without_torchvision_operators()
        import timm

        return Subject(timm.create_model(name, pretrained=False, num_classes=10, **options), (image(size),))

    return build

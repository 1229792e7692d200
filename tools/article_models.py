"""Models and samples of `tools/distill_articles.sh`: what articles on distillation teach with, at sizes of a minute."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import torch
from torch import nn

# torchvision without its compiled operators still has its models
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

_CLASSES, _SIDE = 10, 75  # Inception takes nothing smaller


def resnet18() -> nn.Module:
    """Torchvision's ResNet-18."""
    from torchvision import models

    torch.manual_seed(0)
    return models.resnet18(num_classes=_CLASSES)


def inception() -> nn.Module:
    """Torchvision's Inception v3 without its auxiliary output."""
    from torchvision import models

    torch.manual_seed(0)
    return models.inception_v3(num_classes=_CLASSES, aux_logits=False, init_weights=False)


def mobilenet() -> nn.Module:
    """Torchvision's MobileNetV2 of half width."""
    from torchvision import models

    torch.manual_seed(1)
    return models.mobilenet_v2(num_classes=_CLASSES, width_mult=0.5)


def timm_mobilenet() -> nn.Module:
    """Timm's MobileNetV3 of half width."""
    import timm

    torch.manual_seed(1)
    return timm.create_model("mobilenetv3_small_050", num_classes=_CLASSES)


def samples() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of made-up images with labels."""
    draws = torch.Generator().manual_seed(2)
    for _ in range(16):
        labels = torch.randint(0, _CLASSES, (16,), generator=draws)
        yield torch.randn(16, 3, _SIDE, _SIDE, generator=draws) + labels.view(-1, 1, 1, 1) / _CLASSES, labels

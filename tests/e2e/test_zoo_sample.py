"""A sample of torchvision's architectures, small: half of every group goes, and what is left is proved right.

All of them, at their own sizes, are examined by `tools/zoo_prune.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.axes.proof.masked import check_slices
from graphopt.capturing.capture import capture
from graphopt.errors import VerifyError
from graphopt.ir.graph import tensor_attribute
from graphopt.ir.program import Program
from graphopt.passes.prune import Prune, PruneOptions
from graphopt.pipeline.context import Context

# The PyPI wheel's operators are not built for a CPU torch, and no classification model needs them.
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
models = pytest.importorskip("torchvision.models", reason="torchvision is not installed", exc_type=ImportError)

_CLASSES = 10
_LEAST_REMOVED = 0.3  # of the parameters, at a ratio of one half

Build = Callable[[], nn.Module]


def _part(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"torchvision.models.{module}"), name)


def _resnet(block: str, **widths: int) -> nn.Module:
    return models.ResNet(_part("resnet", block), [1, 1, 1, 1], num_classes=_CLASSES, **widths)


def _vit() -> nn.Module:
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
    return models.VisionTransformer(**sizes, num_classes=_CLASSES)


def _swin(version: int) -> nn.Module:
    sizes = {"patch_size": [4, 4], "embed_dim": 32, "depths": [2, 1], "num_heads": [2, 4], "window_size": [4, 4]}
    parts = {"block": _part("swin_transformer", "SwinTransformerBlockV2")} if version == 2 else {}
    if version == 2:
        parts["downsample_layer"] = _part("swin_transformer", "PatchMergingV2")
    return models.SwinTransformer(**sizes, **parts, num_classes=_CLASSES)


def _efficientnet() -> nn.Module:
    stage = _part("efficientnet", "MBConvConfig")
    stages = [stage(1, 3, 1, 16, 16, 1, 1.0, 1.0), stage(4, 5, 2, 16, 24, 2, 1.0, 1.0)]
    return models.EfficientNet(stages, dropout=0.0, num_classes=_CLASSES, last_channel=64)


def _mobilenet_v2() -> nn.Module:
    stages = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]
    return models.MobileNetV2(width_mult=0.5, inverted_residual_setting=stages, num_classes=_CLASSES)


def _mobilenet_v3() -> nn.Module:
    blocks, _ = _part("mobilenetv3", "_mobilenet_v3_conf")("mobilenet_v3_small")
    return models.MobileNetV3(blocks[:6], 256, num_classes=_CLASSES)  # both activations, with and without a gate


def _regnet() -> nn.Module:
    sizes = {"depth": 4, "w_0": 24, "w_a": 24.0, "w_m": 2.5, "group_width": 8, "se_ratio": 0.25}
    return models.RegNet(_part("regnet", "BlockParams").from_init_params(**sizes), num_classes=_CLASSES)


def _convnext() -> nn.Module:
    stage = _part("convnext", "CNBlockConfig")
    return models.ConvNeXt([stage(32, 48, 1), stage(48, None, 1)], num_classes=_CLASSES)


def _maxvit() -> nn.Module:
    sizes = {"stem_channels": 16, "partition_size": 4, "block_channels": [32], "block_layers": [1]}
    return models.MaxVit((32, 32), **sizes, head_dim=8, stochastic_depth_prob=0.0, num_classes=_CLASSES)


def _densenet() -> nn.Module:
    return models.DenseNet(growth_rate=8, block_config=(2, 2, 2, 2), num_init_features=16, num_classes=_CLASSES)


ZOO: dict[str, tuple[Build, int]] = {  # architecture: how to build it, size of its images
    "resnet": (lambda: _resnet("BasicBlock"), 32),
    "resnext": (lambda: _resnet("Bottleneck", groups=4, width_per_group=8), 32),
    "densenet": (_densenet, 32),
    "mobilenet_v2": (_mobilenet_v2, 32),
    "mobilenet_v3": (_mobilenet_v3, 32),
    "shufflenet_v2": (lambda: models.ShuffleNetV2([2, 2, 2], [24, 48, 96, 192, 256], num_classes=_CLASSES), 32),
    "squeezenet": (lambda: models.squeezenet1_1(num_classes=_CLASSES), 48),
    "efficientnet": (_efficientnet, 32),
    "regnet": (_regnet, 32),
    "convnext": (_convnext, 32),
    "vit": (_vit, 32),
    "swin": (lambda: _swin(1), 32),
    "swin_v2": (lambda: _swin(2), 32),
    "maxvit": (_maxvit, 32),
}


@functools.cache
def _captured(name: str) -> Program:
    build, size = ZOO[name]
    torch.manual_seed(0)
    return capture(build().eval(), (torch.randn(2, 3, size, size),))


def _parameters(program: Program) -> int:
    return sum(parameter.numel() for parameter in program.parameters())


@pytest.mark.parametrize("name", ZOO)
def test_half_of_every_group_goes(name: str) -> None:
    program = _captured(name)
    prune = Prune(PruneOptions(ratio=0.5))
    plan = prune.plan(program, Context(program))
    pruned = prune.apply(program, plan)
    assert 1 - _parameters(pruned) / _parameters(program) >= _LEAST_REMOVED
    image = torch.randn(3, *program.example_args[0].shape[1:])
    assert pruned(image).shape == (3, _CLASSES)
    check_slices(program.graph_module, pruned.graph_module, plan.kept)
    prune.prove(program, pruned, plan)  # in float64, with all parameters and statistics drawn at random


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_the_proof_sees_one_wrong_number(name: str) -> None:
    """A convolution or product that reads its input's channels in another order is found."""
    program = _captured(name)
    prune = Prune(PruneOptions(ratio=0.5))
    plan = prune.plan(program, Context(program))
    pruned = prune.apply(program, plan)
    consumer = next(weight for weight, dims in plan.kept.items() if 1 in dims and weight.endswith("weight"))
    kept = {**plan.kept[consumer], 1: _others(program, consumer, plan.kept[consumer][1])}
    wrong = {**plan.kept, consumer: kept}
    with pytest.raises(VerifyError):
        prune.prove(program, pruned, dataclasses.replace(plan, kept=wrong))


def _others(program: Program, name: str, kept: Any) -> list[int]:
    """Return as many indices of the second dimension as were kept, but not the same."""
    size = tensor_attribute(program.graph_module, name).shape[1]
    removed = [index for index in range(size) if index not in set(kept)]
    return sorted([*kept[1:], removed[0]])

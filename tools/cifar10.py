"""CIFAR-10 and the ResNets trained on it, as the benchmarks read them from `--data DIR`.

The directory holds `cifar10_train_5k.npz`, `cifar10_test.npz` (images as a reversible delta filter),
`cifar10_resnet20.safetensors`, `cifar10_resnet56.safetensors` and `cifar10_mlperf_tiny_resnet8.safetensors`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import avg_pool2d, pad, relu

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights (option A of He et al. 2015, section 4.2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.widening = outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, inputs, h, w) to (batch, outputs, h / stride, w / stride)."""
        shortcut = x
        if self.widening:
            side = self.widening // 2
            shortcut = pad(x[:, :, ::2, ::2], (0, 0, 0, 0, side, side))
        return relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))) + shortcut)


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for 32x32 images: three stages of n blocks with 16, 32 and 64 channels."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        count = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(count, 16, 16, 1)
        self.layer2 = _stage(count, 16, 32, 2)
        self.layer3 = _stage(count, 32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (batch, 3, 32, 32) to logits (batch, 10)."""
        x = self.layer3(self.layer2(self.layer1(relu(self.bn1(self.conv1(x))))))
        return self.linear(avg_pool2d(x, x.shape[3]).flatten(1))


class Unit(nn.Module):
    """Convolution and BatchNorm, padded as TensorFlow pads: behind the image where it cannot be on both sides."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        self.padding = (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, inputs, h, w) to (batch, outputs, h / stride, w / stride)."""
        return self.bn(self.conv(pad(x, self.padding)))


class TinyResNet(nn.Module):
    """ResNet-8 of MLPerf Tiny, for images of values 0 to 255."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Unit(3, 16, 1)
        self.a1, self.a2 = Unit(16, 16, 1), Unit(16, 16, 1)
        self.b1, self.b2, self.bs = Unit(16, 32, 2), Unit(32, 32, 1), nn.ModuleDict({"conv": nn.Conv2d(16, 32, 1, 2)})
        self.c1, self.c2, self.cs = Unit(32, 64, 2), Unit(64, 64, 1), nn.ModuleDict({"conv": nn.Conv2d(32, 64, 1, 2)})
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (batch, 3, 32, 32) to logits (batch, 10)."""
        x = relu(self.stem(x))
        x = relu(self.a2(relu(self.a1(x))) + x)
        x = relu(self.b2(relu(self.b1(x))) + self.bs["conv"](x))
        x = relu(self.c2(relu(self.c1(x))) + self.cs["conv"](x))
        return self.fc(avg_pool2d(x, x.shape[3]).flatten(1))


def trained_resnet(data: Path, depth: int) -> nn.Module:
    """Return ResNet-8, -20 or -56 with its trained weights, in evaluation mode."""
    if depth == 8:
        tiny = TinyResNet()
        tiny.load_state_dict(load_file(data / "cifar10_mlperf_tiny_resnet8.safetensors"), strict=False)
        return tiny.eval()
    model = CifarResNet(depth)
    model.load_state_dict(load_file(data / f"cifar10_resnet{depth}.safetensors"), strict=False)
    return model.eval()


def images(data: Path, name: str, *, normalised: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Read `name`.npz: images (count, 3, 32, 32), normalised or of values 0 to 255, and labels (count,)."""
    stored = np.load(data / f"{name}.npz")
    planes = np.cumsum(np.cumsum(stored["x_delta"], 2, dtype=np.uint8), 3, dtype=np.uint8)
    rgb = np.stack([planes[1] + planes[0], planes[0], planes[2] + planes[0]], 1)
    if not normalised:
        return torch.from_numpy(rgb).float(), torch.from_numpy(stored["y"]).long()
    scaled = torch.from_numpy(rgb).float() / 255
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _DEVIATION))
    return (scaled - mean) / deviation, torch.from_numpy(stored["y"]).long()


def training_images(data: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first `count` images to train on and their labels; up to 5120 come from a small file."""
    pictures, labels = images(data, "cifar10_train_5k" if count <= 5120 else "cifar10_train")
    return pictures[:count], labels[:count]


def classes(program: object, pictures: torch.Tensor) -> torch.Tensor:
    """Return the class that anything callable like the model gives each image."""
    with torch.no_grad():
        return torch.cat([program(x).argmax(1) for x in pictures.split(500)])  # type: ignore[operator]


def top1(program: object, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the top-1 accuracy in percent of anything callable like the model."""
    return 100 * int((classes(program, pictures) == labels).sum()) / len(labels)


def _stage(count: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(count - 1)))

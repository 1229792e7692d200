"""The networks by which `measure_costs.py` tells kernels' costs: one kernel each, at sizes that models have.

Those on images stand between two float convolutions, as a layer does that integers do not pay for on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

Mode = Literal["static", "dynamic"]


@dataclass(frozen=True)
class Case:
    """A network.

    Attributes:
        name: of it.
        module: itself.
        shape: of one sample.
        modes: how its activations are quantized, each a network of its own.
        skip: what stays float in all of them.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    modes: tuple[Mode, ...] = ("static",)
    skip: tuple[str, ...] = ()


def cases() -> Iterator[Case]:
    """Yield them all."""
    yield from _convolutions()
    yield from _followers()
    yield from _products()


_POINTWISE = (  # channels, hidden channels, places along each axis, pairs
    (16, 16, 112, 1), (16, 64, 112, 1), (24, 72, 56, 1), (24, 144, 56, 1), (64, 64, 56, 2), (40, 120, 28, 2),
    (40, 240, 28, 1), (128, 128, 28, 1), (80, 200, 14, 2), (80, 480, 14, 1), (112, 672, 14, 1), (256, 256, 14, 1),
    (256, 1024, 14, 1), (160, 672, 7, 1), (160, 960, 7, 2), (512, 2048, 7, 1), (192, 1152, 7, 1),
    (64, 16, 1, 1), (120, 32, 1, 2), (480, 120, 1, 1), (960, 240, 1, 1), (32, 8, 1, 3), (8, 24, 20, 2),
)  # fmt: skip
_UNEVEN = (  # channels in and out, places: what quantizing takes, apart from what dequantizing does
    (16, 128, 56), (128, 16, 56), (64, 384, 14), (384, 64, 14), (24, 144, 28), (144, 24, 28),
)  # fmt: skip
_DENSE = (  # channels, places, taps, stride, layers
    (16, 56, 3, 1, 2), (16, 32, 3, 1, 3), (32, 16, 3, 1, 2), (64, 8, 3, 1, 3), (64, 56, 3, 1, 1), (64, 56, 3, 2, 1),
    (128, 28, 3, 1, 1), (128, 28, 3, 2, 1), (256, 14, 3, 1, 1), (512, 7, 3, 1, 1), (32, 28, 5, 1, 1),
    (96, 14, 5, 1, 1), (48, 14, 7, 1, 1), (24, 12, 3, 1, 2),
)  # fmt: skip
_FIRST = (  # channels in and out, places, taps, stride
    (3, 16, 224, 3, 2), (3, 32, 224, 3, 2), (3, 64, 224, 7, 2), (3, 16, 32, 3, 1), (3, 64, 64, 3, 1), (1, 16, 28, 5, 1),
)  # fmt: skip
_DEPTHWISE = (  # channels, places, taps, stride, layers
    (16, 112, 3, 1, 1), (32, 112, 3, 1, 1), (64, 112, 3, 2, 1), (72, 56, 3, 1, 2), (96, 56, 3, 1, 1), (72, 56, 5, 2, 1),
    (144, 56, 3, 2, 1), (120, 28, 5, 1, 2), (240, 28, 3, 2, 1), (240, 28, 5, 1, 1),
    (200, 14, 3, 1, 2), (480, 14, 3, 1, 1), (480, 14, 5, 1, 2), (672, 14, 5, 2, 1), (672, 14, 3, 1, 1),
    (960, 7, 5, 1, 2), (960, 7, 3, 1, 1), (1152, 7, 5, 1, 1), (32, 16, 3, 1, 3), (16, 8, 3, 1, 3), (48, 14, 3, 1, 2),
)  # fmt: skip
_GROUPED = (  # channels, places, groups
    (64, 28, 8), (128, 14, 32), (64, 56, 4), (48, 56, 6), (104, 28, 13), (208, 14, 26), (440, 7, 55),
    (128, 56, 32), (256, 28, 32), (512, 14, 32), (1024, 7, 32), (256, 14, 4), (384, 7, 24), (96, 28, 2), (64, 7, 8),
)  # fmt: skip


def _convolutions() -> Iterator[Case]:
    for channels, hidden, size, pairs in _POINTWISE:
        layers = [nn.Conv2d(*widths, 1) for _ in range(pairs) for widths in ((channels, hidden), (hidden, channels))]
        yield _image(f"pointwise {channels} {hidden} {size} x{pairs}", channels, size, *layers)
    for channels, after, size in _UNEVEN:
        yield _image(f"uneven {channels} {after} {size}", channels, size, nn.Conv2d(channels, after, 1), after=after)
    for channels, size, taps, stride, times in _DENSE:
        layers = [nn.Conv2d(channels, channels, taps, stride, taps // 2) for _ in range(times)]
        yield _image(f"dense {channels} {size} {taps} {stride} x{times}", channels, size, *layers)
    for before, after, size, taps, stride in _FIRST:
        module = nn.Sequential(nn.Conv2d(before, after, taps, stride, taps // 2), nn.Conv2d(after, 16, 1))
        yield Case(f"first {before} {after} {size} {taps}", module, (before, size, size), skip=("1",))
    for channels, size, taps, stride, times in _DEPTHWISE:
        layers = [nn.Conv2d(channels, channels, taps, stride, taps // 2, groups=channels) for _ in range(times)]
        yield _image(f"depthwise {channels} {size} {taps} {stride} x{times}", channels, size, *layers)
    for channels, size, groups in _GROUPED:
        layer = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
        yield _image(f"grouped {channels} {size} {groups}", channels, size, layer)


_SIZES = (  # the last ones so small that what a call takes, whatever it has to do, is told from the rest
    (16, 112), (64, 56), (24, 56), (40, 28), (120, 28), (128, 28), (240, 14), (672, 14), (160, 7), (512, 7), (32, 14),
    (64, 7), (16, 8),
)  # fmt: skip


def _followers() -> Iterator[Case]:
    for channels, size in _SIZES:
        yield _image(f"add {channels} {size}", channels, size, _Added(channels))
        for name, activation in (("hardswish", nn.Hardswish), ("silu", nn.SiLU)):
            layers = [layer for _ in range(2) for layer in (_place(channels), activation())]
            yield _image(f"{name} {channels} {size}", channels, size, *layers)
    for channels, size in _SIZES[::3]:
        for name, activation in (
            ("sigmoid", nn.Sigmoid),
            ("leaky_relu", nn.LeakyReLU),
            ("hardsigmoid", nn.Hardsigmoid),
        ):
            layers = [layer for _ in range(2) for layer in (_place(channels), activation())]
            yield _image(f"{name} {channels} {size}", channels, size, *layers)
        slopes = (layer for _ in range(2) for layer in (_place(channels), nn.PReLU(channels)))
        yield _image(f"prelu {channels} {size}", channels, size, *slopes)
        yield _image(f"mul {channels} {size}", channels, size, _Multiplied(channels))
        yield _image(f"cat {channels} {size}", channels, size, _Joined(channels))
        yield _image(f"max_pool {channels} {size}", channels, size, _place(channels), nn.MaxPool2d(3, 2, 1))
        yield _image(f"avg_pool {channels} {size}", channels, size, _place(channels), nn.AvgPool2d(2))
        if size < 100:
            yield _image(f"upsample {channels} {size}", channels, size, _place(channels), nn.Upsample(scale_factor=2))
    for channels, hidden, size in ((72, 24, 28), (120, 32, 28), (480, 120, 14), (672, 168, 14), (960, 240, 7)):
        for name, gate in (("hardsigmoid", nn.Hardsigmoid), ("sigmoid", nn.Sigmoid)):
            block = _Excited(channels, hidden, gate())
            yield _image(f"excited {name} {channels} {hidden} {size}", channels, size, _place(channels), block)
    for channels, classes, size in ((512, 1000, 7), (1280, 1000, 7), (64, 10, 8), (960, 1000, 7), (2048, 1000, 7)):
        layers = _place(channels), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
        yield Case(f"head {channels} {size}", nn.Sequential(*layers), (channels, size, size))


_PRODUCTS = (  # rows, features, hidden features
    (128, 384, 384), (128, 384, 1536), (128, 768, 768), (64, 128, 512), (32, 384, 1536), (32, 64, 64), (8, 384, 384),
    (197, 192, 768), (1, 256, 256), (16, 768, 3072),
)  # fmt: skip


def _products() -> Iterator[Case]:
    both: tuple[Mode, ...] = ("static", "dynamic")
    for rows, features, hidden in _PRODUCTS:
        layers = nn.Linear(features, hidden), nn.Linear(hidden, features)
        yield Case(f"matmul {rows} {features} {hidden}", nn.Sequential(*layers), (rows, features), both)
        yield Case(f"shared {rows} {features}", _Shared(features), (rows, features), both)
    for features, hidden in ((64, 64), (256, 256), (512, 1000), (1024, 1024), (960, 1280), (128, 512)):
        layers = nn.Linear(features, hidden), nn.Linear(hidden, features)
        yield Case(f"gemm {features} {hidden}", nn.Sequential(*layers), (features,), both)


def _place(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels)


def _image(name: str, channels: int, size: int, *layers: nn.Module, after: int | None = None) -> Case:
    """Put layers between two float ones; whatever they do to the size."""
    before, behind = (nn.Conv2d(width, width, 1, groups=width) for width in (channels, after or channels))
    return Case(name, nn.Sequential(before, nn.Sequential(*layers), behind), (channels, size, size), skip=("0", "2"))


class _Added(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.other = _place(channels), _place(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return y + self.other(y)


class _Multiplied(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.other = _place(channels), _place(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) * self.other(x)


class _Joined(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.other = _place(channels), _place(channels)
        self.last = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.one(x), self.other(x)], 1))


class _Excited(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, hidden: int, gate: nn.Module) -> None:
        super().__init__()
        self.squeeze, self.excite, self.gate = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        return x * self.gate(self.excite(y))


class _Shared(nn.Module):
    """Three products of one value, as in attention."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(features, features) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.query(x), self.key(x), self.value(x)

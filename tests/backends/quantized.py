"""Small models with integers written in by hand, so that backends are tested apart from the pass that places them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

import graphopt.quantization.ops  # noqa: F401  (registers the operators)

OPS = torch.ops.graphopt


class Rounded(nn.Module):
    """A value on its way through integers."""

    def __init__(self, scale: float, zero_point: int = 0, low: int = 0, high: int = 255) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.int32))
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        q = OPS.quantize(x, self.scale, self.zero_point, None, self.low, self.high)
        return OPS.dequantize(q, self.scale, self.zero_point, None)


def signed(scale: float) -> Rounded:
    """What TensorRT takes."""
    return Rounded(scale, 0, -128, 127)


class StoredWeight(nn.Module):
    """Random int8 weights with one scale per output channel."""

    def __init__(self, *shape: int, axis: int = 0) -> None:
        super().__init__()
        inputs = torch.Size(shape).numel() / shape[axis]
        weight = torch.randn(shape) / inputs**0.5
        others = [dim for dim in range(len(shape)) if dim != axis]
        scale = weight.abs().amax(others) / 127
        along = [-1 if dim == axis else 1 for dim in range(len(shape))]
        self.register_buffer("weight", (weight / scale.view(along)).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros(shape[axis], dtype=torch.int32))
        self.axis = axis

    def forward(self) -> Tensor:
        return OPS.dequantize(self.weight, self.scale, self.zero_point, self.axis)


class Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.stored, self.bias = StoredWeight(outputs, inputs, size, size), nn.Parameter(torch.randn(outputs) / 10)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        weight = self.stored()
        return torch.conv2d(x, weight, self.bias, self.stride, weight.shape[-1] // 2)


class Dense(nn.Module):
    """A matrix product with its bias in float or, for inputs of a known scale, in int32."""

    def __init__(self, inputs: int, outputs: int, input_scale: float | None = None) -> None:
        super().__init__()
        self.stored, self.bias = StoredWeight(outputs, inputs), nn.Parameter(torch.randn(outputs) / 10)
        if input_scale is not None:
            self.register_buffer("bias_scale", self.stored.scale * input_scale)
            self.register_buffer("integers", (self.bias.detach() / self.bias_scale).round().to(torch.int32))
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias
        if bias is None:
            bias = OPS.dequantize(self.integers, self.bias_scale, self.stored.zero_point, 0)
        return linear(x, self.stored(), bias)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.middle = Conv(inputs, outputs, 3, stride), Rounded(0.02)
        self.second, self.branch, self.sum = Conv(outputs, outputs), Rounded(0.04, 120), Rounded(0.03)
        plain = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if plain else nn.Sequential(Conv(inputs, outputs, 1, stride), Rounded(0.04, 128))

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(self.branch(self.second(self.middle(self.first(x)))) + self.skip(x))


class IntegerResNet(nn.Module):
    """As ONNX Runtime likes it: 6 convolutions, 2 adds, 1 pool and 1 matrix product on integers."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.stem, self.start = Rounded(0.03, 128), Conv(3, 8), Rounded(0.02)
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
        self.pooled, self.head = Rounded(0.02), Dense(16, 10, input_scale=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.start(self.stem(self.input(x))))
        return self.head(self.pooled(x.mean((2, 3))))


class SignedResidual(nn.Module):
    """As TensorRT likes it: symmetric, quantized behind the activation, none in front of the add."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.stem, self.start = signed(0.03), Conv(3, 32), signed(0.02)
        self.second, self.sum, self.head = Conv(32, 32), signed(0.02), Dense(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(self.stem(self.input(x)).relu())
        return self.head(self.sum((self.second(x) + x).relu().mean((2, 3))))


class IntegerFeedForward(nn.Module):
    """A transformer's feed-forward layer with float results of its products."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.input, self.up = nn.LayerNorm(32), Rounded(0.03, 128), Dense(32, 64)
        self.middle, self.down = Rounded(0.02, 10), Dense(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.middle(gelu(self.up(self.input(self.norm(x))))))

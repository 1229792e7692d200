"""Tiny models that the distillation tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block: conv, norm, relu, conv, norm, add, relu."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class ResidualNet(nn.Module):
    """A stem, two residual blocks around a stride, and a linear head."""

    def __init__(self, inner: int = 8) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.layer1, self.down, self.layer2 = Block(8, inner), nn.Conv2d(8, 8, 2, stride=2), Block(8, inner)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.stem_bn(self.stem(x)).relu())
        x = self.layer2(self.down(x))
        return self.head(self.drop(x.mean((2, 3))))


class Mlp(nn.Module):
    """A plain chain: three linear layers, two of them in a row without an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)).relu())


class Encoder(nn.Module):
    """A pre-norm transformer layer pair whose attention mask reaches every layer from outside."""

    def __init__(self, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(EncoderLayer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(tokens)
        bias = (1.0 - mask[:, None, :].float()) * -1e4
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x)


class EncoderLayer(nn.Module):
    """Attention and a feed-forward, each with its residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + bias).softmax(-1)
        x = x + self.out(weights @ v)
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


def settled(model: nn.Module, batch: Tensor) -> nn.Module:
    """Give `model` BatchNorm statistics that fit `batch`, and scales that keep every channel alive."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.2, 0.2)
            norm.momentum = None
        model.train()(batch)
        for norm in norms:
            norm.momentum = 0.1
    return model.eval()

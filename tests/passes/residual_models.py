"""Small models with residual branches of every shape; each takes `example(model)`."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

WIDTH = 8


class ConvBlock(nn.Module):
    """Two convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        y += self.shortcut(x)
        return F.relu(y)


class ResNet(nn.Module):
    """Three blocks, the second with a projected shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.blocks = nn.Sequential(ConvBlock(WIDTH, WIDTH), ConvBlock(WIDTH, 12, 2), ConvBlock(12, 12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Attention(nn.Module):
    """Multi-head self-attention, with a mask where one is given."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, t, c = x.shape
        q, k, v = (layer(x).view(b, t, 2, c // 2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / 2.0
        if mask is not None:
            scores = scores + mask[:, None, None, :]
        y = self.drop(scores.softmax(-1)) @ v
        return self.out(y.transpose(1, 2).reshape(b, t, c))


class Mlp(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(F.gelu(self.up(x))))


class Layer(nn.Module):
    """One transformer layer: norms before or behind, one branch after the other or side by side."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style, self.attn, self.mlp = style, Attention(), Mlp()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.style == "post":
            x = self.norm1(x + self.attn(x, mask))
            return self.norm2(x + self.mlp(x))
        if self.style == "parallel":
            y = self.norm1(x)
            return x + self.attn(y, mask) + self.mlp(y)
        if self.style == "joined":
            y = self.norm1(x)
            return x + (self.attn(y, mask) + self.mlp(y))
        x = x + self.scale1 * self.attn(self.norm1(x), mask)
        return x + self.scale2 * self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Two layers of one style: pre, post, parallel, joined."""

    def __init__(self, style: str, masked: bool = False) -> None:
        super().__init__()
        self.masked = masked
        self.embed = nn.Linear(5, WIDTH)
        self.layers = nn.ModuleList(Layer(style) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(self.norm(x)).mean(1)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, layer norm over channels, layer scale, stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm, self.mlp = nn.LayerNorm(WIDTH), Mlp()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.gamma * self.mlp(self.norm(self.dwconv(x).permute(0, 2, 3, 1)))
        return x + y.permute(0, 3, 1, 2)


class InvertedBottleneck(nn.Module):
    """Expand, depthwise, squeeze-excite, project."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depthwise = nn.Conv2d(WIDTH, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.squeeze, self.excite, self.project = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1), nn.Conv2d(16, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.depthwise(F.silu(self.expand(x))))
        y = y * self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        return x + self.project(y)


class Nested(nn.Module):
    """A global shortcut around two residual blocks, as in image restoration."""

    def __init__(self, block: type[nn.Module] = ConvNeXtBlock) -> None:
        super().__init__()
        self.stem, self.tail, self.head = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, 3, 1)
        self.body = nn.Sequential(block(), block())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.tail(self.body(x)))


def example(model: nn.Module) -> tuple[Tensor, ...]:
    """Return a batch of two that `model` takes."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, Transformer):
        x = torch.randn(2, 6, 5, generator=generator)
        return (x, torch.zeros(2, 6)) if model.masked else (x,)
    return (torch.randn(2, 3, 8, 8, generator=generator),)


def every_kind() -> dict[str, nn.Module]:
    """Return one model of each shape, with statistics and scales away from their trivial values."""
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {style: Transformer(style) for style in ("pre", "post", "parallel", "joined")}
    models |= {"masked": Transformer("pre", masked=True), "resnet": ResNet(), "nested": Nested()}
    models["inverted"] = Nested(InvertedBottleneck)
    for model in models.values():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.uniform_(-0.2, 0.2)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return models

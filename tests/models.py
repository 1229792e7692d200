"""Tiny models, each showing one structure; every forward takes what its `example` says."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.ir.program import Program


class Residual(nn.Module):
    """Two convolutions around a skip: the stem, the second convolution and the head share one axis."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.outer, self.head = nn.Conv2d(12, 8, 3, padding=1), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        x += self.outer(F.relu(self.inner_norm(self.inner(x))))
        return self.head(x.mean((2, 3)))


class Depthwise(nn.Module):
    """Inverted bottleneck: expand, depthwise (multiplier 2), squeeze-excite, project."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depthwise = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.depthwise(F.relu6(self.expand(x))))
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        return self.project(x * gate).amax((2, 3))


class GroupedShuffle(nn.Module):
    """Grouped convolutions around a channel shuffle, split in halves and joined again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 24, 3, padding=1, groups=3)
        self.right, self.head = nn.Conv2d(12, 12, 1), nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.stem(x).relu())
        b, c, h, w = x.shape
        x = x.view(b, 3, c // 3, h, w).transpose(1, 2).reshape(b, c, h, w)
        left, right = x.chunk(2, dim=1)
        return self.head(torch.cat([left.relu(), self.right(right)], 1)).mean((2, 3))


class Dense(nn.Module):
    """Dense concatenation with BatchNorm over what was joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(10, 4, 1)
        self.norm, self.head = nn.BatchNorm2d(14), nn.Linear(14 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.first(x.relu())], 1)
        x = torch.cat([x, self.second(x.relu())], 1)
        return self.head(F.adaptive_avg_pool2d(self.norm(x), 2).flatten(1))


class UNet(nn.Module):
    """Down, up by a transposed convolution and by pixel shuffle, with a skip that is joined."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.down = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.up, self.fine = nn.ConvTranspose2d(8, 10, 2, stride=2), nn.Conv2d(8, 16, 1)
        self.head = nn.Conv2d(6 + 10 + 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.inside(x).relu()
        deep = self.down(skip).relu()
        return self.head(torch.cat([skip, self.up(deep), F.pixel_shuffle(self.fine(deep), 2)], 1))


class OptionA(nn.Module):
    """The parameter-free shortcut: every second pixel, channels padded with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.body(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.head(x.relu().mean((2, 3)))


class FusedAttention(nn.Module):
    """Attention on one fused projection, viewed as (3, heads, head_dim); pre-norm, layer scale."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.embed, self.qkv, self.proj = nn.Linear(7, width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.scale, self.head = nn.Parameter(torch.ones(width)), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c)
        return self.head(x + self.scale * self.proj(y))[:, 0]


class SplitAttention(nn.Module):
    """Attention by hand on separate projections, heads merged into the batch: (batch * heads, tokens, dim)."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.dim = heads, width // heads
        self.q, self.k, self.v = nn.Linear(7, width), nn.Linear(7, width), nn.Linear(7, width)
        self.out = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(b, t, self.heads, self.dim).transpose(1, 2).reshape(b * self.heads, t, self.dim)

        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        y = torch.bmm((q @ k.transpose(1, 2) / self.dim**0.5).softmax(-1), v)
        return self.out(y.view(b, self.heads, t, self.dim).transpose(1, 2).flatten(2))


class GroupedQuery(nn.Module):
    """Llama's attention: 4 query heads on 2 key-value heads, rotary halves, RMS norm, SwiGLU."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, width), nn.Linear(width, 11, bias=False)
        self.q, self.k, self.v = nn.Linear(width, 16), nn.Linear(width, 8), nn.Linear(width, 8)
        self.o, self.gate, self.down = nn.Linear(16, width), nn.Linear(width, 2 * 20), nn.Linear(20, width)
        self.norm = nn.Parameter(torch.ones(width))
        self.register_buffer("inv_freq", torch.tensor([1.0, 0.1]))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        b, t, _ = x.shape
        angle = torch.outer(torch.arange(t, device=ids.device).to(x.dtype), self.inv_freq)
        cos, sin = (torch.cat((f, f), -1) for f in (angle.cos(), angle.sin()))
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.norm

        def heads(z: Tensor) -> Tensor:
            return z.view(b, t, -1, 4).transpose(1, 2)

        def rotate(z: Tensor) -> Tensor:
            return z * cos + torch.cat((-z[..., 2:], z[..., :2]), -1) * sin

        def repeat(z: Tensor) -> Tensor:
            return z[:, :, None].expand(b, 2, 2, t, 4).reshape(b, 4, t, 4)

        q, k, v = rotate(heads(self.q(y))), repeat(rotate(heads(self.k(y)))), repeat(heads(self.v(y)))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, -1))
        gate, up = self.gate(x).chunk(2, -1)
        return self.head(x + self.down(F.silu(gate) * up))


class TiedWeights(nn.Module):
    """The embedding is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.down(F.gelu(self.up(x))))


class Mixer(nn.Module):
    """Token mixing: the number of tokens comes from the input and must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.LayerNorm(8)
        self.tokens, self.back = nn.Linear(4, 6), nn.Linear(6, 4)
        self.channels, self.head = nn.Linear(8, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patch(x).flatten(2).transpose(1, 2))
        x = x + self.back(self.tokens(x.transpose(1, 2)).relu()).transpose(1, 2)
        return self.head(self.channels(x).relu().mean(1))


class GroupNormed(nn.Module):
    """GroupNorm makes channels (groups x channels per group)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 12, 1), nn.GroupNorm(3, 12), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x))).mean((2, 3))


class WeightNormed(nn.Module):
    """Weights that are computed: weight norm on one convolution, a transposed product of two on another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 8, 3))
        self.low, self.high, self.head = (
            nn.Parameter(torch.randn(8, 4)),
            nn.Parameter(torch.randn(4, 6)),
            nn.Linear(6, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean(2) @ (self.low @ self.high))


class WritesThroughViews(nn.Module):
    """In-place writes into slices of a buffer that is read later."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(7, 6), nn.Linear(7, 4), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        joined = x.new_zeros(x.shape[0], 10)
        joined[:, :6] = self.a(x)
        joined[:, 6:].copy_(self.b(x)).relu_()
        return self.head(joined)


class Recurrent(nn.Module):
    """Two bidirectional layers: their four cells share one hidden axis."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(7, 9), nn.Linear(12, 5)
        self.lstm = nn.LSTM(9, 6, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(x).relu())[0])


class NeighbourGate(nn.Module):
    """ECA: a convolution across channels, so that their order matters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.head = nn.Conv2d(3, 8, 1), nn.Conv1d(1, 1, 3, padding=1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = self.mix(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1).sigmoid()
        return self.head(x * gate).mean((2, 3))


IMAGE, TOKENS, STEPS, IDS, VECTOR, SERIES = "image", "tokens", "steps", "ids", "vector", "series"

EXAMPLES: dict[type[nn.Module], str] = {
    Residual: IMAGE,
    Depthwise: IMAGE,
    GroupedShuffle: IMAGE,
    Dense: IMAGE,
    UNet: IMAGE,
    OptionA: IMAGE,
    FusedAttention: TOKENS,
    SplitAttention: TOKENS,
    GroupedQuery: IDS,
    TiedWeights: IDS,
    Mixer: IMAGE,
    GroupNormed: IMAGE,
    WeightNormed: SERIES,
    WritesThroughViews: VECTOR,
    Recurrent: STEPS,
    NeighbourGate: IMAGE,
}


def example(model: nn.Module | type[nn.Module], batch: int = 2) -> Tensor:
    """Return an input for a model of this module: double precision where it is not token ids."""
    kind = EXAMPLES[model if isinstance(model, type) else type(model)]
    generator = torch.Generator().manual_seed(batch)
    if kind == IDS:
        return torch.randint(0, 11, (batch, 6), generator=generator)
    shape = {IMAGE: (3, 8, 8), TOKENS: (6, 7), STEPS: (3, 7), VECTOR: (7,), SERIES: (3, 9)}[kind]
    return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)


@functools.cache
def captured(kind: type[nn.Module]) -> Program:
    """Capture a model in double precision, once in a process: nobody writes to a program."""
    torch.manual_seed(0)
    return capture(kind().double(), (example(kind),))

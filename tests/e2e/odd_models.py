"""Small models that are odd and real: each has one trait that deployment tools stumble over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class SeveralInputs(nn.Module):
    """Image and features in; a dictionary with a nested tuple out."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.features = nn.Conv2d(3, 16, 3), nn.Linear(10, 16)
        self.head, self.side = nn.Linear(32, 4), nn.Linear(32, 6)

    def forward(self, image: Tensor, features: Tensor) -> dict[str, Any]:
        joined = torch.cat([self.image(image).relu().mean((2, 3)), self.features(features).relu()], 1)
        return {"logits": self.head(joined), "more": (self.side(joined), joined)}


class OptionalInput(nn.Module):
    """An input by keyword that is None by default, and another that is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(10, 32), nn.Linear(10, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, bias: Tensor | None = None, *, scale: Tensor | None = None) -> Tensor:
        hidden = self.first(x)
        if bias is not None:
            hidden = hidden + self.second(bias)
        if scale is not None:
            hidden = hidden * scale
        return self.head(hidden.relu())


class TiedHead(nn.Module):
    """Tokens in; the embedding's table is the output layer's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.up, self.down = nn.Embedding(50, 32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        return self.head(x + self.down(F.gelu(self.up(x))))


class Waveform(nn.Module):
    """1-d convolutions, strided, dilated and grouped, and a pooling between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(2, 16, 5, stride=2, padding=2),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Conv1d(16, 32, 3, padding=2, dilation=2, groups=4),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(32, 16, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(16, 4),
        )

    def forward(self, wave: Tensor) -> Tensor:
        return self.layers(wave)


class Volume(nn.Module):
    """3-d convolutions with BatchNorm and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8), nn.Conv3d(8, 16, 3)
        self.pool, self.head = nn.MaxPool3d(2), nn.Linear(16, 3)

    def forward(self, volume: Tensor) -> Tensor:
        x = self.pool(self.norm(self.first(volume)).relu())
        return self.head(self.second(x).relu().mean((2, 3, 4)))


class Generator(nn.Module):
    """Latent vector to image by transposed convolutions, one of them grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.norm = nn.ConvTranspose2d(12, 32, 4, bias=False), nn.BatchNorm2d(32)
        self.up, self.last = nn.ConvTranspose2d(32, 16, 4, 2, 1, groups=2), nn.ConvTranspose2d(16, 3, 4, 2, 1)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.norm(self.start(latent[:, :, None, None])).relu()
        return torch.tanh(self.last(F.leaky_relu(self.up(x), 0.2)))


class Separable(nn.Module):
    """Grouped and depthwise convolutions, with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth, self.point = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 32, 1)
        self.grouped, self.gate, self.head = nn.Conv2d(32, 32, 3, groups=4), nn.Conv2d(32, 32, 1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.point(F.hardswish(self.depth(F.relu(self.stem(x))))))
        x = self.grouped(x)
        x = x * self.gate(F.adaptive_avg_pool2d(x, 1)).sigmoid()
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    """A recurrent layer, in both directions, over a sequence; the last step is classified."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.inner = kind(6, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 4)

    def forward(self, steps: Tensor) -> Tensor:
        states, _ = self.inner(steps)
        return self.head(states[:, -1])


class Passthrough(nn.Module):
    """Returns its input beside what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.second(self.first(x).relu())


class Echo(nn.Module):
    """Returns its input alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Branching(nn.Module):
    """Decides by the data which layer to run (torch.cond)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.head = (
            nn.Linear(a, b) for a, b in ((8, 32), (32, 32), (32, 32), (32, 4))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = torch.cond(x.mean() > 0.3, lambda y: self.left(y).relu(), lambda y: self.right(y).tanh(), (x,))
        return self.head(x)


class WeightNormed(nn.Module):
    """Weights computed from a direction and a length at every call, one of them from a spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations
        self.first, self.second = norm.weight_norm(nn.Conv1d(3, 16, 3)), norm.weight_norm(nn.Conv1d(16, 24, 3))
        self.head = norm.spectral_norm(nn.Linear(24, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean(2))


class Normed(nn.Module):
    """GroupNorm, InstanceNorm with and without parameters, and LayerNorm over channels and space."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.group = nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16)
        self.second, self.instance = nn.Conv2d(16, 16, 3), nn.InstanceNorm2d(16, affine=True)
        self.third, self.plain, self.layer = nn.Conv2d(16, 8, 3), nn.InstanceNorm2d(8), nn.LayerNorm([8, 6, 6])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.instance(self.second(self.group(self.first(x)).relu())).relu()
        return self.head(self.layer(self.plain(self.third(x))).relu().mean((2, 3)))


class HandNormed(nn.Module):
    """Norms written by hand: mean and variance over channels first, and a root mean square."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 1), nn.Linear(32, 4)
        self.scale, self.shift = nn.Parameter(torch.rand(16, 1, 1) + 0.5), nn.Parameter(torch.randn(16, 1, 1))
        self.gain = nn.Parameter(torch.rand(32) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6) * self.scale + self.shift
        x = self.second(x.relu()).mean((2, 3))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain
        return self.head(x)


class Counter(nn.Module):
    """Counts its calls in a buffer."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.first, self.head = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.first(x).relu())


class Scratch(nn.Module):
    """Fills a buffer anew at every call before reading it."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(32))
        self.first, self.head = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.table.copy_(self.first.weight.sum(1))
        return self.head(self.first(x).relu() + self.table)


class ScalarOutput(nn.Module):
    """One number for the whole batch, and one for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.head(self.first(x).relu())
        return x.square().mean(), x.amax(1)


class NoParameters(nn.Module):
    """Pre-processing: nothing to learn."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        return F.normalize(F.avg_pool2d(x, 3).flatten(1), dim=1)


class Duplicates(nn.Module):
    """Returns one value twice, and one layer's output before and after its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.first(x)
        logits = self.head(hidden.relu())
        return [logits, hidden, logits]


class Reused(nn.Module):
    """One module called three times, twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(self.stem(x).relu()).relu()).relu()
        return self.head(x + self.block(x))


class Squeezed(nn.Module):
    """A plain CNN; its data lie channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Linear(32 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.max_pool2d(self.second(self.first(x).relu()).relu(), 1).flatten(1))


class FixedBatch(nn.Module):
    """Reshapes to a batch of 4: no other batch fits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 32), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).relu().reshape(2, 1, 64)[:, 0])


class AnyLength(nn.Module):
    """A causal attention over a sequence of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, 32), nn.Embedding(64, 32)
        self.qkv, self.out, self.norm = nn.Linear(32, 96), nn.Linear(32, 32), nn.LayerNorm(32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 50)

    def forward(self, ids: Tensor) -> Tensor:
        b, t = ids.shape
        x = self.tokens(ids) + self.places(torch.arange(t))
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 4, 8).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, 32))
        return self.head(x + self.down(F.silu(self.up(x))))


class Detector(nn.Module):
    """Scores and positions of the best three of all places: integer and boolean outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.score = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = self.score(self.stem(x).relu()).flatten(1)
        best, places = flat.topk(3, dim=1)
        return best, places, best > 0


class Masked(nn.Module):
    """A boolean mask and an integer length beside the floats."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 32), nn.Linear(32, 4)

    def forward(self, steps: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        x = self.first(steps).relu().masked_fill(~mask[..., None], 0.0)
        return self.head(x.sum(1) / lengths[:, None].clamp(min=1))


class RawImages(nn.Module):
    """Takes bytes and scales them itself; any height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Linear(16, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        x = (pixels.float() / 255 - 0.45) / 0.225
        return self.head(self.stem(x).relu().mean((2, 3)))


class AnySize(nn.Module):
    """A segmentation head: back to the size of the input, whatever it is."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.middle(self.down(x).relu()).relu())
        return F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)


class Attending(nn.Module):
    """torch's own attention with a padding mask; masked scores are minus infinity in an output."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 1)

    def forward(self, x: Tensor, padding: Tensor) -> dict[str, Tensor | None]:
        mixed, _ = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)
        scores = self.head(self.norm(x + mixed)).squeeze(-1).masked_fill(padding, float("-inf"))
        return {"scores": scores, "unused": None, "best": scores.argmax(1)}


class Bags(nn.Module):
    """A bag of words: mean of embeddings, then classes, as an embedding bag of fixed size."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.hidden, self.head = nn.EmbeddingBag(50, 32, mode="mean"), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(self.bag(ids)).relu())


class Overwriting(nn.Module):
    """Normalises its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        x.mul_(2.0).clamp_(-2, 2)
        return self.head(self.first(x).relu_())


class Constants(nn.Module):
    """Returns a parameter, a buffer's row and a number that depend on no input."""

    anchors: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 32), nn.Linear(32, 4)
        self.register_buffer("anchors", torch.randn(5, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.head(self.first(x).relu()), self.anchors, self.head.weight


class Regions(nn.Module):
    """Recomputes activations, leaves gradients out, and computes a part in reduced precision."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.abs().amax(1, keepdim=True)
        x = checkpoint(lambda y: self.first(y).relu(), x / scale, use_reentrant=False)
        with torch.autocast("cpu", enabled=False):
            x = self.second(x).relu()
        return self.head(x)


class BatchStatistics(nn.Module):
    """BatchNorm without running statistics: normalises by the batch in evaluation, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, track_running_stats=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x)).relu().mean((2, 3)))


class BrainFloats(nn.Module):
    """Takes and returns single precision and computes in bfloat16 between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 32).bfloat16(), nn.Linear(32, 4).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x.bfloat16()).relu()).float()

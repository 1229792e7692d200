"""Structures that no classification zoo has: U-Net, YOLO-style splits, a GAN generator, recurrent stacks."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn
from zoo_subject import Build, Subject, image


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, stride=stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.SiLU())


class UNet(nn.Module):
    """Skips concatenated to what transposed convolutions bring up."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down = nn.ModuleList([_conv(3, width), _conv(width, 2 * width), _conv(2 * width, 4 * width)])
        self.raise_ = nn.ModuleList(
            [nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)]
        )
        self.up = nn.ModuleList([_conv(4 * width, 2 * width), _conv(2 * width, width)])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for index, block in enumerate(self.down):
            x = block(x if index == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for bring_up, block, skip in zip(self.raise_, self.up, skips[-2::-1], strict=True):
            x = block(torch.cat([bring_up(x), skip], 1))
        mask: Tensor = self.head(x)
        return mask


class C2f(nn.Module):
    """Split in two, a chain of residual bottlenecks on one part, all parts concatenated (YOLOv8)."""

    def __init__(self, inputs: int, outputs: int, depth: int = 2) -> None:
        super().__init__()
        self.hidden = outputs // 2
        self.first = _conv(inputs, 2 * self.hidden, 1)
        self.last = _conv((2 + depth) * self.hidden, outputs, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(_conv(self.hidden, self.hidden), _conv(self.hidden, self.hidden)) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).split((self.hidden, self.hidden), 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        joined: Tensor = self.last(torch.cat(parts, 1))
        return joined


class Detector(nn.Module):
    """Backbone of C2f blocks, pooling pyramid, upsampled neck, two heads decoded to boxes by a softmax."""

    def __init__(self, bins: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.stem, self.stage1 = _conv(3, 16, stride=2), C2f(16, 32)
        self.down, self.stage2 = _conv(32, 64, stride=2), C2f(64, 64)
        self.pool_in, self.pool_out = _conv(64, 32, 1), _conv(128, 64, 1)
        self.neck = C2f(96, 32)
        self.box, self.label = nn.Conv2d(32, 4 * bins, 1), nn.Conv2d(32, classes, 1)
        self.bins = bins
        self.register_buffer("places", torch.arange(bins).float())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.stage1(self.stem(x))
        coarse = self.pool_in(self.stage2(self.down(fine)))
        pools = [coarse]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], 5, 1, 2))
        coarse = self.pool_out(torch.cat(pools, 1))
        x = self.neck(torch.cat([F.interpolate(coarse, scale_factor=2.0), fine], 1))
        b, _, h, w = x.shape
        box = self.box(x).view(b, 4, self.bins, h * w).softmax(2)
        return torch.einsum("bkns,n->bks", box, self.places), self.label(x).flatten(2)


class Generator(nn.Module):
    """Noise to image through transposed convolutions (DCGAN)."""

    def __init__(self, noise: int = 32, width: int = 16) -> None:
        super().__init__()
        sizes = [noise, 4 * width, 2 * width, width]
        layers: list[nn.Module] = []
        for index in range(3):
            stride, padding = (1, 0) if index == 0 else (2, 1)
            layers.append(nn.ConvTranspose2d(sizes[index], sizes[index + 1], 4, stride, padding, bias=False))
            layers += [nn.BatchNorm2d(sizes[index + 1]), nn.ReLU(True)]
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh())

    def forward(self, noise: Tensor) -> Tensor:
        image: Tensor = self.layers(noise)
        return image


class Tagger(nn.Module):
    """Embedding, recurrent stack, linear."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU], bidirectional: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.project = nn.Linear(24, 32)
        self.recurrent = cell(32, 40, 2, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Sequential(nn.Linear(80 if bidirectional else 40, 32), nn.ReLU(), nn.Linear(32, 7))

    def forward(self, words: Tensor) -> Tensor:
        hidden, _ = self.recurrent(self.project(self.embedding(words)))
        tags: Tensor = self.head(hidden)
        return tags


class SuperResolution(nn.Module):
    """Pixel shuffle at the end of a residual chain."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 16, 3, padding=1), _conv(16, 16)
        self.up, self.head = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        larger: Tensor = self.head(F.pixel_shuffle(self.up(x + self.block(x)), 2).relu())
        return larger


def _words() -> Tensor:
    return torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def _transformer() -> Subject:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return Subject(nn.Sequential(nn.Linear(20, 64), nn.TransformerEncoder(layer, 2), nn.Linear(64, 5)), (
        torch.randn(2, 9, 20),
    ))  # fmt: skip


def _seq2seq() -> Subject:
    model = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
    return Subject(model, (torch.randn(2, 7, 32), torch.randn(2, 5, 32)))


def subjects() -> dict[str, Build]:
    """Return a builder for each structure."""
    return {
        "unet": lambda: Subject(UNet(), (image(32),)),
        "yolo_c2f": lambda: Subject(Detector(), (image(64),)),
        "dcgan_generator": lambda: Subject(Generator(), (torch.randn(2, 32, 1, 1),)),
        "super_resolution": lambda: Subject(SuperResolution(), (image(16),)),
        "lstm": lambda: Subject(Tagger(nn.LSTM, False), (_words(),)),
        "lstm_bidirectional": lambda: Subject(Tagger(nn.LSTM, True), (_words(),)),
        "gru": lambda: Subject(Tagger(nn.GRU, False), (_words(),)),
        "torch_encoder": _transformer,
        "torch_seq2seq": _seq2seq,
    }

"""Kernels that are computed, grids that are bent, pixels and channels that change places."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from zoo_structures import Table, conv, image_model, parameter, pooled

_TABLE = Table()
subjects = _TABLE.subjects
_IMAGE = (2, 3, 8, 8)


@_TABLE.add(
    lambda: image_model(12, experts=parameter(3, 8, 12, 3, 3), route=nn.Linear(12, 3), head=nn.Linear(8, 5)), _IMAGE
)
def conditional_kernels(m: Any, x: Tensor) -> Tensor:
    """A kernel for each image, mixed of experts: run as one grouped convolution over images and channels."""
    x = m.norm(m.stem(x)).relu()
    n = x.shape[0]
    kernels = torch.einsum("ne,eoihw->noihw", m.route(x.mean((2, 3))).softmax(-1), m.experts)
    y = F.conv2d(x.reshape(1, -1, 8, 8), kernels.reshape(-1, 12, 3, 3), padding=1, groups=n)
    return pooled(m, y.view(n, 8, 8, 8).relu())


@_TABLE.add(lambda: image_model(12, made=nn.Linear(4, 12 * 12), seed=parameter(4)), _IMAGE)
def hypernetwork(m: Any, x: Tensor) -> Tensor:
    """The kernel of one layer is the output of another."""
    x = m.norm(m.stem(x)).relu()
    return pooled(m, x + F.conv2d(x, m.made(m.seed).view(12, 12, 1, 1)))


@_TABLE.add(lambda: image_model(12, a=conv(12, 4, 1), b=conv(4, 18, 1), out=conv(12, 12)), _IMAGE)
def involution(m: Any, x: Tensor) -> Tensor:
    """Kernels of each position, shared by the channels of a group."""
    x = m.norm(m.stem(x)).relu()
    n = x.shape[0]
    kernels = m.b(m.a(x).relu()).view(n, 2, 1, 9, 8, 8)
    patches = F.unfold(x, 3, padding=1).view(n, 2, 6, 9, 8, 8)
    return pooled(m, m.out((kernels * patches).sum(3).view(n, 12, 8, 8)))


@_TABLE.add(lambda: image_model(12, inner=conv(12, 16), group=nn.GroupNorm(4, 16), out=conv(16, 12)), _IMAGE)
def standardised_weights(m: Any, x: Tensor) -> Tensor:
    def standard(layer: nn.Conv2d, x: Tensor) -> Tensor:
        w = layer.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        return F.conv2d(x, w, layer.bias, padding=1)

    x = m.norm(m.stem(x)).relu()
    return pooled(m, x + standard(m.out, m.group(standard(m.inner, x)).relu()))


@_TABLE.add(
    lambda: image_model(
        12,
        a=parametrizations.weight_norm(conv(12, 16)),
        b=parametrizations.spectral_norm(conv(16, 8)),
        c=nn.utils.weight_norm(conv(8, 12)),
    ),
    _IMAGE,
)
def parametrised(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    return pooled(m, x + m.c(m.b(m.a(x).relu()).relu()))


@_TABLE.add(
    lambda: {
        "const": parameter(1, 8, 4, 4),
        "style": nn.Linear(6, 8),
        "w": parameter(12, 8, 3, 3),
        "style2": nn.Linear(6, 12),
        "rgb": conv(12, 3, 1),
    },
    (2, 6),
)
def modulated_generator(m: Any, z: Tensor) -> Tensor:
    """StyleGAN 2: the kernel scaled by the style and normalised, one group for each image."""
    n = z.shape[0]
    w = m.w[None] * m.style(z)[:, None, :, None, None]
    w = w * torch.rsqrt(w.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    x = m.const.expand(n, -1, -1, -1).reshape(1, n * 8, 4, 4)
    x = F.conv2d(x, w.flatten(0, 1), padding=1, groups=n).view(n, 12, 4, 4)
    x = F.leaky_relu(x, 0.2)
    x = (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 1e-5)
    return m.rgb(x * m.style2(z)[:, :, None, None])


@_TABLE.add(lambda: image_model(12, mix=parameter(3, 4, 6), out=conv(18, 12)), _IMAGE)
def grouped_by_einsum(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    y = torch.einsum("bgihw,gio->bgohw", x.unflatten(1, (3, 4)), m.mix).flatten(1, 2)
    return pooled(m, x + m.out(y.relu()))


@_TABLE.add(lambda: image_model(12, blur=torch.ones(1, 1, 3, 3) / 9, out=conv(12, 12)), _IMAGE)
def blurred(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), m.blur.repeat(12, 1, 1, 1), stride=2, groups=12)
    return pooled(m, m.out(x))


@_TABLE.add(lambda: image_model(12, offset=conv(12, 2), out=conv(12, 12)), _IMAGE)
def deformed(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    grid = F.affine_grid(torch.eye(2, 3).expand(x.shape[0], -1, -1), [x.shape[0], 1, 8, 8], align_corners=False)
    grid = grid + m.offset(x).tanh().permute(0, 2, 3, 1)
    return pooled(m, m.out(F.grid_sample(x, grid, align_corners=False)))


@_TABLE.add(lambda: image_model(12, out=conv(14, 12)), _IMAGE)
def coordinates(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    places = torch.stack([rows, columns]).expand(x.shape[0], -1, -1, -1)
    return pooled(m, m.out(torch.cat([x, places], 1)).relu())


@_TABLE.add(lambda: image_model(12, codes=parameter(7, 12), out=conv(12, 12)), _IMAGE)
def quantised_to_codes(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).permute(0, 2, 3, 1)
    nearest = torch.cdist(x.flatten(0, 2), m.codes).argmin(1)
    codes = F.embedding(nearest, m.codes).view_as(x)
    return pooled(m, m.out((x + (codes - x).detach()).permute(0, 3, 1, 2)))


@_TABLE.add(lambda: image_model(12, assign=conv(12, 4, 1), centres=parameter(4, 12), head=nn.Linear(48, 5)), _IMAGE)
def residuals_to_centres(m: Any, x: Tensor) -> Tensor:
    """NetVLAD."""
    x = m.norm(m.stem(x))
    weights = m.assign(x).flatten(2).softmax(1)
    residual = x.flatten(2).unsqueeze(1) - m.centres.unsqueeze(-1)
    pooled = F.normalize((residual * weights.unsqueeze(2)).sum(-1), dim=2)
    return m.head(F.normalize(pooled.flatten(1), dim=1))


@_TABLE.add(lambda: image_model(12, w=parameter(192, 3, 4, 4), head=nn.Linear(3, 5)), _IMAGE)
def capsules(m: Any, x: Tensor) -> Tensor:
    """Two rounds of routing by agreement."""

    def squash(t: Tensor) -> Tensor:
        square = t.pow(2).sum(-1, keepdim=True)
        return square / (1 + square) * t / (square + 1e-6).sqrt()

    x = m.norm(m.stem(x)).relu()
    low = squash(x.unflatten(1, (3, 4)).permute(0, 1, 3, 4, 2).reshape(x.shape[0], -1, 4))
    votes = torch.einsum("nid,iode->nioe", low, m.w)
    logits = torch.zeros(votes.shape[:3])
    for _ in range(2):
        out = squash((logits.softmax(2).unsqueeze(-1) * votes).sum(1))
        logits = logits + (votes * out.unsqueeze(1)).sum(-1)
    return m.head(out.norm(dim=-1))


@_TABLE.add(lambda: image_model(6, other=conv(3, 4), head=nn.Linear(24, 5)), _IMAGE)
def bilinear_pooling(m: Any, x: Tensor) -> Tensor:
    a, b = m.norm(m.stem(x)).relu().flatten(2), m.other(x).relu().flatten(2)
    y = torch.bmm(a, b.transpose(1, 2)).flatten(1)
    return m.head(F.normalize(y.sign() * (y.abs() + 1e-5).sqrt()))


@_TABLE.add(lambda: image_model(12, real=conv(24, 24, 1), out=conv(12, 12, 1)), _IMAGE)
def fourier_unit(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    f = torch.fft.rfft2(x, norm="ortho")
    y = m.real(torch.cat([f.real, f.imag], 1)).relu()
    y = torch.fft.irfft2(torch.complex(*y.chunk(2, 1)), s=(8, 8), norm="ortho")
    return pooled(m, x + m.out(y))


@_TABLE.add(lambda: image_model(12, out=conv(48, 12)), _IMAGE)
def haar(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    a, b, c, d = x[:, :, ::2, ::2], x[:, :, ::2, 1::2], x[:, :, 1::2, ::2], x[:, :, 1::2, 1::2]
    return pooled(m, m.out(torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], 1)))


@_TABLE.add(lambda: {"stem": conv(12, 16), "out": conv(16, 12), "tail": conv(3, 3)}, _IMAGE)
def focus_and_back(m: Any, x: Tensor) -> Tensor:
    """Sub-pixels into channels by strided slices, back by pixel shuffle."""
    y = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
    return x + m.tail(F.pixel_shuffle(m.out(m.stem(y).relu()), 2))


@_TABLE.add(lambda: image_model(12, a=conv(12, 8), down=conv(32, 12, 1)), _IMAGE)
def unshuffled(m: Any, x: Tensor) -> Tensor:
    return pooled(m, m.down(F.pixel_unshuffle(m.a(m.norm(m.stem(x))), 2)))

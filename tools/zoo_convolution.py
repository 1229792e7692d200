"""Convolutional structures off the beaten track."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from zoo_structures import Layers, Table, parameter

_TABLE = Table()
subjects = _TABLE.subjects
_IMAGE = (2, 3, 8, 8)


def _base(width: int = 12, **more: nn.Module | nn.Parameter | Tensor) -> Layers:
    return {
        "stem": nn.Conv2d(3, width, 3, padding=1),
        "norm": nn.BatchNorm2d(width),
        "head": nn.Linear(width, 5),
        **more,
    }


def _pooled(m: Any, x: Tensor) -> Tensor:
    return m.head(x.mean((2, 3)))


def _conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2 * int(options.get("dilation", 1)), **options)


@_TABLE.add(lambda: _base(12, a=_conv(4, 4), b=_conv(4, 4, groups=4)), _IMAGE)
def shuffle_in_three(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    a, b, c = x.chunk(3, 1)
    x = torch.cat([a, m.a(b).relu(), m.b(c).relu()], 1)
    return _pooled(m, x.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2))


@_TABLE.add(lambda: _base(12, film=nn.Linear(4, 24), out=_conv(12, 12)), _IMAGE, (2, 4))
def modulated_by_text(m: Any, x: Tensor, text: Tensor) -> Tensor:
    gain, shift = m.film(text)[:, :, None, None].chunk(2, 1)
    x = m.stem(x)
    return _pooled(m, x + m.out(F.relu((1 + gain) * m.norm(x) + shift)))


@_TABLE.add(lambda: _base(12, gate=nn.Conv1d(1, 1, 3, padding=1, bias=False)), _IMAGE)
def gate_along_channels(m: Any, x: Tensor) -> Tensor:
    """ECA: a convolution that slides over channels, which must therefore stay."""
    x = m.norm(m.stem(x)).relu()
    gate = m.gate(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1)
    return _pooled(m, x * gate.sigmoid())


@_TABLE.add(lambda: _base(12, a=nn.Linear(12, 4), b=nn.Linear(4, 12), space=_conv(2, 1, 5), out=_conv(12, 12)), _IMAGE)
def gates_of_channels_and_space(m: Any, x: Tensor) -> Tensor:
    """CBAM."""
    x = m.norm(m.stem(x)).relu()
    x = x * (m.b(m.a(x.mean((2, 3))).relu()) + m.b(m.a(x.amax((2, 3))).relu())).sigmoid()[:, :, None, None]
    both = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
    return _pooled(m, m.out(x * m.space(both).sigmoid()).relu())


@_TABLE.add(
    lambda: _base(12, where=_conv(12, 1, 1), a=_conv(12, 6, 1), ln=nn.LayerNorm([6, 1, 1]), b=_conv(6, 12, 1)), _IMAGE
)
def global_context(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    weights = m.where(x).flatten(2).softmax(2).unsqueeze(-1)
    context = torch.matmul(x.flatten(2).unsqueeze(1), weights.view(x.shape[0], 1, 64, 1)).view(x.shape[0], 12, 1, 1)
    return _pooled(m, x + m.b(m.ln(m.a(context)).relu()))


@_TABLE.add(
    lambda: _base(12, a=_conv(12, 12), b=_conv(12, 12, dilation=2), z=nn.Linear(12, 6), fc=nn.Linear(6, 24)), _IMAGE
)
def selected_kernels(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    branches = torch.stack([m.a(x), m.b(x)], 1)
    weights = m.fc(m.z(branches.sum(1).mean((2, 3))).relu()).view(x.shape[0], 2, 12).softmax(1)
    return _pooled(m, (branches * weights[..., None, None]).sum(1))


@_TABLE.add(lambda: _base(8, cheap=_conv(8, 8, groups=8), out=_conv(12, 8)), _IMAGE)
def ghost(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    return _pooled(m, x + m.out(torch.cat([x, m.cheap(x)], 1)[:, :12]))


@_TABLE.add(lambda: _base(16, a=_conv(4, 4), b=_conv(4, 4), c=_conv(4, 4), out=_conv(16, 16, 1)), _IMAGE)
def hierarchical_splits(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    parts = torch.split(x, 4, 1)
    done = [parts[0]]
    for layer, part in zip((m.a, m.b, m.c), parts[1:], strict=True):
        done.append(layer(part + done[-1] if len(done) > 1 else part).relu())
    return _pooled(m, x + m.out(torch.cat(done, 1)))


@_TABLE.add(
    lambda: _base(
        8, a=_conv(8, 4, dilation=1), b=_conv(12, 4, dilation=2), c=_conv(16, 4, dilation=4), head=nn.Linear(20, 5)
    ),
    _IMAGE,
)
def dilated_dense(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    for layer in (m.a, m.b, m.c):
        x = torch.cat([layer(x).relu(), x], 1)
    return _pooled(m, x)


@_TABLE.add(lambda: _base(12, hh=_conv(8, 8), hl=_conv(8, 4), lh=_conv(4, 8), ll=_conv(4, 4)), _IMAGE)
def octaves(m: Any, x: Tensor) -> Tensor:
    high, low = m.norm(m.stem(x)).relu().split([8, 4], 1)
    low = F.avg_pool2d(low, 2)
    new_high = m.hh(high) + F.interpolate(m.lh(low), scale_factor=2)
    new_low = m.ll(low) + m.hl(F.avg_pool2d(high, 2))
    return m.head(torch.cat([new_high.mean((2, 3)), new_low.mean((2, 3))], 1))


@_TABLE.add(lambda: _base(12, out=_conv(14, 12)), _IMAGE)
def coordinates(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    places = torch.stack([rows, columns]).expand(x.shape[0], -1, -1, -1)
    return _pooled(m, m.out(torch.cat([x, places], 1)).relu())


@_TABLE.add(lambda: _base(12, offset=_conv(12, 2), out=_conv(12, 12)), _IMAGE)
def deformed(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    grid = F.affine_grid(torch.eye(2, 3).expand(x.shape[0], -1, -1), [x.shape[0], 1, 8, 8], align_corners=False)
    grid = grid + m.offset(x).tanh().permute(0, 2, 3, 1)
    return _pooled(m, m.out(F.grid_sample(x, grid, align_corners=False)))


@_TABLE.add(lambda: _base(12, a=_conv(12, 4, 1), b=_conv(4, 18, 1), out=_conv(12, 12)), _IMAGE)
def involution(m: Any, x: Tensor) -> Tensor:
    """Kernels of each position, shared by the channels of a group."""
    x = m.norm(m.stem(x)).relu()
    n = x.shape[0]
    kernels = m.b(m.a(x).relu()).view(n, 2, 1, 9, 8, 8)
    patches = F.unfold(x, 3, padding=1).view(n, 2, 6, 9, 8, 8)
    return _pooled(m, m.out((kernels * patches).sum(3).view(n, 12, 8, 8)))


@_TABLE.add(lambda: _base(12, experts=parameter(3, 8, 12, 3, 3), route=nn.Linear(12, 3), head=nn.Linear(8, 5)), _IMAGE)
def conditional_kernels(m: Any, x: Tensor) -> Tensor:
    """A kernel for each image, mixed of experts: run as one grouped convolution over images and channels."""
    x = m.norm(m.stem(x)).relu()
    n = x.shape[0]
    kernels = torch.einsum("ne,eoihw->noihw", m.route(x.mean((2, 3))).softmax(-1), m.experts)
    y = F.conv2d(x.reshape(1, -1, 8, 8), kernels.reshape(-1, 12, 3, 3), padding=1, groups=n)
    return _pooled(m, y.view(n, 8, 8, 8).relu())


@_TABLE.add(lambda: _base(12, made=nn.Linear(4, 12 * 12), code=parameter(4)), _IMAGE)
def hypernetwork(m: Any, x: Tensor) -> Tensor:
    """The kernel of one layer is the output of another."""
    x = m.norm(m.stem(x)).relu()
    return _pooled(m, x + F.conv2d(x, m.made(m.code).view(12, 12, 1, 1)))


@_TABLE.add(lambda: _base(12, inner=_conv(12, 16), group=nn.GroupNorm(4, 16), out=_conv(16, 12)), _IMAGE)
def standardised_weights(m: Any, x: Tensor) -> Tensor:
    def standard(layer: nn.Conv2d, x: Tensor) -> Tensor:
        w = layer.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        return F.conv2d(x, w, layer.bias, padding=1)

    x = m.norm(m.stem(x)).relu()
    return _pooled(m, x + standard(m.out, m.group(standard(m.inner, x)).relu()))


@_TABLE.add(
    lambda: _base(
        12,
        a=parametrizations.weight_norm(_conv(12, 16)),
        b=parametrizations.spectral_norm(_conv(16, 8)),
        c=nn.utils.weight_norm(_conv(8, 12)),
    ),
    _IMAGE,
)
def parametrised(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    return _pooled(m, x + m.c(m.b(m.a(x).relu()).relu()))


@_TABLE.add(
    lambda: _base(
        12,
        a=_conv(12, 12),
        b=_conv(12, 12, 1),
        na=nn.BatchNorm2d(12),
        nb=nn.BatchNorm2d(12),
        same=nn.BatchNorm2d(12),
        out=_conv(12, 6),
        head=nn.Linear(6, 5),
    ),
    _IMAGE,
)
def many_branches(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    return _pooled(m, m.out(F.relu(m.na(m.a(x)) + m.nb(m.b(x)) + m.same(x))))


@_TABLE.add(lambda: {"stem": _conv(12, 16), "out": _conv(16, 12), "tail": _conv(3, 3)}, _IMAGE)
def focus_and_back(m: Any, x: Tensor) -> Tensor:
    """Sub-pixels into channels by strided slices, back by pixel shuffle."""
    y = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
    return x + m.tail(F.pixel_shuffle(m.out(m.stem(y).relu()), 2))


@_TABLE.add(lambda: _base(12, a=_conv(12, 8), down=_conv(32, 12, 1)), _IMAGE)
def unshuffled(m: Any, x: Tensor) -> Tensor:
    return _pooled(m, m.down(F.pixel_unshuffle(m.a(m.norm(m.stem(x))), 2)))


@_TABLE.add(lambda: _base(12, head=nn.Linear(4, 5), mid=_conv(6, 8)), _IMAGE)
def largest_of_pieces(m: Any, x: Tensor) -> Tensor:
    """Maxout over neighbours, then over halves."""
    x = m.norm(m.stem(x)).unflatten(1, (6, 2)).amax(2)
    return _pooled(m, m.mid(x).unflatten(1, (2, 4)).max(1).values)


@_TABLE.add(lambda: _base(12, out=_conv(24, 12)), _IMAGE)
def both_signs(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x))
    return _pooled(m, m.out(torch.cat([x, -x], 1).relu()))


@_TABLE.add(lambda: _base(12, out=_conv(12, 12, 1)), _IMAGE)
def shifted_in_space(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    a, b, c = x.chunk(3, 1)
    moved = torch.cat([torch.roll(a, 1, 2), torch.roll(b, -1, 3), c], 1)
    return _pooled(m, x + m.out(moved))


@_TABLE.add(lambda: _base(12, out=_conv(12, 12)), (8, 3, 8, 8))
def shifted_in_time(m: Any, x: Tensor) -> Tensor:
    """Parts of the channels move to the next and the previous frame, written into zeros (TSM)."""
    x = m.norm(m.stem(x)).relu().view(2, 4, 12, 8, 8)
    out = torch.zeros_like(x)
    out[:, :-1, :3] = x[:, 1:, :3]
    out[:, 1:, 3:6] = x[:, :-1, 3:6]
    out[:, :, 6:] = x[:, :, 6:]
    return _pooled(m, m.out(out.view(8, 12, 8, 8)))


@_TABLE.add(lambda: _base(12, mix=parameter(3, 4, 6), out=_conv(18, 12)), _IMAGE)
def grouped_by_einsum(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    y = torch.einsum("bgihw,gio->bgohw", x.unflatten(1, (3, 4)), m.mix).flatten(1, 2)
    return _pooled(m, x + m.out(y.relu()))


@_TABLE.add(lambda: _base(12, blur=torch.ones(1, 1, 3, 3) / 9, out=_conv(12, 12)), _IMAGE)
def blurred(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), m.blur.repeat(12, 1, 1, 1), stride=2, groups=12)
    return _pooled(m, m.out(x))


@_TABLE.add(
    lambda: _base(
        12,
        down=_conv(12, 24, stride=2),
        up=nn.ConvTranspose2d(24, 12, 2, 2),
        wx=_conv(12, 6, 1),
        wg=_conv(24, 6, 1),
        psi=_conv(6, 1, 1),
        out=_conv(24, 12),
    ),
    _IMAGE,
)
def gated_skip(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    low = m.down(x).relu()
    gate = m.psi(F.relu(m.wx(x) + F.interpolate(m.wg(low), size=x.shape[2:], mode="bilinear"))).sigmoid()
    return _pooled(m, m.out(torch.cat([x * gate, m.up(low)], 1)))


@_TABLE.add(
    lambda: {
        "const": parameter(1, 8, 4, 4),
        "style": nn.Linear(6, 8),
        "w": parameter(12, 8, 3, 3),
        "style2": nn.Linear(6, 12),
        "rgb": _conv(12, 3, 1),
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


@_TABLE.add(lambda: _base(12, codes=parameter(7, 12), out=_conv(12, 12)), _IMAGE)
def quantised_to_codes(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).permute(0, 2, 3, 1)
    nearest = torch.cdist(x.flatten(0, 2), m.codes).argmin(1)
    codes = F.embedding(nearest, m.codes).view_as(x)
    return _pooled(m, m.out((x + (codes - x).detach()).permute(0, 3, 1, 2)))


@_TABLE.add(lambda: _base(12, assign=_conv(12, 4, 1), centres=parameter(4, 12), head=nn.Linear(48, 5)), _IMAGE)
def residuals_to_centres(m: Any, x: Tensor) -> Tensor:
    """NetVLAD."""
    x = m.norm(m.stem(x))
    weights = m.assign(x).flatten(2).softmax(1)
    residual = x.flatten(2).unsqueeze(1) - m.centres.unsqueeze(-1)
    pooled = F.normalize((residual * weights.unsqueeze(2)).sum(-1), dim=2)
    return m.head(F.normalize(pooled.flatten(1), dim=1))


@_TABLE.add(lambda: _base(12, w=parameter(192, 3, 4, 4), head=nn.Linear(3, 5)), _IMAGE)
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


@_TABLE.add(lambda: _base(6, other=_conv(3, 4), head=nn.Linear(24, 5)), _IMAGE)
def bilinear_pooling(m: Any, x: Tensor) -> Tensor:
    a, b = m.norm(m.stem(x)).relu().flatten(2), m.other(x).relu().flatten(2)
    y = torch.bmm(a, b.transpose(1, 2)).flatten(1)
    return m.head(F.normalize(y.sign() * (y.abs() + 1e-5).sqrt()))


@_TABLE.add(lambda: _base(12, real=_conv(24, 24, 1), out=_conv(12, 12, 1)), _IMAGE)
def fourier_unit(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    f = torch.fft.rfft2(x, norm="ortho")
    y = m.real(torch.cat([f.real, f.imag], 1)).relu()
    y = torch.fft.irfft2(torch.complex(*y.chunk(2, 1)), s=(8, 8), norm="ortho")
    return _pooled(m, x + m.out(y))


@_TABLE.add(lambda: _base(12, out=_conv(48, 12)), _IMAGE)
def haar(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    a, b, c, d = x[:, :, ::2, ::2], x[:, :, ::2, 1::2], x[:, :, 1::2, ::2], x[:, :, 1::2, 1::2]
    return _pooled(m, m.out(torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], 1)))


@_TABLE.add(lambda: _base(12, step=_conv(12, 12)), _IMAGE)
def same_layer_again(m: Any, x: Tensor) -> Tensor:
    """Three Euler steps with one layer."""
    x = m.norm(m.stem(x)).relu()
    for _ in range(3):
        x = x + 0.1 * torch.tanh(m.step(x))
    return _pooled(m, x)


@_TABLE.add(lambda: _base(12, deep=_conv(12, 12), head=nn.Linear(24, 5)), _IMAGE, _IMAGE)
def siamese(m: Any, a: Tensor, b: Tensor) -> Tensor:
    a, b = (m.deep(m.norm(m.stem(x)).relu()).mean((2, 3)) for x in (a, b))
    return m.head(torch.cat([(a - b).abs(), a * b], 1))


@_TABLE.add(
    lambda: {
        "stem": nn.Conv3d(3, 8, 3, padding=1),
        "inner": nn.Conv3d(8, 6, (1, 3, 3), padding=(0, 1, 1)),
        "out": nn.Conv3d(6, 8, (3, 1, 1), padding=(1, 0, 0)),
        "norm": nn.InstanceNorm3d(8, affine=True),
        "head": nn.Linear(8, 5),
    },
    (2, 3, 4, 6, 6),
)
def video(m: Any, x: Tensor) -> Tensor:
    x = F.max_pool3d(m.norm(m.stem(x)).relu(), (1, 2, 2))
    return m.head((x + m.out(m.inner(x).relu())).mean((2, 3, 4)))


@_TABLE.add(lambda: _base(12, shared=_conv(12, 12), boxes=_conv(12, 8, 1), labels=_conv(12, 6, 1)), _IMAGE)
def pyramid_with_shared_heads(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    levels = [m.norm(m.stem(x)).relu()]
    levels.append(F.max_pool2d(levels[-1], 2))
    levels[0] = levels[0] + F.interpolate(levels[1], size=levels[0].shape[-2:])
    y = [m.shared(level).relu() for level in levels]
    boxes = torch.cat([m.boxes(t).permute(0, 2, 3, 1).reshape(t.shape[0], -1, 4) for t in y], 1)
    return boxes, torch.cat([m.labels(t).permute(0, 2, 3, 1).reshape(t.shape[0], -1, 3) for t in y], 1)


@_TABLE.add(
    lambda: _base(
        12,
        up=_conv(12, 24, 1),
        mid=_conv(24, 24, groups=24),
        down=_conv(24, 12, 1),
        scale=nn.Parameter(torch.rand(12, 1, 1)),
    ),
    _IMAGE,
)
def inverted_with_normalised_response(m: Any, x: Tensor) -> Tensor:
    """ConvNeXt 2: response normalisation across channels by hand."""
    x = m.norm(m.stem(x))
    y = F.gelu(m.up(x))
    length = torch.norm(y, p=2, dim=(2, 3), keepdim=True)
    y = y * (length / (length.mean(1, keepdim=True) + 1e-6)) + y
    return _pooled(m, x + m.scale * m.down(m.mid(y)))

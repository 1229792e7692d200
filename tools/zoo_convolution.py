"""Convolutional structures off the beaten track: gates, branches, splits, skips."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn
from zoo_structures import Table, conv, image_model, pooled

_TABLE = Table()
subjects = _TABLE.subjects
_IMAGE = (2, 3, 8, 8)


@_TABLE.add(lambda: image_model(12, a=conv(4, 4), b=conv(4, 4, groups=4)), _IMAGE)
def shuffle_in_three(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    a, b, c = x.chunk(3, 1)
    x = torch.cat([a, m.a(b).relu(), m.b(c).relu()], 1)
    return pooled(m, x.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2))


@_TABLE.add(lambda: image_model(12, film=nn.Linear(4, 24), out=conv(12, 12)), _IMAGE, (2, 4))
def modulated_by_text(m: Any, x: Tensor, text: Tensor) -> Tensor:
    gain, shift = m.film(text)[:, :, None, None].chunk(2, 1)
    x = m.stem(x)
    return pooled(m, x + m.out(F.relu((1 + gain) * m.norm(x) + shift)))


@_TABLE.add(lambda: image_model(12, gate=nn.Conv1d(1, 1, 3, padding=1, bias=False)), _IMAGE)
def gate_along_channels(m: Any, x: Tensor) -> Tensor:
    """ECA: a convolution that slides over channels, which must therefore stay."""
    x = m.norm(m.stem(x)).relu()
    gate = m.gate(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1)
    return pooled(m, x * gate.sigmoid())


@_TABLE.add(
    lambda: image_model(12, a=nn.Linear(12, 4), b=nn.Linear(4, 12), space=conv(2, 1, 5), out=conv(12, 12)), _IMAGE
)
def gates_of_channels_and_space(m: Any, x: Tensor) -> Tensor:
    """CBAM."""
    x = m.norm(m.stem(x)).relu()
    x = x * (m.b(m.a(x.mean((2, 3))).relu()) + m.b(m.a(x.amax((2, 3))).relu())).sigmoid()[:, :, None, None]
    both = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
    return pooled(m, m.out(x * m.space(both).sigmoid()).relu())


@_TABLE.add(
    lambda: image_model(12, where=conv(12, 1, 1), a=conv(12, 6, 1), ln=nn.LayerNorm([6, 1, 1]), b=conv(6, 12, 1)),
    _IMAGE,
)
def global_context(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    weights = m.where(x).flatten(2).softmax(2).unsqueeze(-1)
    context = torch.matmul(x.flatten(2).unsqueeze(1), weights.view(x.shape[0], 1, 64, 1)).view(x.shape[0], 12, 1, 1)
    return pooled(m, x + m.b(m.ln(m.a(context)).relu()))


@_TABLE.add(
    lambda: image_model(12, a=conv(12, 12), b=conv(12, 12, dilation=2), z=nn.Linear(12, 6), fc=nn.Linear(6, 24)), _IMAGE
)
def selected_kernels(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    branches = torch.stack([m.a(x), m.b(x)], 1)
    weights = m.fc(m.z(branches.sum(1).mean((2, 3))).relu()).view(x.shape[0], 2, 12).softmax(1)
    return pooled(m, (branches * weights[..., None, None]).sum(1))


@_TABLE.add(lambda: image_model(8, cheap=conv(8, 8, groups=8), out=conv(12, 8)), _IMAGE)
def ghost(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    return pooled(m, x + m.out(torch.cat([x, m.cheap(x)], 1)[:, :12]))


@_TABLE.add(lambda: image_model(16, a=conv(4, 4), b=conv(4, 4), c=conv(4, 4), out=conv(16, 16, 1)), _IMAGE)
def hierarchical_splits(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    parts = torch.split(x, 4, 1)
    done = [parts[0]]
    for layer, part in zip((m.a, m.b, m.c), parts[1:], strict=True):
        done.append(layer(part + done[-1] if len(done) > 1 else part).relu())
    return pooled(m, x + m.out(torch.cat(done, 1)))


@_TABLE.add(
    lambda: image_model(
        8, a=conv(8, 4, dilation=1), b=conv(12, 4, dilation=2), c=conv(16, 4, dilation=4), head=nn.Linear(20, 5)
    ),
    _IMAGE,
)
def dilated_dense(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    for layer in (m.a, m.b, m.c):
        x = torch.cat([layer(x).relu(), x], 1)
    return pooled(m, x)


@_TABLE.add(lambda: image_model(12, hh=conv(8, 8), hl=conv(8, 4), lh=conv(4, 8), ll=conv(4, 4)), _IMAGE)
def octaves(m: Any, x: Tensor) -> Tensor:
    high, low = m.norm(m.stem(x)).relu().split([8, 4], 1)
    low = F.avg_pool2d(low, 2)
    new_high = m.hh(high) + F.interpolate(m.lh(low), scale_factor=2)
    new_low = m.ll(low) + m.hl(F.avg_pool2d(high, 2))
    return m.head(torch.cat([new_high.mean((2, 3)), new_low.mean((2, 3))], 1))


@_TABLE.add(
    lambda: image_model(
        12,
        a=conv(12, 12),
        b=conv(12, 12, 1),
        na=nn.BatchNorm2d(12),
        nb=nn.BatchNorm2d(12),
        same=nn.BatchNorm2d(12),
        out=conv(12, 6),
        head=nn.Linear(6, 5),
    ),
    _IMAGE,
)
def many_branches(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    return pooled(m, m.out(F.relu(m.na(m.a(x)) + m.nb(m.b(x)) + m.same(x))))


@_TABLE.add(lambda: image_model(12, head=nn.Linear(4, 5), mid=conv(6, 8)), _IMAGE)
def largest_of_pieces(m: Any, x: Tensor) -> Tensor:
    """Maxout over neighbours, then over halves."""
    x = m.norm(m.stem(x)).unflatten(1, (6, 2)).amax(2)
    return pooled(m, m.mid(x).unflatten(1, (2, 4)).max(1).values)


@_TABLE.add(lambda: image_model(12, out=conv(24, 12)), _IMAGE)
def both_signs(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x))
    return pooled(m, m.out(torch.cat([x, -x], 1).relu()))


@_TABLE.add(lambda: image_model(12, out=conv(12, 12, 1)), _IMAGE)
def shifted_in_space(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    a, b, c = x.chunk(3, 1)
    moved = torch.cat([torch.roll(a, 1, 2), torch.roll(b, -1, 3), c], 1)
    return pooled(m, x + m.out(moved))


@_TABLE.add(lambda: image_model(12, out=conv(12, 12)), (8, 3, 8, 8))
def shifted_in_time(m: Any, x: Tensor) -> Tensor:
    """Parts of the channels move to the next and the previous frame, written into zeros (TSM)."""
    x = m.norm(m.stem(x)).relu().view(2, 4, 12, 8, 8)
    out = torch.zeros_like(x)
    out[:, :-1, :3] = x[:, 1:, :3]
    out[:, 1:, 3:6] = x[:, :-1, 3:6]
    out[:, :, 6:] = x[:, :, 6:]
    return pooled(m, m.out(out.view(8, 12, 8, 8)))


@_TABLE.add(
    lambda: image_model(
        12,
        down=conv(12, 24, stride=2),
        up=nn.ConvTranspose2d(24, 12, 2, 2),
        wx=conv(12, 6, 1),
        wg=conv(24, 6, 1),
        psi=conv(6, 1, 1),
        out=conv(24, 12),
    ),
    _IMAGE,
)
def gated_skip(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    low = m.down(x).relu()
    gate = m.psi(F.relu(m.wx(x) + F.interpolate(m.wg(low), size=x.shape[2:], mode="bilinear"))).sigmoid()
    return pooled(m, m.out(torch.cat([x * gate, m.up(low)], 1)))


@_TABLE.add(lambda: image_model(12, step=conv(12, 12)), _IMAGE)
def same_layer_again(m: Any, x: Tensor) -> Tensor:
    """Three Euler steps with one layer."""
    x = m.norm(m.stem(x)).relu()
    for _ in range(3):
        x = x + 0.1 * torch.tanh(m.step(x))
    return pooled(m, x)


@_TABLE.add(lambda: image_model(12, deep=conv(12, 12), head=nn.Linear(24, 5)), _IMAGE, _IMAGE)
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


@_TABLE.add(lambda: image_model(12, shared=conv(12, 12), boxes=conv(12, 8, 1), labels=conv(12, 6, 1)), _IMAGE)
def pyramid_with_shared_heads(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    levels = [m.norm(m.stem(x)).relu()]
    levels.append(F.max_pool2d(levels[-1], 2))
    levels[0] = levels[0] + F.interpolate(levels[1], size=levels[0].shape[-2:])
    y = [m.shared(level).relu() for level in levels]
    boxes = torch.cat([m.boxes(t).permute(0, 2, 3, 1).reshape(t.shape[0], -1, 4) for t in y], 1)
    return boxes, torch.cat([m.labels(t).permute(0, 2, 3, 1).reshape(t.shape[0], -1, 3) for t in y], 1)


@_TABLE.add(
    lambda: image_model(
        12,
        up=conv(12, 24, 1),
        mid=conv(24, 24, groups=24),
        down=conv(24, 12, 1),
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
    return pooled(m, x + m.scale * m.down(m.mid(y)))

"""Weights that are computed, tied, used again or stacked, and layers that come back together."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn
from zoo_structures import Table, parameter, rows_model, words

_TABLE = Table()
subjects = _TABLE.subjects
_ROWS = (2, 6, 10)  # batch, time, features


@_TABLE.add(lambda: {"a": nn.Linear(10, 12), "out": nn.Linear(12, 10), "bias": parameter(10)}, (2, 10))
def tied_autoencoder(m: Any, x: Tensor) -> Tensor:
    """The decoder is the transposed encoder."""
    h = m.out.weight.t()  # (12, 10)
    z = torch.tanh(F.linear(x, h, m.a.bias))
    return F.linear(z, m.out.weight, m.bias)


@_TABLE.add(
    lambda: {
        "word": nn.Embedding(30, 12),
        "up": nn.Linear(12, 16),
        "down": nn.Linear(16, 12),
        "norm": nn.LayerNorm(12),
    },
    words(2, 7),
)
def tied_words(m: Any, x: Tensor) -> Tensor:
    h = m.word(x)
    h = m.norm(h + m.down(F.gelu(m.up(h))))
    return h @ m.word.weight.T


@_TABLE.add(lambda: rows_model(12, a=nn.Linear(12, 12), b=nn.Linear(12, 12)), _ROWS)
def layers_at_swapped_places(m: Any, x: Tensor) -> Tensor:
    """Two layers are used in both orders, one of them transposed as well."""
    x = m.first(x)
    x = x + m.b(m.a(x).relu()) + m.a(m.b(x).relu())
    return m.head(x @ m.a.weight)


@_TABLE.add(
    lambda: {
        "w1": parameter(4, 10, 12),
        "b1": parameter(4, 1, 12),
        "w2": parameter(4, 12, 5),
        "b2": parameter(4, 1, 5),
    },
    (2, 10),
)
def ensemble_by_bmm(m: Any, x: Tensor) -> Tensor:
    h = torch.baddbmm(m.b1, x.expand(4, -1, -1), m.w1).relu()
    return (torch.bmm(h, m.w2) + m.b2).mean(0)


@_TABLE.add(lambda: {"w1": parameter(4, 12, 10), "b1": parameter(4, 12), "w2": parameter(4, 5, 12)}, (2, 10))
def ensemble_by_vmap(m: Any, x: Tensor) -> Tensor:
    def member(w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
        return F.linear(F.linear(x, w1, b1).relu(), w2)

    return torch.vmap(member)(m.w1, m.b1, m.w2).mean(0)


@_TABLE.add(lambda: rows_model(12, base=nn.Linear(12, 12), a=parameter(3, 12), b=parameter(12, 3)), _ROWS)
def low_rank_adapter(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    merged = m.base.weight + 0.5 * m.b @ m.a
    return m.head(x + F.linear(x, merged, m.base.bias).relu() + (x @ m.a.T) @ m.b.T)


@_TABLE.add(lambda: rows_model(12, a=parameter(3, 4, 5), b=parameter(5, 3, 4)), _ROWS)
def block_diagonal_twice(m: Any, x: Tensor) -> Tensor:
    """Monarch: two block-diagonal products around a transposition."""
    x = m.first(x)
    y = torch.einsum("btki,kij->btjk", x.unflatten(-1, (3, 4)), m.a)
    return m.head(x + torch.einsum("btjk,jkl->btkl", y, m.b).flatten(2).relu())


@_TABLE.add(lambda: rows_model(12, a=parameter(3, 4), b=parameter(4, 3)), _ROWS)
def kronecker_weight(m: Any, x: Tensor) -> Tensor:
    return m.head(F.linear(m.first(x), torch.kron(m.a, m.b)).relu())


@_TABLE.add(lambda: rows_model(12, skew=parameter(12, 12)), _ROWS)
def orthogonal_weight(m: Any, x: Tensor) -> Tensor:
    """Cayley's transform: a solver mixes all entries of the weight."""
    skew = m.skew - m.skew.T
    one = torch.eye(12)
    return m.head(m.first(x) @ torch.linalg.solve(one + skew, one - skew))


@_TABLE.add(
    lambda: {
        "grid": torch.linspace(-1, 1, 6),
        "c1": parameter(12, 10, 6),
        "s1": parameter(12, 10),
        "c2": parameter(5, 12, 6),
    },
    (2, 10),
)
def sums_of_splines(m: Any, x: Tensor) -> Tensor:
    """Kolmogorov-Arnold layers on radial bases."""
    h = torch.einsum("big,oig->bo", torch.exp(-((x.unsqueeze(-1) - m.grid) ** 2)), m.c1) + F.linear(F.silu(x), m.s1)
    return torch.einsum("big,oig->bo", torch.exp(-((h.unsqueeze(-1) - m.grid) ** 2)), m.c2)


@_TABLE.add(
    lambda: {"s": nn.ModuleList(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6)) for _ in range(2))}, (2, 6)
)
def coupling_flow(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    total = 0
    for net in m.s:
        a, b = x.chunk(2, 1)
        scale, shift = net(a).chunk(2, 1)
        x = torch.cat([b * scale.tanh().exp() + shift, a], 1)
        total = total + scale.tanh().sum(1)
    return x, total


@_TABLE.add(
    lambda: {"enc": nn.Linear(10, 12), "dist": nn.Linear(12, 8), "dec": nn.Linear(4, 12), "out": nn.Linear(12, 10)},
    (2, 10),
)
def variational(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_variance = m.dist(m.enc(x).relu()).chunk(2, -1)
    kl = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum(-1)
    return m.out(m.dec(mean).relu()), kl


@_TABLE.add(
    lambda: {
        "a": nn.ModuleList(nn.Linear(10, 12) for _ in range(3)),
        "back": nn.ModuleList(nn.Linear(12, 10) for _ in range(3)),
        "fore": nn.ModuleList(nn.Linear(12, 4) for _ in range(3)),
    },
    (2, 10),
)
def backcasts(m: Any, x: Tensor) -> Tensor:
    total = 0
    for layer, back, fore in zip(m.a, m.back, m.fore, strict=True):
        h = layer(x).relu()
        x, total = x - back(h), total + fore(h)
    return total


@_TABLE.add(lambda: rows_model(12, gate=nn.Linear(12, 12), body=nn.Linear(12, 12)), _ROWS)
def highway(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    gate = m.gate(x).sigmoid()
    return m.head(torch.lerp(x, m.body(x).relu(), gate))


@_TABLE.add(
    lambda: rows_model(12, a=nn.Linear(12, 8), b=nn.Linear(8, 12), c=nn.Linear(12, 8), d=nn.Linear(8, 12)), _ROWS
)
def branches_of_a_condition(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    y = torch.cond(x.sum() > 0, lambda t: m.b(m.a(t).relu()), lambda t: m.d(m.c(t).tanh()), (x,))
    return m.head(x + y)


@_TABLE.add(lambda: rows_model(12, a=nn.Linear(12, 8), b=nn.Linear(8, 12)), _ROWS)
def automatic_precision(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.b(m.a(x).relu())
    with torch.no_grad():
        z = m.b(m.a(x).relu())
    return m.head(x + y.float() + z)


@_TABLE.add(lambda: rows_model(12, mixture=nn.Linear(12, 3 * 5)), _ROWS)
def mixture_density(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits, mean, scale = m.mixture(m.first(x).relu()).split([5, 5, 5], -1)
    return logits.log_softmax(-1), mean, F.softplus(scale)

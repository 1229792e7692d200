"""Recurrent, causal, graph, table and expert structures, most of them written by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn
from zoo_structures import Layers, Table, parameter, words

_TABLE = Table()
subjects = _TABLE.subjects
_ROWS = (2, 6, 10)  # batch, time, features


def _ends(width: int = 12, **more: nn.Module | nn.Parameter | Tensor) -> Layers:
    return {"first": nn.Linear(10, width), "head": nn.Linear(width, 5), **more}


@_TABLE.add(lambda: _ends(12, wx=nn.Linear(12, 32), wh=nn.Linear(8, 32, bias=False), head=nn.Linear(8, 5)), _ROWS)
def lstm_by_hand(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    h = c = x.new_zeros(x.shape[0], 8)
    for t in range(x.shape[1]):
        i, f, g, o = (m.wx(x[:, t]) + m.wh(h)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return m.head(h)


@_TABLE.add(
    lambda: _ends(
        12,
        decay=nn.Linear(12, 8),
        fill=nn.Linear(12, 12),
        z=nn.Linear(32, 8),
        r=nn.Linear(32, 8),
        n=nn.Linear(32, 8),
        head=nn.Linear(8, 5),
    ),
    _ROWS,
    (2, 6, 12),
)
def decaying_gru(m: Any, x: Tensor, seen: Tensor) -> Tensor:
    """GRU-D: state and missing inputs decay with time."""
    x = m.first(x)
    h, last = x.new_zeros(x.shape[0], 8), x[:, 0]
    for t in range(x.shape[1]):
        keep = seen[:, t].sigmoid()
        h = h * torch.exp(-F.relu(m.decay(keep)))
        now = keep * x[:, t] + (1 - keep) * m.fill(last)
        joined = torch.cat([now, h, keep], 1)
        z, r = m.z(joined).sigmoid(), m.r(joined).sigmoid()
        h = (1 - z) * h + z * torch.tanh(m.n(torch.cat([now, r * h, keep], 1)))
        last = now
    return m.head(h)


@_TABLE.add(
    lambda: _ends(12, cell=nn.LSTMCell(12, 8), deeper=nn.GRUCell(8, 6), deepest=nn.RNNCell(6, 7), head=nn.Linear(7, 5)),
    _ROWS,
)
def cells(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    h, c = x.new_zeros(x.shape[0], 8), x.new_zeros(x.shape[0], 8)
    g, r = x.new_zeros(x.shape[0], 6), x.new_zeros(x.shape[0], 7)
    for t in range(x.shape[1]):
        h, c = m.cell(x[:, t], (h, c))
        g = m.deeper(h, g)
        r = m.deepest(g, r)
    return m.head(r)


@_TABLE.add(lambda: _ends(12, rnn=nn.LSTM(12, 16, 2, batch_first=True, proj_size=6), head=nn.Linear(6, 5)), _ROWS)
def projected_lstm(m: Any, x: Tensor) -> Tensor:
    return m.head(m.rnn(m.first(x))[0])


@_TABLE.add(
    lambda: _ends(
        12,
        a=nn.LSTM(12, 6, bidirectional=True, batch_first=True),
        b=nn.GRU(12, 6, bidirectional=True, batch_first=True),
        c=nn.RNN(12, 12, batch_first=True),
    ),
    _ROWS,
)
def residual_recurrent_stack(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    for layer in (m.a, m.b, m.c):
        x = x + layer(x)[0]
    return m.head(x[:, -1])


@_TABLE.add(lambda: _ends(12, w=nn.Linear(12, 36)), _ROWS)
def simple_recurrent_unit(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    z, f, r = m.w(x).split(12, -1)
    f, r = f.sigmoid(), r.sigmoid()
    c, out = torch.zeros_like(z[:, 0]), []
    for t in range(x.shape[1]):
        c = f[:, t] * c + (1 - f[:, t]) * z[:, t]
        out.append(r[:, t] * c.tanh() + (1 - r[:, t]) * x[:, t])
    return m.head(torch.stack(out, 1))


@_TABLE.add(lambda: {"word": nn.Embedding(30, 12), "conv": nn.Conv1d(12, 36, 3), "head": nn.Linear(12, 5)}, words(2, 9))
def quasi_recurrent(m: Any, x: Tensor) -> Tensor:
    z, f, o = m.conv(F.pad(m.word(x).transpose(1, 2), (2, 0))).chunk(3, 1)
    decay = torch.cumsum(F.logsigmoid(f), 2)
    c = torch.cumsum(z.tanh() * (1 - f.sigmoid()) * torch.exp(-decay), 2) * torch.exp(decay)
    return m.head((o.sigmoid() * c).mean(2))


@_TABLE.add(
    lambda: {
        "inp": nn.Conv1d(4, 12, 1),
        "f": nn.ModuleList(nn.Conv1d(12, 12, 2, dilation=2**i) for i in range(3)),
        "g": nn.ModuleList(nn.Conv1d(12, 12, 2, dilation=2**i) for i in range(3)),
        "skip": nn.ModuleList(nn.Conv1d(12, 8, 1) for _ in range(3)),
        "res": nn.ModuleList(nn.Conv1d(12, 12, 1) for _ in range(3)),
        "a": nn.Conv1d(8, 6, 1),
        "b": nn.Conv1d(6, 4, 1),
    },
    (2, 4, 16),
)
def wavenet(m: Any, x: Tensor) -> Tensor:
    x = m.inp(x)
    total = 0
    for index in range(3):
        y = F.pad(x, (2**index, 0))
        y = torch.tanh(m.f[index](y)) * torch.sigmoid(m.g[index](y))
        total = total + m.skip[index](y)
        x = x + m.res[index](y)
    return m.b(m.a(F.relu(total)).relu())


@_TABLE.add(
    lambda: {
        "a": nn.Conv1d(4, 12, 3, padding=2),
        "b": nn.Conv1d(12, 12, 3, padding=4, dilation=2),
        "down": nn.Conv1d(4, 12, 1),
        "head": nn.Linear(12, 5),
    },
    (2, 4, 16),
)
def chomped(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)[:, :, :-2].relu()
    return m.head((m.b(y)[:, :, :-4].relu() + m.down(x)).relu()[:, :, -1])


@_TABLE.add(lambda: _ends(12, conv=nn.Conv1d(12, 12, 4, groups=12), state=torch.zeros(1, 12, 3)), _ROWS)
def convolution_with_state(m: Any, x: Tensor) -> Tensor:
    """A causal convolution over a kept state and the new rows."""
    x = m.first(x).transpose(1, 2)
    joined = torch.cat([m.state.expand(x.shape[0], -1, -1), x], 2)
    return m.head(F.silu(m.conv(joined)[..., -x.shape[2] :]).transpose(1, 2))


@_TABLE.add(
    lambda: _ends(
        12,
        a_real=nn.Parameter(torch.rand(12, 4)),
        a_imag=parameter(12, 4),
        c=parameter(12, 4, 2),
        d=parameter(12),
        out=nn.Linear(12, 24),
    ),
    _ROWS,
)
def diagonal_state_space(m: Any, x: Tensor) -> Tensor:
    """S4D: a long convolution by Fourier transforms over time."""
    u = m.first(x).transpose(1, 2)
    a = torch.complex(-m.a_real, m.a_imag)
    kernel = (
        torch.einsum("hn,hnl->hl", torch.view_as_complex(m.c), torch.exp(a.unsqueeze(-1) * torch.arange(6))).real * 2
    )
    y = torch.fft.irfft(torch.fft.rfft(kernel, n=12) * torch.fft.rfft(u, n=12), n=12)[..., :6]
    y = F.gelu(y + u * m.d.unsqueeze(-1))
    return m.head(F.glu(m.out(y.transpose(1, 2)), -1))


@_TABLE.add(
    lambda: _ends(
        12,
        mu=nn.Parameter(torch.rand(3, 12)),
        r=nn.Linear(12, 12),
        k=nn.Linear(12, 12),
        v=nn.Linear(12, 12),
        w=parameter(12),
        u=parameter(12),
        o=nn.Linear(12, 12),
    ),
    _ROWS,
)
def receptance_mixing(m: Any, x: Tensor) -> Tensor:
    """RWKV: token shift, decaying weighted means."""
    x = m.first(x)
    before = F.pad(x, (0, 0, 1, -1))
    r, k, v = (layer(x * mu + before * (1 - mu)) for layer, mu in zip((m.r, m.k, m.v), m.mu.unbind(0), strict=True))
    num = den = torch.zeros_like(x[:, 0])
    out = []
    for t in range(x.shape[1]):
        e = torch.exp(m.u + k[:, t])
        out.append((num + e * v[:, t]) / (den + e))
        decay = torch.exp(-torch.exp(m.w))
        num, den = decay * num + k[:, t].exp() * v[:, t], decay * den + k[:, t].exp()
    return m.head(x + m.o(r.sigmoid() * torch.stack(out, 1)))


@_TABLE.add(
    lambda: _ends(
        12,
        proj=nn.Linear(12, 24),
        dt=nn.Linear(4, 12),
        x=nn.Linear(12, 4 + 8),
        a=nn.Parameter(torch.rand(12, 4)),
        d=parameter(12),
        conv=nn.Conv1d(12, 12, 3, groups=12, padding=2),
        out=nn.Linear(12, 12),
    ),
    _ROWS,
)
def selective_scan(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    u, z = m.proj(x).chunk(2, -1)
    u = F.silu(m.conv(u.transpose(1, 2))[..., :6].transpose(1, 2))
    dt, b, c = m.x(u).split([4, 4, 4], -1)
    dt = F.softplus(m.dt(dt))
    decay = torch.exp(torch.einsum("bld,dn->bldn", dt, -m.a.exp()))
    step = torch.einsum("bld,bln,bld->bldn", dt, b, u)
    h, out = torch.zeros_like(step[:, 0]), []
    for t in range(6):
        h = decay[:, t] * h + step[:, t]
        out.append(torch.einsum("bdn,bn->bd", h, c[:, t]))
    return m.head(x + m.out((torch.stack(out, 1) + u * m.d) * F.silu(z)))


@_TABLE.add(
    lambda: {
        "word": nn.Embedding(30, 12),
        "a": nn.Conv1d(12, 8, 2),
        "b": nn.Conv1d(12, 6, 3),
        "head": nn.Linear(14, 5),
    },
    words(2, 9),
)
def text_convolutions(m: Any, x: Tensor) -> Tensor:
    x = m.word(x).transpose(1, 2)
    return m.head(torch.cat([conv(x).relu().amax(2) for conv in (m.a, m.b)], 1))


@_TABLE.add(
    lambda: {"bag": nn.EmbeddingBag(30, 12, mode="mean"), "hidden": nn.Linear(12, 8), "head": nn.Linear(8, 5)},
    words(3, 9),
)
def bag_of_words(m: Any, x: Tensor) -> Tensor:
    return m.head(m.hidden(m.bag(x)).relu())


@_TABLE.add(
    lambda: {
        "bottom": nn.Linear(6, 8),
        "tables": nn.ModuleList(nn.Embedding(30, 8) for _ in range(3)),
        "top": nn.Linear(8 + 6, 8),
        "head": nn.Linear(8, 1),
        "rows": torch.tril_indices(4, 4, -1),
    },
    (2, 6),
    words(2, 3),
)
def feature_products(m: Any, dense: Tensor, sparse: Tensor) -> Tensor:
    """DLRM: inner products of all pairs of features."""
    dense = m.bottom(dense).relu()
    features = torch.stack([dense, *(table(sparse[:, i]) for i, table in enumerate(m.tables))], 1)
    products = torch.bmm(features, features.transpose(1, 2))[:, m.rows[0], m.rows[1]]
    return m.head(m.top(torch.cat([dense, products], 1)).relu())


@_TABLE.add(
    lambda: {
        "wide": nn.Linear(6, 1),
        "v": parameter(6, 8),
        "a": nn.Linear(6, 12),
        "b": nn.Linear(12, 8),
        "c": nn.Linear(8, 1),
    },
    (2, 6),
)
def factorisation_machine(m: Any, x: Tensor) -> Tensor:
    pairs = 0.5 * ((x @ m.v).pow(2) - x.pow(2) @ m.v.pow(2)).sum(1, keepdim=True)
    return m.wide(x) + pairs + m.c(m.b(m.a(x).relu()).relu())


@_TABLE.add(
    lambda: {
        "up": parameter(3, 10, 12),
        "up_bias": parameter(3, 12),
        "down": parameter(3, 12, 8),
        "gate": nn.Linear(10, 6),
        "towers": nn.ModuleList(nn.Linear(8, 2) for _ in range(2)),
    },
    (2, 10),
)
def gated_experts_of_tasks(m: Any, x: Tensor) -> list[Tensor]:
    y = torch.einsum("bi,eih->beh", x, m.up) + m.up_bias
    y = torch.einsum("beh,eho->beo", y.relu(), m.down)
    gates = m.gate(x).view(-1, 2, 3).softmax(-1)
    return [tower((gates[:, i].unsqueeze(-1) * y).sum(1)) for i, tower in enumerate(m.towers)]


@_TABLE.add(lambda: _ends(12, route=nn.Linear(12, 4), up=parameter(4, 12, 16), down=parameter(4, 16, 12)), _ROWS)
def experts_by_index(m: Any, x: Tensor) -> Tensor:
    """The weights of each token's expert are looked up."""
    x = m.first(x)
    score, expert = m.route(x).softmax(-1).max(-1)
    y = torch.einsum("bti,btih->bth", x, m.up[expert]).relu()
    return m.head(x + score.unsqueeze(-1) * torch.einsum("bth,btho->bto", y, m.down[expert]))


@_TABLE.add(lambda: _ends(12, route=nn.Linear(12, 4), up=parameter(4, 12, 16), down=parameter(4, 16, 12)), _ROWS)
def experts_by_dispatch(m: Any, x: Tensor) -> Tensor:
    """Every expert sees its tokens, two a token, others as zeros."""
    x = m.first(x)
    score, chosen = m.route(x).softmax(-1).topk(2, -1)
    weights = torch.zeros(x.shape[0], x.shape[1], 4).scatter(-1, chosen, score)
    y = torch.einsum("bte,bti,eih->beth", weights, x, m.up).relu()
    return m.head(x + torch.einsum("beth,eho->bto", y, m.down))


@_TABLE.add(
    lambda: _ends(
        12,
        msg=nn.Linear(12, 8),
        out=nn.Linear(20, 12),
        src=torch.tensor([0, 1, 2, 3, 4, 5]),
        dst=torch.tensor([1, 2, 3, 4, 5, 0]),
    ),
    _ROWS,
)
def messages_along_edges(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    sent = m.msg(x[:, m.src]).relu()
    got = torch.zeros(x.shape[0], 6, sent.shape[-1]).index_add(1, m.dst, sent)
    return m.head(x + m.out(torch.cat([x, got], -1)))


@_TABLE.add(
    lambda: _ends(12, w=nn.Linear(12, 12), left=parameter(3, 4), right=parameter(3, 4)), _ROWS, torch.ones(2, 6, 6)
)
def graph_attention(m: Any, x: Tensor, edges: Tensor) -> Tensor:
    h = m.w(m.first(x)).unflatten(-1, (3, 4))
    score = F.leaky_relu((h * m.left).sum(-1).unsqueeze(2) + (h * m.right).sum(-1).unsqueeze(1))
    weights = score.masked_fill(edges.unsqueeze(-1) == 0, -1e9).softmax(2)
    return m.head(F.elu(torch.einsum("bijh,bjhd->bihd", weights, h).flatten(2)))


@_TABLE.add(
    lambda: {
        "t1": nn.Conv1d(3, 8, 1),
        "t2": nn.Linear(8, 9),
        "a": nn.Conv1d(3, 12, 1),
        "n": nn.BatchNorm1d(12),
        "b": nn.Conv1d(24, 8, 1),
        "head": nn.Linear(8, 5),
    },
    (2, 3, 20),
)
def point_cloud(m: Any, x: Tensor) -> Tensor:
    turn = m.t2(m.t1(x).relu().max(2)[0]).view(-1, 3, 3) + torch.eye(3)
    y = m.n(m.a(torch.bmm(turn, x))).relu()
    y = torch.cat([y, y.amax(2, keepdim=True).expand(-1, -1, 20)], 1)
    return m.head(m.b(y).mean(2))


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


@_TABLE.add(lambda: _ends(12, a=nn.Linear(12, 12), b=nn.Linear(12, 12)), _ROWS)
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


@_TABLE.add(lambda: _ends(12, base=nn.Linear(12, 12), a=parameter(3, 12), b=parameter(12, 3)), _ROWS)
def low_rank_adapter(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    merged = m.base.weight + 0.5 * m.b @ m.a
    return m.head(x + F.linear(x, merged, m.base.bias).relu() + (x @ m.a.T) @ m.b.T)


@_TABLE.add(lambda: _ends(12, a=parameter(3, 4, 5), b=parameter(5, 3, 4)), _ROWS)
def block_diagonal_twice(m: Any, x: Tensor) -> Tensor:
    """Monarch: two block-diagonal products around a transposition."""
    x = m.first(x)
    y = torch.einsum("btki,kij->btjk", x.unflatten(-1, (3, 4)), m.a)
    return m.head(x + torch.einsum("btjk,jkl->btkl", y, m.b).flatten(2).relu())


@_TABLE.add(lambda: _ends(12, a=parameter(3, 4), b=parameter(4, 3)), _ROWS)
def kronecker_weight(m: Any, x: Tensor) -> Tensor:
    return m.head(F.linear(m.first(x), torch.kron(m.a, m.b)).relu())


@_TABLE.add(lambda: _ends(12, skew=parameter(12, 12)), _ROWS)
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
    lambda: {
        "freq": torch.tensor([1.0, 2.0, 4.0]),
        "a": nn.Linear(21, 12),
        "b": nn.Linear(33, 12),
        "sigma": nn.Linear(12, 1),
        "colour": nn.Linear(12, 3),
    },
    (2, 3),
)
def radiance_field(m: Any, x: Tensor) -> Tensor:
    angles = (x.unsqueeze(-1) * m.freq).flatten(1)
    code = torch.cat([x, angles.sin(), angles.cos()], -1)
    h = m.b(torch.cat([m.a(code).relu(), code], -1)).relu()
    return torch.cat([m.colour(torch.sin(30 * h)).sigmoid(), m.sigma(h).relu()], -1)


@_TABLE.add(lambda: _ends(12, patterns=parameter(8, 12)), _ROWS)
def associative_memory(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    return m.head(x + (2.0 * x @ m.patterns.T).softmax(-1) @ m.patterns)


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


@_TABLE.add(lambda: _ends(12, select=nn.Linear(12, 12), big=nn.Linear(12, 24), norm=nn.BatchNorm1d(12)), (4, 10))
def sparse_selection(m: Any, x: Tensor) -> Tensor:
    """TabNet: sparsemax, which sorts features, times a gated unit."""
    x = m.norm(m.first(x))
    z = m.select(x)
    ordered = z.sort(-1, descending=True)[0]
    sums = ordered.cumsum(-1) - 1
    k = torch.arange(1, 13)
    support = (k * ordered > sums).sum(-1, keepdim=True)
    mask = F.relu(z - sums.gather(-1, support - 1) / support)
    return m.head(F.glu(m.big(mask * x), -1))


@_TABLE.add(lambda: _ends(12, patch=nn.Linear(4, 12), out=nn.Linear(48, 5)), (2, 3, 10))
def patches_of_series(m: Any, x: Tensor) -> Tensor:
    y = m.patch(x.unfold(-1, 4, 2))  # (batch, series, 4 patches, 12)
    return m.out(F.gelu(y).flatten(2))


@_TABLE.add(lambda: _ends(12, trend=nn.Linear(6, 4), season=nn.Linear(6, 4)), _ROWS)
def decomposed_series(m: Any, x: Tensor) -> Tensor:
    x = m.first(x).transpose(1, 2)
    trend = F.avg_pool1d(F.pad(x, (1, 1), mode="replicate"), 3, 1)
    return m.head((m.trend(trend) + m.season(x - trend)).transpose(1, 2))


@_TABLE.add(lambda: _ends(12, gate=nn.Linear(12, 12), body=nn.Linear(12, 12)), _ROWS)
def highway(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    gate = m.gate(x).sigmoid()
    return m.head(torch.lerp(x, m.body(x).relu(), gate))


@_TABLE.add(
    lambda: _ends(12, u=nn.Linear(12, 24), mix=nn.Conv1d(6, 6, 1), norm=nn.LayerNorm(12), v=nn.Linear(12, 12)), _ROWS
)
def spatial_gating(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    u, v = F.gelu(m.u(x)).chunk(2, -1)
    return m.head(x + m.v(u * (m.mix(m.norm(v)) + 1)))


@_TABLE.add(lambda: _ends(12, a=nn.Linear(12, 8), b=nn.Linear(8, 12), c=nn.Linear(12, 8), d=nn.Linear(8, 12)), _ROWS)
def branches_of_a_condition(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    y = torch.cond(x.sum() > 0, lambda t: m.b(m.a(t).relu()), lambda t: m.d(m.c(t).tanh()), (x,))
    return m.head(x + y)


@_TABLE.add(lambda: _ends(12, a=nn.Linear(12, 8), b=nn.Linear(8, 12)), _ROWS)
def automatic_precision(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.b(m.a(x).relu())
    with torch.no_grad():
        z = m.b(m.a(x).relu())
    return m.head(x + y.float() + z)


@_TABLE.add(lambda: _ends(12, mixture=nn.Linear(12, 3 * 5)), _ROWS)
def mixture_density(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits, mean, scale = m.mixture(m.first(x).relu()).split([5, 5, 5], -1)
    return logits.log_softmax(-1), mean, F.softplus(scale)


@_TABLE.add(lambda: _ends(12, pick=torch.tensor([3, 1, 0, 2, 5, 4, 7, 6, 9, 8, 11, 10]), out=nn.Linear(12, 12)), _ROWS)
def permuted_features(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    return m.head(x + m.out(x[..., m.pick]).relu())


@_TABLE.add(lambda: _ends(12, a=nn.Linear(12, 8), out=nn.Linear(11, 12)), _ROWS)
def one_feature_apart(m: Any, x: Tensor) -> Tensor:
    """One hidden unit is a confidence, the rest are features."""
    x = m.first(x)
    confidence, rest = x[..., :1].sigmoid(), x[..., 1:]
    return m.head(m.out(rest) * confidence + x[..., 0].tanh().unsqueeze(-1))

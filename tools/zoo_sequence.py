"""Structures that run along time: recurrent, causal and state space, most of them written by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn
from zoo_structures import Table, parameter, rows_model, words

_TABLE = Table()
subjects = _TABLE.subjects
_ROWS = (2, 6, 10)  # batch, time, features


@_TABLE.add(lambda: rows_model(12, wx=nn.Linear(12, 32), wh=nn.Linear(8, 32, bias=False), head=nn.Linear(8, 5)), _ROWS)
def lstm_by_hand(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    h = c = x.new_zeros(x.shape[0], 8)
    for t in range(x.shape[1]):
        i, f, g, o = (m.wx(x[:, t]) + m.wh(h)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return m.head(h)


@_TABLE.add(
    lambda: rows_model(
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
    lambda: rows_model(
        12, cell=nn.LSTMCell(12, 8), deeper=nn.GRUCell(8, 6), deepest=nn.RNNCell(6, 7), head=nn.Linear(7, 5)
    ),
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


@_TABLE.add(lambda: rows_model(12, rnn=nn.LSTM(12, 16, 2, batch_first=True, proj_size=6), head=nn.Linear(6, 5)), _ROWS)
def projected_lstm(m: Any, x: Tensor) -> Tensor:
    return m.head(m.rnn(m.first(x))[0])


@_TABLE.add(
    lambda: rows_model(
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


@_TABLE.add(lambda: rows_model(12, w=nn.Linear(12, 36)), _ROWS)
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


@_TABLE.add(lambda: rows_model(12, conv=nn.Conv1d(12, 12, 4, groups=12), state=torch.zeros(1, 12, 3)), _ROWS)
def convolution_with_state(m: Any, x: Tensor) -> Tensor:
    """A causal convolution over a kept state and the new rows."""
    x = m.first(x).transpose(1, 2)
    joined = torch.cat([m.state.expand(x.shape[0], -1, -1), x], 2)
    return m.head(F.silu(m.conv(joined)[..., -x.shape[2] :]).transpose(1, 2))


@_TABLE.add(
    lambda: rows_model(
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
    lambda: rows_model(
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
    lambda: rows_model(
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
    lambda: rows_model(12, u=nn.Linear(12, 24), mix=nn.Conv1d(6, 6, 1), norm=nn.LayerNorm(12), v=nn.Linear(12, 12)),
    _ROWS,
)
def spatial_gating(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    u, v = F.gelu(m.u(x)).chunk(2, -1)
    return m.head(x + m.v(u * (m.mix(m.norm(v)) + 1)))


@_TABLE.add(lambda: rows_model(12, patch=nn.Linear(4, 12), out=nn.Linear(48, 5)), (2, 3, 10))
def patches_of_series(m: Any, x: Tensor) -> Tensor:
    y = m.patch(x.unfold(-1, 4, 2))  # (batch, series, 4 patches, 12)
    return m.out(F.gelu(y).flatten(2))


@_TABLE.add(lambda: rows_model(12, trend=nn.Linear(6, 4), season=nn.Linear(6, 4)), _ROWS)
def decomposed_series(m: Any, x: Tensor) -> Tensor:
    x = m.first(x).transpose(1, 2)
    trend = F.avg_pool1d(F.pad(x, (1, 1), mode="replicate"), 3, 1)
    return m.head((m.trend(trend) + m.season(x - trend)).transpose(1, 2))

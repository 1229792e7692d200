"""Features that meet: tables, experts, graphs, points, lookups and selections."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn
from zoo_structures import Table, parameter, rows_model, words

_TABLE = Table()
subjects = _TABLE.subjects
_ROWS = (2, 6, 10)  # batch, time, features


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


@_TABLE.add(lambda: rows_model(12, route=nn.Linear(12, 4), up=parameter(4, 12, 16), down=parameter(4, 16, 12)), _ROWS)
def experts_by_index(m: Any, x: Tensor) -> Tensor:
    """The weights of each token's expert are looked up."""
    x = m.first(x)
    score, expert = m.route(x).softmax(-1).max(-1)
    y = torch.einsum("bti,btih->bth", x, m.up[expert]).relu()
    return m.head(x + score.unsqueeze(-1) * torch.einsum("bth,btho->bto", y, m.down[expert]))


@_TABLE.add(lambda: rows_model(12, route=nn.Linear(12, 4), up=parameter(4, 12, 16), down=parameter(4, 16, 12)), _ROWS)
def experts_by_dispatch(m: Any, x: Tensor) -> Tensor:
    """Every expert sees its tokens, two a token, others as zeros."""
    x = m.first(x)
    score, chosen = m.route(x).softmax(-1).topk(2, -1)
    weights = torch.zeros(x.shape[0], x.shape[1], 4).scatter(-1, chosen, score)
    y = torch.einsum("bte,bti,eih->beth", weights, x, m.up).relu()
    return m.head(x + torch.einsum("beth,eho->bto", y, m.down))


@_TABLE.add(
    lambda: rows_model(
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
    lambda: rows_model(12, w=nn.Linear(12, 12), left=parameter(3, 4), right=parameter(3, 4)), _ROWS, torch.ones(2, 6, 6)
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


@_TABLE.add(lambda: rows_model(12, patterns=parameter(8, 12)), _ROWS)
def associative_memory(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    return m.head(x + (2.0 * x @ m.patterns.T).softmax(-1) @ m.patterns)


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


@_TABLE.add(lambda: rows_model(12, select=nn.Linear(12, 12), big=nn.Linear(12, 24), norm=nn.BatchNorm1d(12)), (4, 10))
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


@_TABLE.add(
    lambda: rows_model(12, pick=torch.tensor([3, 1, 0, 2, 5, 4, 7, 6, 9, 8, 11, 10]), out=nn.Linear(12, 12)), _ROWS
)
def permuted_features(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    return m.head(x + m.out(x[..., m.pick]).relu())


@_TABLE.add(lambda: rows_model(12, a=nn.Linear(12, 8), out=nn.Linear(11, 12)), _ROWS)
def one_feature_apart(m: Any, x: Tensor) -> Tensor:
    """One hidden unit is a confidence, the rest are features."""
    x = m.first(x)
    confidence, rest = x[..., :1].sigmoid(), x[..., 1:]
    return m.head(m.out(rest) * confidence + x[..., 0].tanh().unsqueeze(-1))

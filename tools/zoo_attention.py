"""Attention in the ways people write it by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn
from zoo_structures import Layers, Table, parameter, words

_TABLE = Table()
subjects = _TABLE.subjects
_TOKENS = (2, 10, 12)


def _qkv(heads: int = 3, width: int = 4) -> Layers:
    inner = heads * width
    names = ("q", "k", "v")
    return {name: nn.Linear(12, inner) for name in names} | {"out": nn.Linear(inner, 12), "head": nn.Linear(12, 5)}


def _heads(x: Tensor, heads: int = 3) -> Tensor:
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


@_TABLE.add(_qkv, _TOKENS)
def softmax_by_hand(m: Any, x: Tensor) -> Tensor:
    q, k, v = _heads(m.q(x)), _heads(m.k(x)), _heads(m.v(x))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return m.head(x + m.out(_merged((weights / weights.sum(-1, keepdim=True)) @ v)))


@_TABLE.add(_qkv, _TOKENS)
def einsum_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = (layer(x).unflatten(-1, (3, 4)) for layer in (m.q, m.k, m.v))
    weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
    return m.head(x + m.out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)))


@_TABLE.add(lambda: {"qkv": nn.Linear(12, 36), "out": nn.Linear(12, 12), "head": nn.Linear(12, 5)}, _TOKENS)
def fused_unbind(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).reshape(x.shape[0], x.shape[1], 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return m.head(x + m.out(_merged(F.scaled_dot_product_attention(q, k, v))))


@_TABLE.add(lambda: {"qkv": nn.Linear(12, 36), "out": nn.Linear(12, 12), "head": nn.Linear(12, 5)}, _TOKENS)
def fused_select_last(m: Any, x: Tensor) -> Tensor:
    """Query, key and value vary fastest: (heads, head_dim, 3)."""
    qkv = m.qkv(x).reshape(x.shape[0], x.shape[1], 3, 4, 3)
    q, k, v = (qkv[..., index].transpose(1, 2) for index in range(3))
    return m.head(x + m.out(_merged(F.scaled_dot_product_attention(q, k, v))))


@_TABLE.add(
    lambda: {
        "rows": nn.Linear(12, 36),
        "columns": nn.Linear(12, 36),
        "out": nn.Linear(12, 12),
        "head": nn.Linear(12, 5),
    },
    (2, 6, 5, 12),
)
def axial(m: Any, x: Tensor) -> Tensor:
    for layer, swap in ((m.rows, False), (m.columns, True)):
        y = x.transpose(1, 2) if swap else x
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(2, 3) for t in layer(y).chunk(3, -1))
        y = m.out((q @ k.transpose(-1, -2)).softmax(-1).matmul(v).transpose(2, 3).flatten(3))
        x = x + (y.transpose(1, 2) if swap else y)
    return m.head(x.mean((1, 2)))


@_TABLE.add(lambda: {**_qkv(), "latents": parameter(4, 12), "norm": nn.LayerNorm(12)}, _TOKENS)
def perceiver(m: Any, x: Tensor) -> Tensor:
    latents = m.latents.expand(x.shape[0], -1, -1)
    for _ in range(2):
        q, k, v = _heads(m.q(m.norm(latents))), _heads(m.k(x)), _heads(m.v(x))
        latents = latents + m.out(_merged(F.scaled_dot_product_attention(q, k, v)))
    return m.head(latents.mean(1))


@_TABLE.add(_qkv, _TOKENS)
def linear_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = F.elu(_heads(m.q(x))) + 1, F.elu(_heads(m.k(x))) + 1, _heads(m.v(x))
    sums = torch.einsum("bhnd,bhd->bhn", q, k.sum(2))
    y = torch.einsum("bhnd,bhde->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v))
    return m.head(x + m.out(_merged(y / sums.unsqueeze(-1))))


@_TABLE.add(lambda: {**_qkv(), "features": torch.randn(4, 6)}, _TOKENS)
def random_features(m: Any, x: Tensor) -> Tensor:
    """Performer: positive features from a fixed projection of each head."""
    q, k = ((_heads(t) @ m.features).exp() for t in (m.q(x), m.k(x)))
    v = _heads(m.v(x))
    y = q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(2).unsqueeze(-1))
    return m.head(x + m.out(_merged(y)))


@_TABLE.add(lambda: {**_qkv(), "shorten": nn.Linear(10, 6)}, _TOKENS)
def linformer(m: Any, x: Tensor) -> Tensor:
    k, v = (_heads(m.shorten(layer(x).transpose(1, 2)).transpose(1, 2)) for layer in (m.k, m.v))
    return m.head(x + m.out(_merged(F.scaled_dot_product_attention(_heads(m.q(x)), k, v))))


@_TABLE.add(lambda: {**_qkv(), "angles": torch.rand(10, 2)}, _TOKENS)
def complex_rotary(m: Any, x: Tensor) -> Tensor:
    turn = torch.polar(torch.ones_like(m.angles), m.angles)

    def turned(t: Tensor) -> Tensor:
        pairs = torch.view_as_complex(_heads(t).unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    return m.head(x + m.out(_merged(F.scaled_dot_product_attention(turned(m.q(x)), turned(m.k(x)), _heads(m.v(x))))))


@_TABLE.add(lambda: {**_qkv(), "cos": torch.rand(10, 2), "sin": torch.rand(10, 2)}, _TOKENS)
def interleaved_rotary(m: Any, x: Tensor) -> Tensor:
    def turned(t: Tensor) -> Tensor:
        even, odd = t[..., ::2], t[..., 1::2]
        return torch.stack([even * m.cos - odd * m.sin, even * m.sin + odd * m.cos], -1).flatten(-2)

    q, k = turned(_heads(m.q(x))), turned(_heads(m.k(x)))
    return m.head(x + m.out(_merged(F.scaled_dot_product_attention(q, k, _heads(m.v(x))))))


@_TABLE.add(lambda: {**_qkv(), "slopes": torch.tensor([0.5, 0.25, 0.125])}, _TOKENS)
def linear_biases(m: Any, x: Tensor) -> Tensor:
    """ALiBi: a slope for each head times the distance."""
    places = torch.arange(x.shape[1])
    bias = m.slopes[:, None, None] * (places[None, :] - places[:, None])
    q, k, v = _heads(m.q(x)), _heads(m.k(x)), _heads(m.v(x))
    return m.head(x + m.out(_merged(F.scaled_dot_product_attention(q, k, v, attn_mask=bias))))


@_TABLE.add(
    lambda: {"q": nn.Linear(12, 12), "kv": nn.Linear(12, 8), "out": nn.Linear(12, 12), "head": nn.Linear(12, 5)},
    _TOKENS,
)
def multi_query(m: Any, x: Tensor) -> Tensor:
    k, v = m.kv(x).unsqueeze(1).chunk(2, -1)
    y = F.scaled_dot_product_attention(_heads(m.q(x)), k.expand(-1, 3, -1, -1), v.expand(-1, 3, -1, -1))
    return m.head(x + m.out(_merged(y)))


@_TABLE.add(lambda: {**_qkv(), "before": parameter(3, 3), "after": parameter(3, 3)}, _TOKENS)
def talking_heads(m: Any, x: Tensor) -> Tensor:
    q, k, v = _heads(m.q(x)), _heads(m.k(x)), _heads(m.v(x))
    scores = torch.einsum("bhij,hg->bgij", q @ k.mT, m.before).softmax(-1)
    return m.head(x + m.out(_merged(torch.einsum("bhij,hg->bgij", scores, m.after) @ v)))


@_TABLE.add(lambda: {**_qkv(), "table": parameter(19, 3)}, _TOKENS)
def relative_table(m: Any, x: Tensor) -> Tensor:
    """A table of biases by distance, one column a head (Swin)."""
    places = torch.arange(10)
    index = places[:, None] - places[None, :] + 9
    bias = m.table[index.view(-1)].view(10, 10, -1).permute(2, 0, 1)
    q, k, v = _heads(m.q(x)), _heads(m.k(x)), _heads(m.v(x))
    return m.head(x + m.out(_merged((q @ k.mT + bias).softmax(-1) @ v)))


@_TABLE.add(lambda: {**_qkv(), "keys": parameter(3, 2, 4), "values": parameter(3, 2, 4)}, _TOKENS)
def memory_slots(m: Any, x: Tensor) -> Tensor:
    """Learned keys and values beside the computed ones."""
    batch = x.shape[0]
    k = torch.cat([m.keys.expand(batch, -1, -1, -1), _heads(m.k(x))], 2)
    v = torch.cat([m.values.expand(batch, -1, -1, -1), _heads(m.v(x))], 2)
    return m.head(x + m.out(_merged(F.scaled_dot_product_attention(_heads(m.q(x)), k, v))))


@_TABLE.add(lambda: {**_qkv(), "logit_scale": nn.Parameter(torch.rand(3, 1, 1))}, _TOKENS)
def cosine_attention(m: Any, x: Tensor) -> Tensor:
    q, k = (F.normalize(_heads(layer(x)), dim=-1) for layer in (m.q, m.k))
    scores = q @ k.transpose(-2, -1) * m.logit_scale.clamp(max=4.6).exp()
    return m.head(x + m.out(_merged(scores.softmax(-1) @ _heads(m.v(x)))))


@_TABLE.add(
    lambda: {
        "up": nn.Linear(12, 56),
        "gain": parameter(2, 8),
        "shift": parameter(2, 8),
        "out": nn.Linear(24, 12),
        "head": nn.Linear(12, 5),
    },
    _TOKENS,
)
def gated_unit(m: Any, x: Tensor) -> Tensor:
    """Gated attention unit: query and key are two scalings of one projection."""
    u, v, base = F.silu(m.up(x)).split([24, 24, 8], -1)
    q, k = (base.unsqueeze(-2) * m.gain + m.shift).unbind(-2)
    return m.head(x + m.out(u * (F.relu(q @ k.mT).square() @ v)))


@_TABLE.add(lambda: {**_qkv(), "bias": parameter(10, 10)}, _TOKENS)
def attention_free(m: Any, x: Tensor) -> Tensor:
    k, v = m.k(x).exp(), m.v(x)
    weights = m.bias.exp()
    return m.head(x + m.out(m.q(x).sigmoid() * (weights @ (k * v)) / (weights @ k)))


@_TABLE.add(lambda: {**_qkv(), "temperature": nn.Parameter(torch.ones(3, 1, 1))}, _TOKENS)
def cross_covariance(m: Any, x: Tensor) -> Tensor:
    """Attention of channels to channels (XCiT)."""
    q, k, v = (_heads(layer(x)).transpose(-1, -2) for layer in (m.q, m.k, m.v))
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2) * m.temperature
    return m.head(x + m.out((scores.softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2)))


@_TABLE.add(
    lambda: {"cross": nn.MultiheadAttention(12, 3, kdim=7, vdim=9, batch_first=True), "head": nn.Linear(12, 5)},
    _TOKENS, (2, 6, 7), (2, 6, 9),
)  # fmt: skip
def torch_cross_attention(m: Any, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return m.head(x + m.cross(x, keys, values)[0])


@_TABLE.add(_qkv, _TOKENS)
def sliding_window(m: Any, x: Tensor) -> Tensor:
    """Each token sees itself and one neighbour on each side."""
    q = _heads(m.q(x))
    k, v = (F.pad(_heads(layer(x)), (0, 0, 1, 1)).unfold(2, 3, 1) for layer in (m.k, m.v))
    weights = torch.einsum("bhnd,bhndw->bhnw", q, k).softmax(-1)
    return m.head(x + m.out(_merged(torch.einsum("bhnw,bhndw->bhnd", weights, v))))


@_TABLE.add(lambda: {**_qkv(), "gain": parameter(4)}, _TOKENS)
def normalised_queries(m: Any, x: Tensor) -> Tensor:
    """An RMS norm by hand over each head."""

    def norm(t: Tensor) -> Tensor:
        return t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + m.gain)

    q, k = norm(_heads(m.q(x))), norm(_heads(m.k(x)))
    return m.head(x + m.out(_merged(F.scaled_dot_product_attention(q, k, _heads(m.v(x)), is_causal=True))))


@_TABLE.add(
    lambda: {
        "q": nn.Linear(12, 24),
        "k": nn.Linear(12, 24),
        "v": nn.Linear(12, 12),
        "lam": parameter(3, 1, 1),
        "out": nn.Linear(12, 12),
        "head": nn.Linear(12, 5),
    },
    _TOKENS,
)
def differential(m: Any, x: Tensor) -> Tensor:
    """The difference of two attention maps."""
    q1, q2 = _heads(m.q(x)).chunk(2, -1)
    k1, k2 = _heads(m.k(x)).chunk(2, -1)
    weights = (q1 @ k1.mT).softmax(-1) - m.lam.exp() * (q2 @ k2.mT).softmax(-1)
    return m.head(x + m.out(_merged(weights @ _heads(m.v(x)))))


@_TABLE.add(
    lambda: {
        "down": nn.Linear(12, 10), "norm": nn.RMSNorm(8), "up": nn.Linear(8, 24), "q": nn.Linear(12, 18),
        "cos": torch.rand(10, 1), "sin": torch.rand(10, 1), "out": nn.Linear(12, 12), "head": nn.Linear(12, 5),
    },
    _TOKENS,
)  # fmt: skip
def latent_attention(m: Any, x: Tensor) -> Tensor:
    """Keys and values from a small latent, one turned key part shared by all heads (DeepSeek)."""

    def turned(t: Tensor) -> Tensor:
        a, b = t.chunk(2, -1)
        return torch.cat([a * m.cos - b * m.sin, b * m.cos + a * m.sin], -1)

    q, q_turn = _heads(m.q(x)).split([4, 2], -1)
    latent, k_turn = m.down(x).split([8, 2], -1)
    k, v = _heads(m.up(m.norm(latent))).split([4, 4], -1)
    k_turn = turned(k_turn).unsqueeze(1).expand(-1, 3, -1, -1)
    y = F.scaled_dot_product_attention(torch.cat([q, turned(q_turn)], -1), torch.cat([k, k_turn], -1), v)
    return m.head(x + m.out(_merged(y)))


@_TABLE.add(
    lambda: {**_qkv(), "cls": parameter(1, 1, 12), "places": parameter(1, 11, 12), "norm": nn.LayerNorm(12)}, _TOKENS
)
def class_token(m: Any, x: Tensor) -> Tensor:
    x = torch.cat([m.cls.expand(x.shape[0], -1, -1), x], 1) + m.places
    y = m.norm(x)
    y = F.scaled_dot_product_attention(_heads(m.q(y)), _heads(m.k(y)), _heads(m.v(y)))
    return m.head((x + m.out(_merged(y)))[:, 0])


@_TABLE.add(
    lambda: {
        **_qkv(),
        "r": nn.Linear(12, 12),
        "u": parameter(3, 4),
        "w": parameter(3, 4),
        "places": torch.rand(10, 12),
    },
    _TOKENS,
)
def relative_shift(m: Any, x: Tensor) -> Tensor:
    """Transformer-XL: scores by distance brought into place by padding and reshaping."""
    q, k, v = (layer(x).unflatten(-1, (3, 4)) for layer in (m.q, m.k, m.v))
    r = m.r(m.places).unflatten(-1, (3, 4))
    content = torch.einsum("bihd,bjhd->bhij", q + m.u, k)
    b, h, n, _ = content.shape
    place = F.pad(torch.einsum("bihd,jhd->bhij", q + m.w, r), (1, 0)).view(b, h, n + 1, n)[:, :, 1:].reshape(b, h, n, n)
    y = torch.einsum("bhij,bjhd->bihd", (content + place).softmax(-1), v)
    return m.head(x + m.out(y.flatten(2)))


@_TABLE.add(_qkv, _TOKENS)
def landmarks(m: Any, x: Tensor) -> Tensor:
    """Nystroem: queries and keys averaged over segments."""
    q, k, v = _heads(m.q(x)), _heads(m.k(x)), _heads(m.v(x))
    few_q, few_k = (t.unflatten(2, (5, 2)).mean(3) for t in (q, k))
    left, right = (q @ few_k.mT).softmax(-1), (few_q @ k.mT).softmax(-1)
    return m.head(x + m.out(_merged(left @ (right @ v))))


@_TABLE.add(
    lambda: {
        "word": nn.Embedding(30, 12),
        "state": nn.Linear(12, 8),
        "key": nn.Linear(12, 8),
        "score": nn.Linear(8, 1),
        "head": nn.Linear(24, 5),
    },
    words(2, 7),
)
def additive(m: Any, x: Tensor) -> Tensor:
    """Bahdanau's scores."""
    x = m.word(x)
    last = x[:, -1]
    weights = m.score(torch.tanh(m.state(last).unsqueeze(1) + m.key(x))).softmax(1)
    return m.head(torch.cat([(weights * x).sum(1), last], -1))


@_TABLE.add(
    lambda: {**_qkv(), "up": nn.Linear(12, 24), "down": nn.Linear(24, 12), "a": parameter(12), "b": parameter(12)},
    _TOKENS,
)
def parallel_block_with_scales(m: Any, x: Tensor) -> Tensor:
    y = F.layer_norm(x, (12,))
    z = F.scaled_dot_product_attention(_heads(m.q(y)), _heads(m.k(y)), _heads(m.v(y)), is_causal=True)
    return m.head(x + m.a * m.out(_merged(z)) + m.b * m.down(F.gelu(m.up(y))))


@_TABLE.add(_qkv, (2, 4, 6, 12))
def windows(m: Any, x: Tensor) -> Tensor:
    """Windows of 2 x 3 cut, shifted and put together again."""
    b, h, w, c = x.shape
    y = torch.roll(x, (-1, -1), (1, 2)).view(b, h // 2, 2, w // 3, 3, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 6, c)
    y = m.out(_merged(F.scaled_dot_product_attention(_heads(m.q(y)), _heads(m.k(y)), _heads(m.v(y)))))
    y = y.view(b, h // 2, w // 3, 2, 3, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
    return m.head((x + torch.roll(y, (1, 1), (1, 2))).mean((1, 2)))


@_TABLE.add(_qkv, _TOKENS)
def causal_mask_by_hand(m: Any, x: Tensor) -> Tensor:
    q, k, v = _heads(m.q(x)), _heads(m.k(x)), _heads(m.v(x))
    mask = torch.ones(10, 10, dtype=torch.bool).triu(1)
    return m.head(x + m.out(_merged((q @ k.mT).masked_fill(mask, float("-inf")).softmax(-1) @ v)))


@_TABLE.add(lambda: {**_qkv(), "decay": torch.tensor([0.9, 0.8, 0.7]), "norm": nn.GroupNorm(3, 12)}, _TOKENS)
def retention(m: Any, x: Tensor) -> Tensor:
    places = torch.arange(10)
    distance = (places[:, None] - places[None, :]).double().to(x.dtype)
    weights = torch.where(distance >= 0, m.decay[:, None, None] ** distance.clamp(min=0), 0.0)
    y = _merged((_heads(m.q(x)) @ _heads(m.k(x)).mT * weights) @ _heads(m.v(x)))
    return m.head(x + m.out(m.norm(y.flatten(0, 1)).view_as(y)))


@_TABLE.add(_qkv, _TOKENS)
def heads_in_batch(m: Any, x: Tensor) -> Tensor:
    """Heads merged into the batch, products by bmm and baddbmm (fairseq)."""
    b, n, _ = x.shape
    q, k, v = (t.transpose(0, 1).reshape(n, b * 3, 4).transpose(0, 1) for t in (m.q(x), m.k(x), m.v(x)))
    scores = torch.baddbmm(torch.zeros(1, n, n), q, k.transpose(1, 2), beta=0.0, alpha=0.5).softmax(-1)
    y = torch.bmm(scores, v).transpose(0, 1).reshape(n, b, 12).transpose(0, 1)
    return m.head(x + m.out(y))

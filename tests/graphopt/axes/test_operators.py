"""Operators one by one between two weights: what is free is as said, and its removal is proved."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from graphopt.axes.infer import Axes, infer
from graphopt.axes.proof.masked import check_masked_equivalence
from graphopt.axes.rewrite import remove, slices
from graphopt.capturing.normal_form import normalise
from graphopt.ir.torch_internals import FakeTensorMode

_EXACT = 1e-10  # float64 rounding of a few dozen sums


def exported(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    gm = torch.export.export(model.double().eval(), inputs, strict=False).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    return normalise(gm)


def prove(gm: fx.GraphModule, axes: Axes, *inputs: Tensor) -> float:
    """Take half of the indices of every group and prove the rest right."""
    draw = random.Random(0)
    kept = {g.axis: sorted(draw.sample(range(g.size), (g.size + 1) // 2)) for g in axes.groups()}
    return check_masked_equivalence(gm, remove(gm, axes, kept), slices(axes, kept), inputs)


class Between(nn.Module):
    """A function of what a linear layer of 8 features gives, and a last layer of as many as are left."""

    def __init__(self, function: Callable[[Between, Tensor], Tensor], left: int, **layers: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(left, 3)
        self.weight = nn.Parameter(torch.randn(8, 6))
        self.small = nn.Parameter(torch.randn(2, 3))
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self, self.first(x)))


ROWS = torch.randn(2, 4, 5, dtype=torch.float64)  # batch, time, features

# Name: function of (model, (2, 4, 8)), features left, sizes of the groups in order.
CASES: dict[str, tuple[Callable[..., Tensor], int, list[int]]] = {
    "one position taken out": (lambda m, x: x[..., 1:] * x[..., 0].sigmoid().unsqueeze(-1), 7, [7]),
    "a position in the middle": (
        lambda m, x: torch.cat([x[..., :3], x[..., 4:]], -1) + x.select(-1, 3)[..., None],
        7,
        [3, 4],
    ),
    "cumulative sum": (lambda m, x: x.cumsum(-1).tanh(), 8, [8]),
    "transform over time": (lambda m, x: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=4, dim=1), 8, [8]),
    "polar": (lambda m, x: torch.polar(x.abs(), x).real, 8, [8]),
    "reversed subtraction": (lambda m, x: torch.rsub(x, 1), 8, [8]),
    "differences over time": (lambda m, x: x.diff(dim=1), 8, [8]),
    "inverse of each": (lambda m, x: torch.linalg.inv(x.view(2, 4, 2, 4)[..., :2, :2]).flatten(2), 4, []),
    "side by side": (lambda m, x: torch.hstack([x.flatten(0, 1), x.flatten(0, 1)]), 16, [8]),
    "in columns": (lambda m, x: torch.column_stack([x[0], x[1]]), 16, [8]),
    "taken apart in height": (lambda m, x: torch.hsplit(x.flatten(0, 1), 2)[0], 4, [4]),
    "block diagonal weight": (lambda m, x: x @ torch.block_diag(m.weight[:3], m.weight[3:]).tanh(), 12, [3, 5, 6]),
    "Kronecker weight": (lambda m, x: x[..., :4] @ torch.kron(m.small, m.small), 9, [2, 3]),
    "inner product": (lambda m, x: torch.inner(x, m.weight.T), 6, [8, 6]),
    "dot products of rows": (lambda m, x: torch.linalg.vecdot(x, x.tanh())[..., None].expand(-1, -1, 3), 3, [8]),
    "loss of each": (lambda m, x: F.smooth_l1_loss(x, x.tanh(), reduction="none"), 8, [8]),
    "loss of all": (lambda m, x: F.mse_loss(x, x.tanh()) * x, 8, [8]),
    "masked mean by hand": (
        lambda m, x: x - (x * torch.ones(2, 4, 1).expand_as(x)).sum(-1, True) / torch.ones(1).expand(8).sum(-1),
        8,
        [8],
    ),
    "weights that start as zeros": (lambda m, x: x * torch.zeros(2, 4, 8, dtype=x.dtype).softmax(-1), 8, [8]),
    "expanded like another": (lambda m, x: x[..., :1].expand_as(x) + x, 8, [7]),
    "reshaped like another": (lambda m, x: x.reshape(8, 8).view_as(x) + x, 8, [8]),
    "summed to a size": (lambda m, x: x.sum_to_size(1, 1, 8), 8, [8]),
    "mean of a whole dimension": (lambda m, x: x * F.adaptive_avg_pool1d(x, 1).sigmoid(), 8, [8]),
    "written over a slice": (lambda m, x: torch.slice_scatter(x, x[..., 2:5].tanh(), -1, 2, 5), 8, [2, 3, 3]),
    "written position by position": (lambda m, x: written(x), 8, [8]),
    "transposed": (lambda m, x: (x @ x.mT).mT.softmax(-1) @ x, 8, [8]),
}  # fmt: skip


def written(x: Tensor) -> Tensor:
    """Fill the rows of a tensor one after the other, as a recurrent loop does."""
    out = torch.zeros_like(x)
    state = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        state = torch.tanh(state + x[:, t])
        out[:, t] = state
    return out


@pytest.mark.parametrize("name", CASES)
def test_groups_of_what_is_between(name: str) -> None:
    function, left, sizes = CASES[name]
    gm = exported(Between(function, left), ROWS)
    axes = infer(gm)
    assert not axes.unknown
    assert [group.size for group in axes.groups()] == sizes
    assert prove(gm, axes, ROWS) < _EXACT


LAYERS: dict[str, tuple[Callable[..., Tensor], dict[str, nn.Module], int, list[int]]] = {
    "projected": (lambda m, x: m.rnn(x)[0], {"rnn": nn.LSTM(8, 12, 2, batch_first=True, proj_size=6)}, 6, [8, 6]),
    "both ways": (lambda m, x: m.rnn(x)[0], {"rnn": nn.GRU(8, 6, bidirectional=True, batch_first=True)}, 12, [8, 6]),
    "one step": (lambda m, x: m.cell(x[:, 0])[0], {"cell": nn.LSTMCell(8, 6)}, 6, [8, 6]),
    "one gated step": (lambda m, x: m.cell(x[:, 1], m.cell(x[:, 0])), {"cell": nn.GRUCell(8, 6)}, 6, [8, 6]),
}


aten = torch.ops.aten
STATISTICS = (torch.rand(8), torch.rand(8), torch.rand(8), torch.rand(8) + 0.5)
# Name: operator, arguments after weight, bias, mean and variance. What they return beside the result is of shape (0,).
NORMS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "core ATen": (aten._native_batch_norm_legit_no_training.default, (0.1, 1e-5)),
    "functional": (aten._native_batch_norm_legit_functional.default, (False, 0.1, 1e-5)),
    "legit": (aten._native_batch_norm_legit.default, (False, 0.1, 1e-5)),
    "native": (aten.native_batch_norm.default, (False, 0.1, 1e-5)),
    "by the batch": (aten._native_batch_norm_legit_functional.default, (True, 0.1, 1e-5)),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_a_normalisation_that_returns_its_statistics_keeps_channels_free(name: str, affine: bool) -> None:
    """A graph by hand: `torch.export` writes what a module calls."""
    target, rest = NORMS[name]
    graph, root = fx.Graph(), nn.Module()
    tensors = dict(zip("abcdefg", (torch.randn(8, 5), *STATISTICS, torch.randn(3, 8)), strict=False))
    for key, tensor in tensors.items():
        root.register_parameter(key, nn.Parameter(tensor.clone()))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = made(graph.placeholder("x"), mode.from_tensor(torch.randn(6, 5)))
        read = [made(graph.get_attr(key), mode.from_tensor(tensor)) for key, tensor in tensors.items()]
        factors = read[1:3] if affine else [None, None]
        norm = called(graph, target, called(graph, aten.linear.default, x, read[0]), *factors, *read[3:5], *rest)
        graph.output(called(graph, aten.linear.default, called(graph, operator.getitem, norm, 0), read[5]))
    gm = fx.GraphModule(root, graph)
    axes = infer(gm)
    assert not axes.unknown
    assert [group.size for group in axes.groups()] == [8]
    with torch.no_grad():
        assert prove(gm.double(), axes, torch.randn(6, 5, dtype=torch.float64)) < _EXACT


def made(node: fx.Node, value: Any) -> fx.Node:
    node.meta["val"] = value
    return node


def called(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    return made(graph.call_function(target, args), target(*fx.map_arg(args, lambda node: node.meta["val"])))


@pytest.mark.parametrize("name", LAYERS)
def test_recurrent_layers(name: str) -> None:
    function, layers, left, sizes = LAYERS[name]
    gm = exported(Between(function, left, **layers), ROWS)
    axes = infer(gm)
    assert [group.size for group in axes.groups()] == sizes
    assert prove(gm, axes, ROWS) < _EXACT


def test_bags_of_words() -> None:
    model = nn.Sequential(nn.EmbeddingBag(9, 8, mode="max"), nn.Linear(8, 3))
    words = torch.tensor([[1, 2, 3], [4, 4, 0]])
    gm = exported(model, words)
    axes = infer(gm)
    assert [group.size for group in axes.groups()] == [8]
    assert prove(gm, axes, words) < _EXACT


def test_tokens_that_a_weight_makes_may_go_from_under_a_softmax() -> None:
    """Linformer: keys and values are shortened along tokens."""

    class Shortened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shorten, self.out = nn.Linear(4, 6), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            keys = self.shorten(x.transpose(1, 2)).transpose(1, 2)
            return self.out(F.scaled_dot_product_attention(x, keys, keys))

    gm = exported(Shortened(), ROWS)
    axes = infer(gm)
    assert [group.size for group in axes.groups()] == [6]
    assert prove(gm, axes, ROWS) < _EXACT


def test_a_loop_over_time_keeps_time_whole() -> None:
    """Position by position is no structure to be pruned, and cutting n positions n times takes n * n steps."""
    gm = exported(Between(lambda m, x: sum(x.transpose(1, 2)[..., t % 4] for t in range(12)), 8), ROWS)  # type: ignore[arg-type,return-value]
    assert [group.size for group in infer(gm).groups()] == [8]

"""Sizes: the predicted cost is that of the program with the indices really removed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt.axes.infer import infer
from graphopt.axes.rewrite import remove
from graphopt.capturing.capture import capture
from graphopt.measure.cost import cost
from graphopt.passes.pruning.sizes import Sizes
from tests import models
from tests.models import EXAMPLES, example


class Gru(nn.Module):
    """Two layers one way, and a cell by hand on what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(7, 9), nn.Linear(8, 5)
        self.gru, self.rnn = nn.GRU(9, 10, num_layers=2, batch_first=True), nn.RNN(10, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.gru(self.embed(x).relu())[0])[0])


class Projected(nn.Module):
    """An LSTM whose state is projected to fewer features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Linear(7, 9), nn.LSTM(9, 16, proj_size=4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(x).transpose(0, 1))[0].transpose(0, 1))


class Einsums(nn.Module):
    """Attention in einsums: projections to heads, scores, a product of three, and one that sums nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(7, 8), nn.Linear(12, 5)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(8, 3, 4)) for _ in range(3))
        self.out, self.up, self.gain = (
            nn.Parameter(torch.randn(3, 4, 8)),
            nn.Parameter(torch.randn(8, 12)),
            nn.Parameter(torch.randn(12)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (torch.einsum("btc,chd->bhtd", x, w) for w in (self.q, self.k, self.v))
        scores = torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1)
        x = x + torch.einsum("bhts,bhsd,hdc->btc", scores, v, self.out)
        return self.head(torch.einsum("...i,i->...i", torch.einsum("...c,ci", x, self.up), self.gain).relu())


class Stored(nn.Module):
    """Weights kept as integers by hand, and a mask that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(7, 12), nn.Linear(12, 5)
        self.register_buffer("stored", torch.arange(144).view(12, 12).to(torch.int8))
        self.register_buffer("mask", (torch.arange(12) % 3 > 0).to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu() * self.mask
        return self.head(y @ self.stored.to(y.dtype))


ALSO: dict[type[nn.Module], type[nn.Module]] = {  # with the model whose example it takes
    Gru: models.Recurrent,
    Projected: models.Recurrent,
    Einsums: models.FusedAttention,
    Stored: models.FusedAttention,
}


@pytest.mark.parametrize(
    "kind", [*(k for k in EXAMPLES if k is not models.NeighbourGate), *ALSO], ids=lambda k: k.__name__
)
def test_costs_are_predicted_exactly(kind: type[nn.Module]) -> None:
    program = models.captured(kind) if kind in EXAMPLES else capture(kind().double(), (example(ALSO[kind]),))
    axes = infer(program.graph_module)
    sizes = Sizes(program, axes)
    assert sizes.complete
    assert sizes.cost({}) == cost(program)
    assert axes.groups()
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for group in axes.groups():
        # torch 2.13 tells a projected LSTM by states of different sizes
        least = group.size // 2 if kind is Projected else 1
        kept[group.axis] = range(int(torch.randint(least, group.size + 1, (), generator=generator)))
    found = cost(program.with_graph(remove(program.graph_module, axes, kept)))
    predicted = sizes.cost(kept)
    assert (predicted.parameters, predicted.bytes) == (found.parameters, found.bytes)
    assert predicted.flops == pytest.approx(found.flops, abs=1)  # both are rounded to one sample

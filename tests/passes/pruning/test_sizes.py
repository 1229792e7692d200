"""Sizes: the predicted cost is that of the program with the indices really removed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt.axes.infer import infer
from graphopt.axes.rewrite import remove
from graphopt.capturing import capture
from graphopt.cost import cost
from graphopt.passes.pruning.sizes import Sizes
from tests import models
from tests.models import EXAMPLES, example


@pytest.mark.parametrize("kind", [k for k in EXAMPLES if k is not models.NeighbourGate], ids=lambda k: k.__name__)
def test_costs_are_predicted_exactly_or_not_at_all(kind: type[nn.Module]) -> None:
    program = capture(kind().double(), (example(kind),))
    axes = infer(program.graph_module)
    sizes = Sizes(program, axes)
    assert sizes.cost({}) == cost(program)
    assert sizes.complete == (kind is not models.Recurrent)  # an LSTM's operations are a sum of products
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        kept = {
            group.axis: range(int(torch.randint(1, group.size + 1, (), generator=generator))) for group in axes.groups()
        }
        found = cost(program.with_graph(remove(program.graph_module, axes, kept)))
        predicted = sizes.cost(kept)
        assert (predicted.parameters, predicted.bytes) == (found.parameters, found.bytes)
        if sizes.complete:
            assert predicted.flops == pytest.approx(found.flops, abs=1)  # both are rounded to one sample

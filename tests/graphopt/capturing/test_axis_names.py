"""Dynamic axes have one name where they have one size, and names of their own where they have not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import graphopt


class Pooled(nn.Module):
    """Two inputs of as many rows as each likes; values of either are computed in turn, as buffers are used again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.node, self.edge = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, nodes: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        first = self.node(nodes).tanh()
        second = self.edge(edges + first.mean(0)).tanh()
        third = self.node(first.cos() * second.amax(0)).tanh()
        return third, self.edge(second.cos() * third.amax(0)).tanh()


@pytest.mark.parametrize(
    ("dims", "names"),
    [
        ((Dim.DYNAMIC, Dim.DYNAMIC), ("batch", "batch_1")),
        ((Dim.DYNAMIC, Dim("batch")), ("batch_1", "batch")),
        ((Dim("n"), Dim.DYNAMIC), ("n", "batch")),
    ],
)
def test_first_axes_that_do_not_depend_on_each_other(dims: tuple[object, object], names: tuple[str, str]) -> None:
    model, examples = Pooled().eval(), (torch.randn(7, 5), torch.randn(7, 5))
    program = graphopt.capture(model, examples, dynamic_shapes={"nodes": {0: dims[0]}, "edges": {0: dims[1]}})
    assert tuple(spec.shape[0] for spec in program.inputs) == names
    assert tuple(spec.shape[0] for spec in program.outputs) == names
    artifact = graphopt.optimize(program, passes="", bench=False).artifact
    assert artifact is not None
    for rows in ((4, 7), (9, 3), (30, 1)):
        inputs = torch.randn(rows[0], 5), torch.randn(rows[1], 5)
        for found, want in zip(artifact.session()(*map(np.asarray, inputs)), model(*inputs), strict=True):
            torch.testing.assert_close(torch.tensor(found), want)

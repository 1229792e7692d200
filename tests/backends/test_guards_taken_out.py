"""Guards of a program are no part of what a runtime gets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt import capture
from graphopt.backends.onnx_lowering.lowering import Style, lower

aten = torch.ops.aten


class Words(nn.Module):
    """Bags, and an LSTM whose states are a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.words, self.layer = nn.EmbeddingBag(9, 4), nn.Embedding(9, 4), nn.LSTM(4, 4, batch_first=True)
        self.state = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        state = self.state.repeat(1, x.shape[0], 1)
        read: Tensor = self.layer(self.words(x), (state, state))[0]
        return read[:, -1] + self.bag(x)


@pytest.mark.filterwarnings("ignore")
def test_a_lowered_program_is_without_its_guards() -> None:
    program = capture(Words().eval(), torch.ones(2, 5).long())
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(aten.expand.default) == 3
    assert targets.count(aten.select_scatter.default) == 1
    model = lower(program, Style(opset=20))
    kinds = {node.op_type for node in model.graph}
    assert "LSTM" in kinds
    assert not kinds & {"Expand", "ScatterElements", "ScatterND", "SequenceAt", "Loop"}

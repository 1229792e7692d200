"""Layers as products: what the weight meets, times the weight, must be the output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.ir.graph import tensor_attribute
from graphopt.passes.layers.rows import input_rows, output_rows, positions
from graphopt.passes.layers.weighted_call import weighted_call
from graphopt.passes.layers.weights import by_taps, from_taps


class AddMM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class MatMul(AddMM):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def check(layer: nn.Module, x: Tensor) -> None:
    program = capture(layer.double(), (x,))
    calls = [weighted_call(node, program.graph_module) for node in program.graph.nodes]
    (call,) = [found for found in calls if found is not None]
    with torch.no_grad():
        y = layer(x)
    chosen = torch.arange(positions(call, y)).flip(0)[::2]
    weight = tensor_attribute(program.graph_module, call.weight_name)
    taps = by_taps(call, weight)
    product = torch.einsum("rgit,goit->rgo", input_rows(call, x, chosen, y.shape), taps).flatten(1)
    if call.bias is not None:
        product = product + tensor_attribute(program.graph_module, str(call.bias.target))
    torch.testing.assert_close(product, output_rows(call, y, chosen))
    assert torch.equal(from_taps(call, taps), weight)
    assert call.fan_in == taps.shape[2] * taps.shape[3]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 3), (4, 5)),
        (nn.Linear(5, 3, bias=False), (4, 2, 3, 5)),
        (nn.Linear(5, 0), (4, 5)),
        (nn.Linear(0, 3), (4, 2, 0)),
        (AddMM(), (4, 5)),
        (MatMul(), (4, 3, 5)),
        (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 5, 6)),
        (nn.Conv2d(4, 6, (2, 4), padding="same"), (2, 4, 5, 6)),
        (nn.Conv2d(4, 6, (2, 1), padding="valid", stride=(1, 2)), (2, 4, 5, 6)),
        (nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1)), (2, 2, 3, 4, 5)),
        (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5)),
    ],
    ids=str,
)
def test_rows_times_weight_are_the_output(layer: nn.Module, shape: tuple[int, ...]) -> None:
    check(layer, torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_convolution(data: st.DataObject) -> None:
    def pair(least: int, most: int) -> tuple[int, int]:
        return data.draw(st.tuples(*[st.integers(least, most)] * 2))

    groups = data.draw(st.integers(1, 3))
    ins, outs = (groups * data.draw(st.integers(1, 2)) for _ in range(2))
    kernel, stride, padding, dilation = pair(1, 3), pair(1, 3), pair(0, 2), pair(1, 2)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    x = torch.randn(2, ins, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if data.draw(st.booleans()):
        layer: nn.Module = nn.Conv2d(ins, outs, kernel, **options)
    else:
        layer = nn.ConvTranspose2d(ins, outs, kernel, **options)
        assume(all(5 * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) >= 0 for i in (0, 1)))
    check(layer, x)

"""What is said of what stays float32 in a quantized program."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.measure.cost import cost
from graphopt.measure.left_float import left_float, time_in_float
from graphopt.passes.int8 import Int8Options
from graphopt.passes.weights import Weights, WeightsOptions
from graphopt.pipeline.context import Context
from graphopt.targets.backend import OperatorTime
from tests.passes.int8_models import WITHOUT_COSTS, folded, images, noise, quantized


class Mixed(nn.Module):
    """A transposed convolution has no integer kernel; the table beside it is too uneven for 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 16, 3, padding=1), nn.ConvTranspose2d(16, 16, 3, padding=1)
        self.register_buffer("table", torch.ones(1, 16, 40, 40))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.conv(x).relu()) * self.table  # type: ignore[operator]


def test_names_layers_and_weights_with_their_shares() -> None:
    x = images(size=40, count=4)
    original = capture(Mixed().eval(), (x,))
    assert left_float(original) == []
    program, _ = quantized(original, x)
    layers, weights = left_float(program)
    assert layers == "84% of the operations are of layers that compute in float32: `up` 84%"
    assert weights.endswith("of the bytes of weights are float32: `table` 0.10 MB")


def test_small_tensors_that_are_float_count_too() -> None:
    """76 % were said of a network of which 99.9 % were float32, for its small layers were left out."""
    small = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(8)))
    model = nn.Sequential(small, nn.Conv2d(32, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 32))
    captured = folded(model, noise(2, 32, 8, 8))
    weights = Weights(WeightsOptions())
    program = weights.apply(captured, weights.plan(captured, Context(captured, target=WITHOUT_COSTS)))
    gm = program.graph_module
    tensors = [*gm.parameters(), *gm.buffers()]
    share = sum(t.nbytes for t in tensors if t.dtype is torch.float32) / sum(t.nbytes for t in tensors)
    assert left_float(program)[-1].startswith(
        f"{math.floor(1000 * share) / 10:g}% of the bytes of weights are float32: `1.weight` 0.07 MB"
    )


def test_says_nothing_of_what_is_integer() -> None:
    program, _ = quantized(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)), images())
    assert left_float(program) == []


def test_lstms_on_integers_count_as_before() -> None:
    x = noise(4, 5, 6)
    original = capture(nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True).eval(), (x,))
    program, _ = quantized(original, x, options=Int8Options(mode="dynamic"))
    assert left_float(program) == []
    assert cost(program).flops == cost(original).flops


def test_says_what_the_time_goes_to() -> None:
    times = [
        OperatorTime("conv", "QLinearConv", "integer", 60e-6),
        OperatorTime("norm", "LayerNormalization", "float", 18e-6),
        OperatorTime("norm_1", "LayerNormalization", "float", 12e-6),
        OperatorTime("tiny", "Erf", "float", 1e-6),
        OperatorTime("shape", "Shape", "other", 4e-6),
    ]
    turned = OperatorTime("q", "QuantizeLinear", "turned", 5e-6)
    assert time_in_float([*times, turned]) == [
        "31% of the time is of operators on floats: LayerNormalization 30%, and 5% turns values into integers and back"
    ]
    assert time_in_float(times) == ["33% of the time is of operators on floats: LayerNormalization 32%"]
    assert time_in_float([times[0], turned]) == ["8% of the time turns values into integers and back"]
    assert time_in_float([]) == time_in_float(times[:1]) == []

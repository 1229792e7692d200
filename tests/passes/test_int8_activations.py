"""Activations without an integer kernel of their own: what they are made of, their scales, and when they stay float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from graphopt.backends.onnxruntime.description import DESCRIPTION
from graphopt.measure.equivalence import measure
from graphopt.passes.int8 import Int8Options
from graphopt.passes.quantization.given_scales import dividing_shift, steps_of_shift
from graphopt.passes.quantization.placing import Placer
from graphopt.pipeline.plan import Refusal
from graphopt.quantization.qparams import QParams
from tests.passes.int8_models import folded, images, kernels, operators, quantized, reasons


class Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.a(x)
        gate = F.hardsigmoid(x)
        return x, gate, self.b(gate)


def test_hardsigmoid_of_integers_is_right_to_half_a_step() -> None:
    data = 4 * images()
    program, plan = quantized(folded(Gates(), data), data)
    assert [record["form"] for record in plan.values].count("hard_sigmoid") == 1
    given, gate, _ = program(data)
    assert given.min() < -4
    assert given.max() > 4
    assert (gate - F.hardsigmoid(given)).abs().max() <= 0.501 / 255


@pytest.mark.parametrize("bounds", [(-20.0, 20.0), (-0.4, 5.0), (-3.0, 3.0), (0.0, 0.01), (-100.0, 0.0), (-50, 690)])
def test_scales_that_divide_the_shift(bounds: tuple[float, float]) -> None:
    scale = float(np.float32((bounds[1] - bounds[0]) / 255))
    chosen = QParams(scale, round(-bounds[0] / scale), 0, 255)
    found = dividing_shift(chosen, DESCRIPTION.activation)
    steps = steps_of_shift(found.scale)
    assert abs(steps * found.scale - 3) < 1e-6
    assert found.zero_point >= steps  # the zero point of x + 3 is an integer that is stored, too
    assert found.range[0] <= min(bounds[0], -3) + found.scale
    assert found.range[1] >= bounds[1] - found.scale


@pytest.mark.parametrize(("times", "floating"), [(1, 0), (10, 0), (100, 0), (1000, 1)])
def test_hard_swish_stores_nothing_below_its_bend_and_is_float_where_steps_do_not_reach(
    times: float, floating: int, tmp_path: Path
) -> None:
    data = images()
    program = folded(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Hardswish(), nn.Conv2d(8, 4, 1)), data)
    with torch.no_grad():
        program.graph_module.get_parameter("0.weight").mul_(times)
    result, plan = quantized(program, data)
    assert operators(result)["hardswish"] == floating
    assert measure(program, result.call_flat, (data,)).sqnr > 30
    stored = next(record for record in plan.values if record["value"] == "conv2d")
    lowest = stored["scale"] * (stored["low"] - stored["zero_point"])
    assert lowest == pytest.approx(-3) if not floating else lowest < -765
    said = {name: reason for name, reason in reasons(plan).items() if "do not span" in reason}
    assert list(said) == ["hardswish"] * floating
    kernels(result, tmp_path, data)


@pytest.mark.parametrize("largest", [761.0, 762.5, 765.0, 766.0])
def test_operands_of_hard_swish_at_the_edge_of_what_steps_of_three_reach(largest: float) -> None:
    data = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    program = folded(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Hardswish(), nn.Conv2d(8, 4, 1)), data)
    with torch.no_grad():
        weight, bias = (program.graph_module.get_parameter(f"0.{name}") for name in ("weight", "bias"))
        bias.zero_()
        weight.abs_().mul_(largest / F.conv2d(data, weight).max())
    result, plan = quantized(program, data, options=Int8Options(guard="none", observer="minmax"))
    assert measure(program, result.call_flat, (data,)).sqnr > 30
    assert ("hardswish" in reasons(plan)) == (largest > 762)


def test_hard_swish_behind_a_clamp_that_is_dropped_is_spelled_as_before(tmp_path: Path) -> None:
    data = images()
    program = folded(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Hardswish(), nn.Conv2d(8, 4, 1)), data)
    result, _ = quantized(program, data)
    assert operators(result)["hardswish"] == 1
    kernels(result, tmp_path, data)


def test_what_others_read_is_stored_below_the_bend_of_hard_swish() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.a(20 * x)
            return self.b(F.hardswish(x)), self.c(x)

    data = images()
    program = folded(Both(), data)
    result, _ = quantized(program, data)
    assert measure(program, result.call_flat, (data,)).sqnr > 30


class Float(nn.Module):
    """Activations of floats, beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.slopes = nn.Conv2d(3, 3, 1), nn.PReLU(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.slopes(F.hardswish(torch.tanh(x))).exp() + self.conv(x)


def test_activations_of_floats_are_spelled_as_before() -> None:
    program, plan = quantized(Float(), images())
    assert plan.respelled == {}
    found = operators(program)
    assert (found["hardswish"], found["prelu"], found["leaky_relu"]) == (1, 1, 0)


def test_activations_that_go_back_to_float_later_are_spelled_as_before() -> None:
    """What the spelling on integers computes of infinities is no number."""
    program = folded(nn.Sequential(nn.Conv2d(3, 8, 1), nn.PReLU(8), nn.Conv2d(8, 4, 1)), images())
    placer = Placer(DESCRIPTION)
    placed, _ = placer.run(program)
    assert set(placed.respelled) == {"prelu"}
    placer.refused["prelu"] = Refusal("prelu", "it does not pay beside what was chosen since")
    again, placement = placer.again(placed, {})
    assert again.respelled == {}
    assert operators(again.program)["prelu"] == 1
    assert [site.node.name for site in placement.sites] == ["conv2d", "conv2d_1"]


class Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.hardsigmoid(self.a(x).relu()))


def test_a_range_that_clamps_is_not_widened() -> None:
    """The scale of what ends a ReLU starts at 0 in its place."""
    program, plan = quantized(Clamped(), images())
    assert reasons(plan) == {"hardsigmoid": "the range of its operand cannot be chosen for it"}
    assert operators(program)["hardsigmoid"] == 1


class WrittenOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(n, 4, 1) for n in (3, 4, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(x * (F.relu6(x + 3) / 6))
        x = self.d(x * (F.relu6(x + 3) * (1 / 6)))
        return self.c(x * F.hardtanh(x + 3.0, 0, 6) * (1 / 6))  # the last factor is folded into the layer


class OtherNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x * (F.relu6(x + 2) / 6) + (x + 3).clamp(0, 5) / 6)


def test_written_out_it_is_the_same(tmp_path: Path) -> None:
    original = folded(WrittenOut(), images())
    program, plan = quantized(original, images())
    assert measure(original, program.call_flat, (images(),)).sqnr > 25
    assert sorted(plan.respelled.values()) == ["hardsigmoid", "hardsigmoid", "six_hardsigmoids"]
    found = kernels(program, tmp_path, images())
    assert (found["QLinearConv"], found["QLinearAdd"], found["QLinearMul"]) == (4, 3, 4)
    _, other = quantized(OtherNumbers(), images())
    assert other.respelled == {}


class Slopes(nn.Module):
    """PReLU behind layers: slopes below 1, and on both sides of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(n, 4, 3) for n in (3, 4, 4))
        self.register_buffer("gentle", torch.linspace(-1, 1, 4))
        self.register_buffer("steep", torch.linspace(-1, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.prelu(self.b(F.prelu(self.a(x), self.gentle)), self.steep))


def test_slopes_of_channels_are_convolutions_of_integers() -> None:
    original = folded(Slopes(), images())
    program, plan = quantized(original, images())
    assert measure(original, program.call_flat, (images(),)).sqnr > 30
    assert plan.respelled == {"prelu": "add_relu_convolution", "prelu_1": "add_mul_relu_convolution"}
    assert [layer["bias"] is None for layer in plan.layers] == [False, True, False, True, True, False]


def test_slopes_of_floats_are_spelled_as_before() -> None:
    program, plan = quantized(Slopes(), images(), options=Int8Options(skip=("a",)))
    assert plan.respelled == {"prelu_1": "add_mul_relu_convolution"}
    assert operators(program)["prelu"] == 1

"""int8: weights of any number of bits, rounded by what they are multiplied with."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.errors import DataError
from graphopt.ir.program import Program
from graphopt.passes.int8 import Int8, Int8Options
from graphopt.passes.quantization.plan import Int8Plan
from graphopt.pipeline.context import Context
from graphopt.testing import check_pass
from tests.passes.int8_models import WITHOUT_COSTS, SharedWeight, images, noise, quantized, seeded


def correlated(*shape: int) -> Tensor:
    """Samples whose channels have much in common."""
    mixing = noise(shape[1], shape[1], seed=3) + 2 * noise(shape[1], 1, seed=4)
    return torch.tensordot(noise(*shape), mixing, ([1], [1])).movedim(-1, 1).contiguous()


LAYERS = {
    "linear": (nn.Linear(32, 24), (64, 32)),
    "convolution": (nn.Conv2d(8, 12, 3, padding=1), (64, 8, 6, 6)),
    "grouped": (nn.Conv1d(16, 12, 3, groups=4, stride=2), (64, 16, 9)),
}


@pytest.fixture(scope="module", params=LAYERS)
def layer(request: pytest.FixtureRequest) -> tuple[Program, Tensor]:
    model, shape = LAYERS[request.param]
    data = correlated(*shape)
    return capture(seeded(model), (data[:2],)), data


def rounded(program: Program, data: Tensor, **options: Any) -> tuple[Program, Int8Plan]:
    return quantized(program, data, options=Int8Options(mode="static", **options))


def error(program: Program, data: Tensor, **options: Any) -> float:
    result, _ = rounded(program, data, weight_bits=4, **options)
    return float((result(data) - program(data)).detach().square().mean())


@pytest.mark.parametrize("weights", ["channel", "tensor"])
def test_rounding_by_inputs_leaves_less_error(layer: tuple[Program, Tensor], weights: str) -> None:
    program, data = layer
    nearest, by_inputs = (error(program, data, rounding=how, weights=weights) for how in ("nearest", "gptq"))
    assert by_inputs < 0.6 * nearest


def test_weights_of_few_bits(layer: tuple[Program, Tensor]) -> None:
    for rounding in ("nearest", "gptq"):
        _, plan = rounded(*layer, weight_bits=3, rounding=rounding)
        (name,) = {record["weight"] for record in plan.layers}
        stored = plan.tensors[name]
        assert stored.dtype is torch.int8
        assert int(stored.abs().max()) == 3


def test_a_target_may_take_fewer_bits(layer: tuple[Program, Tensor]) -> None:
    target = dataclasses.replace(WITHOUT_COSTS, weight=dataclasses.replace(WITHOUT_COSTS.weight, bits=7))
    _, plan = quantized(*layer, target=target)
    (name,) = {record["weight"] for record in plan.layers}
    assert int(plan.tensors[name].abs().max()) == 63


def test_accuracy_says_what_is_done(layer: tuple[Program, Tensor]) -> None:
    plans = {accuracy: rounded(*layer, accuracy=accuracy)[1] for accuracy in ("fast", "balanced", "best")}
    asked = {
        "fast": {"bias_correction": False, "rounding": "nearest"},
        "balanced": {"bias_correction": True, "rounding": "nearest"},
        "best": {"bias_correction": True, "rounding": "gptq"},
    }
    for accuracy, options in asked.items():
        same = rounded(*layer, **options)[1].tensors
        assert all(torch.equal(tensor, same[name]) for name, tensor in plans[accuracy].tensors.items())
    (name,) = {record["weight"] for record in plans["fast"].layers}
    assert not torch.equal(plans["best"].tensors[name], plans["balanced"].tensors[name])


def test_a_shared_weight_is_rounded_by_all_it_is_multiplied_with() -> None:
    model = SharedWeight()
    _, plan = quantized(model, images(4), options=Int8Options(rounding="gptq", weight_bits=4))
    assert len({record["weight"] for record in plan.layers}) == 1


def test_it_needs_data() -> None:
    program = capture(seeded(nn.Linear(8, 4)), (noise(2, 8),))
    ctx = Context(original=program, targets=(WITHOUT_COSTS,), target=WITHOUT_COSTS)
    with pytest.raises(DataError, match="to round weights by what they are multiplied with"):
        Int8(Int8Options(mode="dynamic", rounding="gptq")).plan(program, ctx)


def test_keeps_the_contract(layer: tuple[Program, Tensor]) -> None:
    program, data = layer
    check_pass(Int8(Int8Options(accuracy="best")), program, data[:2], data=(data,), target=WITHOUT_COSTS)

"""Depthwise convolutions get as many channels as integer kernels compute at once, where that changes nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphopt.backends.onnxruntime.description import DESCRIPTION as VNNI
from graphopt.backends.onnxruntime.description import DESCRIPTION_AVX2 as AVX2
from graphopt.backends.tensorrt.description import DESCRIPTION as TENSORRT
from graphopt.ir.program import Program
from graphopt.measure.equivalence import measure
from graphopt.passes.int8 import Int8, Int8Options
from graphopt.passes.quantization.placing import Placer
from graphopt.passes.quantization.plan import Int8Plan
from graphopt.passes.quantization.widths import widened
from graphopt.pipeline.context import Context
from graphopt.statistics.alternatives import compare
from graphopt.targets.description import TargetDescription
from graphopt.testing import TensorSamples, check_pass
from tests.passes.int8_models import WITHOUT_COSTS as WIDE
from tests.passes.int8_models import Mobile, folded, images, kernels, quantized

NARROW = dataclasses.replace(WIDE, depthwise_multiple=1)


@pytest.fixture(scope="module")
def mobile() -> Program:
    return folded(Mobile(), images())


def test_fills_up_and_computes_the_same(mobile: Program, tmp_path: Path) -> None:
    program, plan = quantized(mobile, images())
    assert plan.widths == {"expand:width": 16}
    assert plan.notes == (
        "filled up with channels that change nothing, as integer kernels are faster so: `expand:width` to 16",
    )
    stored = program.state_dict()
    assert stored["depthwise.weight_int8"].shape[0] == 16
    assert not stored["project.weight_int8"][:, 12:].any()
    assert kernels(program, tmp_path, images())["QLinearConv"] == 6
    exact = widened(mobile, plan.widths, "int8")
    assert measure(mobile, exact.call_flat, (images(),)).relative < 1e-6


def test_grows_by_half_at_most() -> None:
    assert quantized(Mobile(11), images())[1].widths == {"expand:width": 16}


@pytest.mark.parametrize(("width", "times"), [(10, 1), (11, 2)])
def test_is_placed_again_only_where_something_gets_wider(
    width: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = list[Program]()
    run = Placer.run
    monkeypatch.setattr(Placer, "run", lambda placer, program: runs.append(program) or run(placer, program))
    quantized(Mobile(width), images(), options=Int8Options(mode="static"))
    assert len(runs) == times


def test_no_range_changes(mobile: Program) -> None:
    options = Int8Options(observer="minmax", bias_correction=False)
    (wide, plan), (narrow, left) = (quantized(mobile, images(), target=one, options=options) for one in (WIDE, NARROW))
    assert (left.widths, left.notes) == ({}, ())
    assert plan.values == left.values
    assert torch.equal(wide(images()), narrow(images()))


def test_keeps_the_contract(mobile: Program) -> None:
    check_pass(Int8(), mobile, images()[:2], data=(images(),), target=WIDE)


def test_a_stored_plan_makes_the_same_program(mobile: Program) -> None:
    program, plan = quantized(mobile, images())
    again = Int8().apply(mobile, Int8Plan.from_json(json.loads(json.dumps(plan.to_json())), plan.tensors))
    assert torch.equal(again(images()), program(images()))


class Between(nn.Module):
    """A depthwise layer of 24 channels between two dense ones with so many taps and channels on their other side."""

    def __init__(self, taps: int, others: int) -> None:
        super().__init__()
        self.before = nn.Conv2d(others, 24, taps, padding="same")
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.behind = nn.Conv2d(24, others, taps, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.depthwise(self.before(x).relu()).relu())


@pytest.mark.parametrize(
    ("taps", "others", "size", "uneven", "pays"),
    [
        (1, 16, 28, 1.9, True),  # takes 0.87 of the time, 0.81 with 8 samples
        (3, 64, 14, 1.9, False),  # 1.04, 1.05
        (3, 64, 14, 99.0, True),
        (1, 16, 28, 1.0, False),
    ],
)
def test_layers_around_lose_less_than_is_gained(taps: int, others: int, size: int, uneven: float, pays: bool) -> None:
    target = dataclasses.replace(VNNI, depthwise_uneven=uneven)
    model, options = Between(taps, others), Int8Options(guard="none", mode="static")
    _, plan = quantized(model, images(others, size, 4), target=target, options=options)
    assert plan.widths == ({"before:channels": 32} if pays else {})


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.project = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1)
        self.depthwise, self.norm = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.GroupNorm(3, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.norm(self.depthwise(self.expand(x))))


@pytest.mark.parametrize(
    ("model", "target", "options"),
    [
        (Mobile(10), WIDE, Int8Options()),  # 16 are more than half as many again
        (Mobile(16), WIDE, Int8Options()),
        (Normed(), WIDE, Int8Options()),
        (Mobile(), WIDE, Int8Options(skip=("depthwise",))),
        (Mobile(), WIDE, Int8Options(weights="float")),
        (Mobile(), TENSORRT, Int8Options()),
        (Mobile(), dataclasses.replace(AVX2, costs=None), Int8Options()),  # timed nowhere
    ],
    ids=["few", "even", "normed", "float", "simulated", "another target", "without VNNI"],
)
def test_left_as_they_are(model: nn.Module, target: TargetDescription, options: Int8Options) -> None:
    _, plan = quantized(model, images(), target=target, options=options)
    assert plan.sites
    assert plan.widths == {}


def test_knobs_are_of_the_weights_that_there_are(mobile: Program) -> None:
    context = Context(original=mobile, targets=(WIDE,), target=WIDE, samples=TensorSamples((images(),)))
    knobs = Int8().knobs(mobile, context)
    assert "depthwise.weight" in {knob.site for knob in knobs}
    ways = {node: {"int8": way} for knob in knobs for node, way in knob.alternatives.items()}
    assert all(found["int8"] > 30 for found in compare(mobile, [(images(),)], ways).values())

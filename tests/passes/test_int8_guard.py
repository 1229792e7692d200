"""The guard: what the target's kernels do faster in float stays float, and is said to, with both times."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.backends.onnxruntime.description import DESCRIPTION
from graphopt.ir.program import Program
from graphopt.job.optimizing import optimize
from graphopt.measure.bench import Spread
from graphopt.passes.int8 import Int8, Int8Options
from graphopt.passes.quantization.paying import Accounts
from graphopt.passes.quantization.placing import Placer
from graphopt.passes.quantization.plan import Int8Plan
from graphopt.pipeline.context import Context
from graphopt.targets.costs import CostTable, KernelCost
from graphopt.targets.description import TargetDescription
from graphopt.testing import TensorSamples
from tests.passes.int8_models import WITHOUT_COSTS, folded, images, operators, quantized, reasons

CONVOLUTIONS = ("conv2d", "conv2d_first", "conv2d_pointwise", "conv2d_depthwise")
MOVES = ("quantize", "dequantize", "quantize_map", "dequantize_map")


class Chain(nn.Module):
    """Three convolutions and a product, an activation between them that is spelled anew."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.last, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.deep(torch.relu(self.first(x)))
        return self.head(self.last(nn.functional.hardswish(y)).mean((2, 3)))


@pytest.fixture(scope="module")
def chain() -> Program:
    return folded(Chain(), images(count=4))


def costing(
    integer: float = 1, floating: float = 1, moving: float = 0, **others: tuple[float, float]
) -> TargetDescription:
    """Describe a target whose kernels take so many microseconds, `others` by name on integers and as float."""
    times = dict.fromkeys((*CONVOLUTIONS, "gemm", "matmul", "global_average_pool"), (integer, floating))
    times |= {"hardsigmoid": (0, 0), "mul": (0, 0), "hardswish": (0, 0), **others}
    costs = [
        KernelCost(name, form, 1, us * 1e-6, 0, 0)
        for name, both in times.items()
        for form, us in zip(("static", "float"), both, strict=True)
    ]
    costs += [KernelCost(name, "static", 1, moving * 1e-6, 0, 0) for name in MOVES]
    return dataclasses.replace(WITHOUT_COSTS, costs=CostTable("here", "a processor", "a runtime", tuple(costs)))


def planned(program: Program, target: TargetDescription, **options: Any) -> Int8Plan:
    return quantized(program, images(count=4), target=target, options=Int8Options(mode="static", **options))[1]


def decisions(plan: Int8Plan) -> dict[str, Any]:
    return {name: value for name, value in plan.to_json().items() if name != "options"}


@pytest.mark.parametrize(("channels", "size", "left"), [(8, 8, ["conv2d"]), (128, 28, [])])
def test_by_the_costs_that_are_shipped_wide_layers_are_integer(channels: int, size: int, left: list[str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.ReLU(), nn.Conv2d(channels, channels, 3))
    _, plan = quantized(model, images(size=size, count=2), target=DESCRIPTION)
    assert [name for name, reason in reasons(plan).items() if "by the costs of onnxruntime (" in reason] == left
    assert len(plan.layers) == 2 - len(left)


def test_where_integers_are_slow_everything_stays_float(chain: Program) -> None:
    plan = planned(chain, costing(integer=7, floating=3))
    assert plan.sites == plan.values == plan.layers == ()
    said, by = reasons(plan), "by the costs of here (a processor)"
    assert said["conv2d"] == said["conv2d_1"] == f"it takes with 1 other 14 us as integers, 6 us as float, {by}"
    assert said["conv2d_2"] == said["linear"] == f"it takes with 2 others 21 us as integers, 9 us as float, {by}"
    assert "faster as float on here" in plan.summary()


def test_where_they_are_fast_nothing_changes(chain: Program) -> None:
    guarded, unguarded = (planned(chain, costing(integer=1, floating=2), guard=guard) for guard in ("costs", "none"))
    assert decisions(guarded) == decisions(unguarded)
    assert len(guarded.layers) == 4


def test_what_is_faster_in_float_for_one_sample_alone_stays(chain: Program) -> None:
    target, many = costing(integer=7, floating=3), costing(integer=1, floating=3)
    assert target.costs is not None
    assert many.costs is not None
    both = (*target.costs.costs, *(dataclasses.replace(cost, samples=8) for cost in many.costs.costs))
    target = dataclasses.replace(target, costs=dataclasses.replace(target.costs, costs=both))
    assert decisions(planned(chain, target)) == decisions(planned(chain, target, guard="none"))


class Trunk(nn.Module):
    """What a layer makes is read by a layer and by a sum, and so is that."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(channels, 8, 3, padding=1) for channels in (3, 8, 8))
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.a(x))
        return self.last(torch.relu(x + self.b(x)))


@pytest.fixture(scope="module")
def trunk() -> Program:
    return folded(Trunk(), images(count=4))


def test_sums_of_a_float_and_integers_are_on_integers_where_what_reads_them_is(trunk: Program) -> None:
    plan = planned(trunk, WITHOUT_COSTS, skip=("stem",))
    assert {*reasons(plan)} == {"conv2d"}
    assert {"add", "add_1"} <= {*plan.sites}


@pytest.mark.parametrize(("moving", "left"), [(1, ["conv2d"]), (2, [])])
def test_each_sum_behind_a_float_map_lays_it_out_anew(trunk: Program, moving: int, left: list[str]) -> None:
    """Float, the first layer takes 2 us and one move; with integers behind it, four moves more."""
    plan = planned(trunk, costing(integer=3, floating=9, moving=moving, conv2d_first=(9, 2), add=(1, 1)))
    assert list(reasons(plan)) == left


class Twice(Trunk):
    """What a layer makes reaches a product in two ways, and a sum behind it."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.stem(x))
        return self.last(x + self.a(x))


def test_what_is_reached_in_two_ways_is_laid_out_anew_once() -> None:
    accounts = Accounts(*reversed(Placer(WITHOUT_COSTS).run(folded(Twice(), images(count=4)))))
    relaid = {value.node.name: len(accounts.relaid(value)) for value in accounts.handovers()}
    assert relaid["conv2d"] == 2 * 2
    assert relaid["add"] == 0


class Gated(Trunk):
    """What a layer makes is multiplied with one number for each channel."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.last(x * torch.sigmoid(self.a(nn.functional.adaptive_avg_pool2d(x, 1))))


def test_a_gate_has_no_layout() -> None:
    costs = costing(integer=3, floating=9, moving=2, conv2d_first=(9, 2), sigmoid=(0, 0), mul_broadcast=(1, 1))
    assert list(reasons(planned(folded(Gated(), images(count=4)), costs))) == ["conv2d"]


@pytest.mark.parametrize(("nearest", "stays_float"), [(1, True), (100, False)])
def test_a_kernel_that_was_not_timed_takes_what_the_nearest_does(nearest: int, stays_float: bool) -> None:
    program = folded(nn.Sequential(nn.Conv2d(3, 8, 1), nn.PReLU(8), nn.Conv2d(8, 4, 1)), images(count=4))
    target = costing(integer=5, floating=4, moving=3, add=(1, 1), relu=(0, 0), leaky_relu=(1, nearest))
    assert target.costs is not None
    like = dataclasses.replace(target, costs=dataclasses.replace(target.costs, like={"prelu": "leaky_relu"}))
    assert (planned(program, like).layers == ()) is stays_float
    assert planned(program, target).layers


def test_without_a_table_nothing_changes(chain: Program) -> None:
    assert decisions(planned(chain, WITHOUT_COSTS)) == decisions(planned(chain, costing(integer=9), guard="none"))


@pytest.mark.parametrize(("moving", "left"), [(1, ["conv2d_1"]), (8, [])])
def test_one_layer_goes_back_where_turning_its_values_costs_less(chain: Program, moving: int, left: list[str]) -> None:
    plan = planned(chain, costing(floating=30, moving=moving, conv2d_depthwise=(9, 2)))
    layers = [layer["site"] for layer in plan.layers]
    assert [name for name in ("conv2d", "conv2d_1", "conv2d_2", "linear") if name not in layers] == left


def test_an_activation_goes_back_to_how_it_was_written(chain: Program) -> None:
    program, plan = quantized(
        chain,
        images(count=4),
        target=costing(floating=5, moving=1, hardsigmoid=(9, 9), hardswish=(9, 1)),
        options=Int8Options(mode="static"),
    )
    assert reasons(plan)["hardswish"] == "it takes 9 us as integers, 3 us as float, by the costs of here (a processor)"
    assert len(plan.layers) == 4
    assert operators(program)["hardswish"] == 1
    assert "hardsigmoid" not in operators(program)


def test_what_the_table_does_not_know_stays_where_it_was(chain: Program) -> None:
    target = costing(integer=9, floating=1)
    assert target.costs is not None
    known = tuple(cost for cost in target.costs.costs if cost.kernel != "conv2d_pointwise")
    target = dataclasses.replace(target, costs=dataclasses.replace(target.costs, costs=known))
    assert [layer["site"] for layer in planned(chain, target).layers] == ["conv2d_2"]


def test_a_plan_is_carried_out_without_a_clock(chain: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(chain, costing(floating=3, moving=1, conv2d_first=(9, 2)))
    stored = Int8Plan.from_json(json.loads(json.dumps(plan.to_json())), plan.tensors)
    for clock in ("time", "perf_counter", "process_time", "monotonic"):
        monkeypatch.setattr(time, clock, lambda: pytest.fail("a clock was read"))
    x = images(count=2)
    torch.testing.assert_close(Int8().apply(chain, stored)(x), Int8().apply(chain, plan)(x), rtol=0, atol=0)


def _timed(chain: Program, target: TargetDescription, *times: tuple[float, float, float]) -> Int8Plan:
    """Plan with a stopwatch that says these shares of the time of float, in turn."""
    left = iter(times)
    context = Context(
        original=chain,
        targets=(target,),
        target=target,
        samples=TensorSamples((images(count=4),)),
        timers={target.name: lambda program, reference: Spread.of(next(left))},
    )
    plan = Int8(Int8Options(mode="static", guard="measure")).plan(chain, context)
    assert not list(left)
    return plan


def test_measured_slower_than_float_is_float(chain: Program) -> None:
    plan = _timed(chain, WITHOUT_COSTS, (1.02, 1.02, 1.02))
    assert plan.layers == plan.values == plan.sites == ()
    assert reasons(plan)["conv2d"] == "integers take 1.020 (1.020-1.020) of the time of float here"
    assert plan.measured == {"time of float": {"integers everywhere": [1.02, 1.02, 1.02]}}


@pytest.mark.parametrize(("by_costs", "layers"), [(0.7, 3), (0.9, 4)])
def test_of_what_is_faster_than_float_the_fastest_is_taken(chain: Program, by_costs: float, layers: int) -> None:
    target = costing(floating=30, moving=1, conv2d_depthwise=(9, 2))
    plan = _timed(chain, target, (0.8, 0.8, 0.8), (by_costs, by_costs, by_costs))
    assert len(plan.layers) == layers
    seen = plan.measured["time of float"]
    assert seen == {"integers everywhere": [0.8] * 3, "integers by costs": [by_costs] * 3}


def test_nothing_is_timed_twice(chain: Program) -> None:
    assert len(_timed(chain, costing(floating=30), (0.5, 0.5, 0.5)).layers) == 4


def test_simulated_integers_are_not_timed() -> None:
    with pytest.raises(ValueError, match="no guard=measure"):
        Int8Options(weights="float", guard="measure")


def test_the_runtime_is_timed_here_and_the_plan_holds_what_was_seen(chain: Program) -> None:
    """With the stopwatch that users get: which way is faster is the machine's affair, what follows from it is not."""
    result = optimize(chain, images(count=8), "int8:mode=static:guard=measure", bench=False)
    (plan,) = (plan for plan in result.plans if isinstance(plan, Int8Plan))
    seen = plan.measured["time of float"]
    assert isinstance(seen, dict)
    _, _, upper = min(seen.values(), key=lambda ratios: ratios[1])  # type: ignore[index,arg-type]
    assert bool(plan.sites) == (upper < 1)
    assert ("of the time of float here" in str(plan.refusals)) == (upper >= 1)

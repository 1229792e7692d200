"""Compensation: what data makes of a removal, what is left alone and why."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from graphopt.capturing.capture import capture
from graphopt.errors import DataError
from graphopt.ir.program import Program
from graphopt.measure.equivalence import measure
from graphopt.passes.prune import Prune, PruneOptions, PruningPlan
from graphopt.passes.pruning import compensation, reconstruction
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import build
from graphopt.testing import TensorSamples, check_pass, fingerprint
from tests import models
from tests.graphopt.axes.test_random_networks import STEPS, Network, Step
from tests.models import EXAMPLES, example

EXACT = 1e-5  # relative error: a ridge of 1e-6 of the mean square pulls every direction that far from the optimum


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prune(**options: Any) -> Prune:
    return Prune(build("prune", PruneOptions, {"ratio": 0.5, "round_to": 1, "min_channels": 1, **options}))


def plan_of(pass_: Prune, program: Program, data: Tensor | None) -> PruningPlan:
    ctx = Context(original=program)
    return pass_.plan(program, ctx if data is None else ctx.with_data(TensorSamples((data,))))


def reasons(plan: PruningPlan) -> dict[str, str]:
    return {refusal.site: refusal.reason for refusal in plan.refusals}


class Redundant(nn.Module):
    """The second half of the channels are sums of the first and smaller, so nothing need be lost with them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first = nn.Conv2d(3, 6, 1) if kind != "linear" else nn.Linear(5, 6)
        self.second: nn.Module = {
            "linear": nn.Linear(6, 4),
            "conv": nn.Conv2d(6, 4, 3, stride=2, padding=1),
            "no bias": nn.Conv2d(6, 4, 3, padding=2, dilation=2, bias=False),
            "transposed": nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1),
            "norm": nn.Sequential(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4)),
        }[kind]
        mix = torch.rand(3, 3) * 0.1
        with torch.no_grad():
            self.first.weight[3:] = torch.einsum("oi,i...->o...", mix, self.first.weight[:3])
            self.first.bias[3:] = mix @ self.first.bias[:3]
            if kind == "no bias":
                self.first.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def data_for(kind: str, count: int = 64) -> Tensor:
    return randn(count, 5) if kind == "linear" else randn(count, 3, 6, 6)


@pytest.mark.parametrize("kind", ["linear", "conv", "no bias", "transposed", "norm"])
def test_channels_that_depend_on_others_cost_nothing(kind: str) -> None:
    data = data_for(kind)
    checked = check_pass(prune(), Redundant(kind).double(), data[:2], data=[data], idempotent=False)
    assert checked.plan.sites == (f"first:{'hidden' if kind == 'linear' else 'channels'}",)
    fresh = data_for(kind, 100)[64:]
    assert measure(checked.before, checked.after.call_flat, (fresh,)).relative < EXACT
    plain = prune(compensate=False)
    removed = plain.apply(checked.before, plan_of(plain, checked.before, data))
    assert measure(checked.before, removed.call_flat, (fresh,)).relative > 100 * EXACT


def test_the_bias_of_a_convolution_before_a_norm_is_its_running_mean() -> None:
    data = data_for("norm")
    program = capture(Redundant("norm").double(), (data[:2],))
    plan = plan_of(prune(), program, data)
    assert sorted(plan.tensors) == ["second.0.weight", "second.1.running_mean"]


def test_the_plan_says_what_each_layer_gained_and_survives_as_json() -> None:
    data = example(models.Residual, 96)
    program = models.captured(models.Residual)
    plan = plan_of(prune(), program, data)
    stored = PruningPlan.from_json(json.loads(json.dumps(plan.to_json())), plan.tensors)
    assert stored.compensated == plan.compensated
    assert sorted(stored.compensated) == ["head.weight", "inner.weight", "outer.weight"]
    for layer in stored.compensated.values():
        assert set(layer) == {"before", "after", "ridge"}
        assert 0 <= layer["after"] < layer["before"]  # type: ignore[operator]
    assert fingerprint(prune().apply(program, stored)) == fingerprint(prune().apply(program, plan))
    assert plan.measured["compensated"] > plan.measured["plain"]  # type: ignore[operator]


class Shortcut(nn.Module):
    """A block behind another: what the first loses arrives at the second's sum, and the second can make up for it."""

    def __init__(self, widths: tuple[int, int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, 6)
        self.a, self.b = (nn.Sequential(nn.Linear(6, w), nn.Tanh(), nn.Linear(w, 6)) for w in widths)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.a(x)
        return x + self.b(x)


def test_refitted_tensors_are_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take the place of the slices they were fitted from, and the program reads those of the plan."""
    original = capture(Redundant("linear").double(), (randn(2, 5),))
    places: list[set[int]] = []
    refit = reconstruction.compensate

    def compensate(given: Program, pruned: Program, *rest: Any) -> Any:
        found = refit(given, pruned, *rest)
        held = pruned.state_dict()
        places.append({held[name].data_ptr() for name in found.tensors})
        assert found.tensors
        assert places[-1] == {tensor.data_ptr() for tensor in found.tensors.values()}
        return found

    monkeypatch.setattr(reconstruction, "compensate", compensate)
    plan = plan_of(prune(), original, randn(200, 5))
    assert len(places) == 1
    sliced: list[Any] = []
    select = Tensor.index_select
    monkeypatch.setattr(Tensor, "index_select", lambda self, *given: sliced.append(self) or select(self, *given))
    applied = prune().apply(original, plan).state_dict()
    assert {name: applied[name].data_ptr() for name in plan.tensors} == {
        name: tensor.data_ptr() for name, tensor in plan.tensors.items()
    }
    named = {tensor.data_ptr(): name for name, tensor in original.state_dict().items()}
    assert not {named[tensor.data_ptr()] for tensor in sliced} & {*plan.tensors}


def test_a_later_branch_makes_up_for_what_the_shortcut_lost() -> None:
    data = randn(512, 6)
    program = capture(Shortcut((6, 40)).double(), (data[:2],))
    pass_ = prune(kinds=("hidden",), skip=("b.*",), ratio=0.5)
    after = pass_.apply(program, plan_of(pass_, program, data))
    errors = []
    for name in ("add", "add_1"):
        wanted, found = (_value(p, name, data) for p in (program, after))
        errors.append(float((wanted - found).norm()))
    assert errors[1] < 0.5 * errors[0]


def _value(program: Program, name: str, data: Tensor) -> Tensor:
    from graphopt.ir.walker import Walker

    node = next(node for node in program.graph.nodes if node.name == name)
    walker = Walker(program).start([(data,)])
    walker.run_until(node)
    value: Tensor = walker.values[node][0]
    return value


class Sequence(nn.Module):
    """A layer along a sequence, whose samples lie along the first axis, along the second, or inside of one."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.form = nn.Linear(4, 8), nn.Linear(8, 3), form

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "first":
            return self.second(self.first(x).tanh())
        x = x.transpose(0, 1)
        if self.form == "second":
            return self.second(self.first(x).tanh()).transpose(0, 1)
        return self.second(self.first(x.flatten(0, 1)).tanh()).unflatten(0, (5, -1)).transpose(0, 1)


@pytest.mark.parametrize("form", ["second", "inside"])
def test_a_sample_judges_or_is_fitted_wherever_the_batch_lies(form: str) -> None:
    data = randn(31, 5, 4)
    wanted, found = (
        plan_of(prune(), capture(Sequence(kind).double(), (data[:2],)), data).compensated["second.weight"]
        for kind in ("first", form)
    )
    assert found == pytest.approx(wanted)  # type: ignore[comparison-overlap]


# -- refusals --------------------------------------------------------------------------------------------


def test_without_data_the_removal_is_plain_and_says_so() -> None:
    program = capture(Redundant("linear").double(), (data_for("linear")[:2],))
    plan = plan_of(prune(), program, None)
    assert plan.sites
    assert not plan.tensors
    assert reasons(plan)["compensation"] == "not compensated: there is no data"


def test_too_few_samples_say_so() -> None:
    data = data_for("linear", 15)
    data[3] = torch.nan  # nobody looks at them
    plan = plan_of(prune(), capture(Redundant("linear").double(), (data[:2],)), data)
    assert not plan.tensors
    wanted = "not compensated: too few samples, at least 16 are needed to fit some and judge by others"
    assert reasons(plan)["compensation"] == wanted


def test_switched_off_means_plain_and_silent() -> None:
    data = data_for("linear")
    plan = plan_of(prune(compensate=False), capture(Redundant("linear").double(), (data[:2],)), data)
    assert not plan.tensors
    assert "compensation" not in reasons(plan)


def test_a_layer_without_outputs_is_no_layer_to_fit() -> None:
    class Branched(Redundant):
        def __init__(self) -> None:
            super().__init__("linear")
            self.empty, self.back = nn.Linear(6, 0), nn.Linear(0, 4)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.back(self.empty(self.first(x)))

    data = data_for("linear")
    program = capture(Branched().double(), (data[:2],))
    plan = plan_of(prune(), program, data)
    assert len(plan.kept["first.weight"][0]) == 3
    assert reasons(plan)["empty.weight"] == "not compensated: its weight has no elements"
    assert measure(program, prune().apply(program, plan).call_flat, (data,)).relative < EXACT


def test_a_layer_whose_samples_cannot_be_told_apart_is_left_alone() -> None:
    class Divided(Redundant):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).reshape(2, 4, 6)).reshape(8, 4)

    data = data_for("linear")
    plan = plan_of(prune(), capture(Divided("linear").double(), (data[:8],)), data)
    reason = "not compensated: no one axis of its output is known to hold the samples, which have to be told apart"
    assert reasons(plan)["second.weight"] == reason


def test_too_few_samples_for_one_to_judge_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensation, "_HELD_OUT", 50)
    data = data_for("linear")
    plan = plan_of(prune(), capture(Redundant("linear").double(), (data[:2],)), data)
    assert reasons(plan)["second.weight"] == "not compensated: too few samples: every 50th judges, and there are fewer"


class Shared(Redundant):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) + self.second(x.relu())


def test_a_shared_weight_is_left_alone() -> None:
    data = data_for("linear")
    plan = plan_of(prune(), capture(Shared("linear").double(), (data[:2],)), data)
    assert reasons(plan)["second.weight"] == "not compensated: weight is shared with `linear_2`"


def test_a_computed_weight_is_left_alone() -> None:
    data = example(models.WeightNormed, 64)
    plan = plan_of(prune(), capture(models.WeightNormed().double(), (data[:2],)), data)
    reason = "its weight is computed from stored tensors by `_weight_norm`: put fold before, which stores it"
    assert reasons(plan)["conv1d"] == f"not compensated: {reason}"


@pytest.mark.parametrize("normed", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_weight_that_fold_stores_says_so_and_one_that_it_cannot_does_not(normed: Callable[..., nn.Module]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(8, 16), normed(nn.Linear(16, 16)), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = self.second(self.first(x).relu()).relu()
            return nn.functional.linear(self.third(h), self.third.weight * h.mean())

    torch.manual_seed(0)
    data = torch.randn(64, 8)
    said = set(reasons(plan_of(prune(), capture(Net().eval(), (data[:2],)), data)).values())
    assert any("put fold before, which stores it" in reason for reason in said)
    assert any(reason.startswith("not compensated: its weight is computed at run time by") for reason in said)


class Odd(Redundant):
    """What it makes of its second layer's values, and of samples whose first value is above 50."""

    def __init__(self, odd: float, inside: bool = False) -> None:
        super().__init__("norm")
        self.odd, self.inside = odd, inside

    def forward(self, x: Tensor) -> Tensor:
        bad = (x[:, :1, :1, :1] > 50).to(x.dtype)
        if self.inside:  # 0 / 0, and what is not finite does not reach the outputs
            return torch.nan_to_num(super().forward(x / (1 - bad)), posinf=0.0, neginf=0.0)
        return super().forward(x.clamp(max=3)) + torch.where(bad > 0, self.odd, 0.0)


def marked(*samples: int) -> Tensor:
    data = data_for("norm", 96)
    data[list(samples), 0, 0, 0] = 100
    return data


@pytest.mark.parametrize("sample", [70, 71])  # one that judges, one that is fitted
def test_a_sample_that_makes_the_original_give_nan_is_named(sample: int) -> None:
    program = capture(Odd(float("nan")).double(), (data_for("norm", 2),))
    with pytest.raises(
        DataError, match=f"Calibration sample {sample} makes the unpruned program give NaN in output `output`"
    ) as info:
        plan_of(prune(), program, marked(sample))
    assert info.value.exit_code == 6
    assert plan_of(prune(compensate=False), program, marked(70)).sites


def test_a_sample_that_holds_nan_is_named() -> None:
    data = data_for("norm")
    data[33, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="Calibration sample 33 holds NaN in input `x`"):
        plan_of(prune(), capture(Redundant("norm").double(), (data_for("norm", 2),)), data)


def test_samples_whose_outputs_are_infinite_are_left_out() -> None:
    program = capture(Odd(float("inf")).double(), (data_for("norm", 2),))
    plan = plan_of(prune(), program, marked(3, 71, 70))
    said = [refusal.reason for refusal in plan.refusals if refusal.site == "compensation"]
    assert said == [
        "left out 2 of 72 samples: number 3 makes an output infinite",
        "left out 1 of 12 samples: number 70 makes an output infinite",
    ]
    without = torch.cat([marked()[:3], marked()[4:70], marked()[71:]])
    again = plan_of(prune(), program, without)
    assert plan.compensated.keys() == again.compensated.keys() == {"second.0.weight"}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in plan.tensors.values())
    assert plan.compensated["second.0.weight"]["after"] < EXACT  # type: ignore[operator]


def test_a_program_of_a_fixed_batch_size_loses_the_whole_batch() -> None:
    program = capture(Odd(float("inf")).double(), (data_for("norm", 8),), dynamic_shapes={"x": {0: None}})
    plan = plan_of(prune(), program, marked(19))
    assert reasons(plan)["compensation"] == "left out 8 of 72 samples: number 19 makes an output infinite"
    assert "second.0.weight" in plan.compensated


def test_outputs_that_are_masked_by_infinity_are_no_bad_samples() -> None:
    class Masked(Redundant):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return torch.where(torch.arange(4).view(4, 1, 1) == 2, float("-inf"), y)

    data = data_for("norm")
    plan = plan_of(prune(), capture(Masked("norm").double(), (data[:2],)), data)
    assert "compensation" not in reasons(plan)
    assert "second.0.weight" in plan.compensated


def test_what_is_not_finite_inside_never_reaches_the_weights() -> None:
    program = capture(Odd(0.0, inside=True).double(), (data_for("norm", 2),))
    plan = plan_of(prune(), program, marked(41))
    assert reasons(plan)["second.0.weight"] == "not compensated: its values are not finite on the samples"
    assert reasons(plan)["statistics"] == "not re-estimated: they are not finite on the samples"
    assert not plan.tensors
    pruned = prune().apply(program, plan)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in pruned.state_dict().values())


def test_values_that_are_not_finite_are_left_alone() -> None:
    class Logarithm(Redundant):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu().log()).nan_to_num()

    data = data_for("linear")
    plan = plan_of(prune(), capture(Logarithm("linear").double(), (data[:2].abs(),)), data)
    assert reasons(plan)["second.weight"] == "not compensated: its values are not finite on the samples"


def test_a_layer_that_sees_what_it_saw_keeps_its_weights() -> None:
    data = data_for("linear")
    plan = plan_of(prune(), capture(Redundant("linear").double(), (data[:2],)), data)
    assert sorted(plan.tensors) == ["second.bias", "second.weight"]
    assert "first.weight" not in reasons(plan)


# -- edges, invariants, meaning --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [k for k in EXAMPLES if k not in (models.NeighbourGate, models.Recurrent)],
    ids=lambda k: k.__name__,
)
def test_every_structure_keeps_the_contract(kind: type[nn.Module]) -> None:
    data = example(kind, 32)
    checked = check_pass(prune(), models.captured(kind), data[:2], data=[data], idempotent=False)
    assert isinstance(checked.plan, PruningPlan)
    prune().prove(checked.before, checked.after, checked.plan)
    assert max(checked.plan.measured.values()) >= checked.plan.measured["plain"]  # type: ignore[type-var,operator]


def test_a_fixed_batch_is_respected() -> None:
    from torch.export import export

    data = randn(40, 5)
    model = Redundant("linear").double()
    program = capture(model, (data[:8],), dynamic_shapes=None)
    fixed = dataclasses.replace(
        program, graph_module=export(model, (data[:8],)).module(check_guards=False), inputs=_fixed(program, 8)
    )
    plan = plan_of(prune(), fixed, randn(43, 5))  # five batches; what is left over is not used
    assert plan.compensated


def test_a_batch_larger_than_the_limits_is_fitted_and_judged_by() -> None:
    program = capture(Redundant("linear").double(), (randn(160, 5),), dynamic_shapes={"x": {0: None}})
    pass_, samples = prune(samples=16), TensorSamples((randn(640, 5),))
    assert pass_.plan(program, Context(original=program).with_data(samples)).compensated


def _fixed(program: Program, batch: int) -> tuple[Any, ...]:
    return tuple(dataclasses.replace(spec, shape=(batch, *spec.shape[1:])) for spec in program.inputs)


def test_single_precision_loses_little() -> None:
    data = data_for("conv").float()
    program = capture(Redundant("conv"), (data[:2],))
    after = prune().apply(program, plan_of(prune(), program, data))
    assert measure(program, after.call_flat, (data,)).relative < 10 * EXACT
    assert {tensor.dtype for tensor in after.parameters()} == {torch.float32}


def test_a_second_run_finds_its_own_result_and_goes_on_from_it() -> None:
    data = example(models.Residual, 64)
    program = models.captured(models.Residual)
    once = prune().apply(program, plan_of(prune(), program, data))
    checked = check_pass(prune(), once, data[:2], data=[data], idempotent=False)
    assert len(list(checked.after.parameters())) == len(list(program.parameters()))


@settings(max_examples=6, deadline=None)
@given(STEPS, st.integers(0, 2**16))
def test_random_networks_come_out_no_worse_than_plain(steps: list[Step], seed: int) -> None:
    data = torch.randn(24, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    program = capture(Network(steps, seed).double(), (data[:2],))
    pass_, ctx = prune(criterion="random"), Context(original=program).with_data(TensorSamples((data,)))
    assert ctx.held_out is not None
    plan = pass_.plan(program, ctx)
    after = pass_.apply(program, plan)
    plain = pass_.apply(program, dataclasses.replace(plan, tensors={}))
    (judged,) = ctx.held_out.batches(len(data))
    errors = [measure(program, found.call_flat, judged).sqnr for found in (after, plain)]
    assert errors[0] >= errors[1] - 1e-9
    pass_.prove(program, after, plan)

"""Targets, overrides, rounds and the guard: how much goes of what, and that it is said."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.errors import PassError, UsageError, VerifyError
from graphopt.ir.graph import tensor_attribute
from graphopt.ir.program import Program
from graphopt.measure.bench import Spread
from graphopt.measure.cost import cost
from graphopt.passes.prune import Prune, PruneOptions, PruningPlan
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import build
from graphopt.pipeline.pipeline import Pipeline
from graphopt.quantization.formats import IntegerFormat
from graphopt.targets.description import TargetDescription
from graphopt.testing import TensorSamples, check_pass, fingerprint
from tests import models
from tests.models import example

INT8 = IntegerFormat(8)
TARGET = TargetDescription(name="here", opset=20, activation=INT8, weight=INT8)


class Stack(nn.Module):
    """Three blocks of unequal cost; weights of random magnitudes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3, 2), nn.Conv2d(24, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x).relu()).relu()).relu().mean((2, 3)))


IMAGE = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
SIZES = {"a:channels": 16, "b:channels": 24, "c:channels": 32}
_PROGRAMS: list[Program] = []


def stack() -> Program:
    if not _PROGRAMS:
        _PROGRAMS.append(capture(Stack(), (IMAGE,)))
    return _PROGRAMS[0]


def prune(**options: Any) -> Prune:
    return Prune(build("prune", PruneOptions, {"round_to": 1, "min_channels": 1, **options}))


def plan_of(pass_: Prune, program: Program | None = None, **context: Any) -> PruningPlan:
    program = program or stack()
    return pass_.plan(program, Context(original=program, **context))


def left(plan: PruningPlan, program: Program | None = None) -> dict[str, float]:
    """Return the shares of the original that a plan leaves."""
    program = program or stack()
    now, before = cost(prune().apply(program, plan)), cost(program)
    return {name: getattr(now, name) / getattr(before, name) for name in ("parameters", "flops", "bytes")}


def reasons(plan: PruningPlan) -> dict[str, str]:
    return {refusal.site: refusal.reason for refusal in plan.refusals}


def counts(plan: PruningPlan) -> dict[str, int]:
    return {name: len(plan.groups.get(name, range(size))) for name, size in SIZES.items()}


# -- targets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("name", ["parameters", "flops", "bytes"])
def test_a_target_is_met_and_not_by_far(name: str, scope: str) -> None:
    plan = plan_of(prune(**{name: 0.5, "scope": scope}))
    share = left(plan)[name]
    assert 0.46 < share <= 0.5  # a step of one index of the widest group is under 4 %
    assert plan.measured[f"{name} left"] == pytest.approx(share)


@pytest.mark.parametrize("name", ["parameters", "flops", "bytes"])
def test_an_amount_is_what_its_share_is(name: str) -> None:
    whole = getattr(cost(stack()), name)
    by_amount, by_share = plan_of(prune(**{name: whole // 2})), plan_of(prune(**{name: whole // 2 / whole}))
    assert by_amount.groups == by_share.groups
    assert left(by_amount)[name] * whole <= whole // 2
    assert plan_of(prune(**{name: 2 * whole})).groups == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flops=1", "`flops` is a share of the original's, below 1, or a whole number above it"),
        ("bytes=10.5", "`bytes` is a share of the original's, below 1, or a whole number above it"),
        ("flops=0", "input should be greater than 0"),
        ("latency=3", "input should be less than 1"),
        ("ratio=0.5:bytes=5000", "`ratio` says how much goes and `bytes` how much stays"),
    ],
)
def test_limits_that_are_none(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Pipeline.parse(f"prune:{text}")


@settings(max_examples=6, deadline=None)
@given(st.floats(0.1, 0.95), st.sampled_from([1, 4, 8]), st.sampled_from(["local", "global"]))
def test_no_target_is_exceeded_and_the_last_step_was_needed(share: float, round_to: int, scope: str) -> None:
    pass_ = prune(flops=share, round_to=round_to, scope=scope)
    if left(plan_of(prune(ratio=0.999, round_to=round_to)))["flops"] > share:
        with pytest.raises(PassError, match="cannot meet `flops="):
            plan_of(pass_)
        return
    plan = plan_of(pass_)
    assert left(plan)["flops"] <= share
    assert all(len(kept) % round_to == 0 for kept in plan.groups.values())
    with_one_step_less = []
    for name, kept in plan.groups.items():
        more = min(len(kept) + round_to, SIZES[name])
        with_one_step_less.append(left(_with_counts({**counts(plan), name: more}))["flops"])
    assert max(with_one_step_less, default=1.0) > share


def _with_counts(wanted: dict[str, int]) -> PruningPlan:
    """Return a plan that keeps given counts."""
    ratios = tuple(f"{(SIZES[name] - count) / SIZES[name] + 1e-9}@{name}" for name, count in wanted.items())
    plan = plan_of(prune(ratios=ratios))
    assert counts(plan) == wanted
    return plan


@pytest.mark.parametrize("options", [{"ratio": 0.29}, {"parameters": 0.71}, {"ratio": 0.29, "steps": 3}])
def test_shares_are_taken_as_they_are_written(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 100, bias=False), nn.ReLU(), nn.Linear(100, 4, bias=False))
    plan = plan_of(prune(**options), capture(model, (torch.randn(2, 4),)))
    assert [len(kept) for kept in plan.groups.values()] == [71]  # 0.29 * 100 is 28.999999999999996


def test_two_targets_are_both_met() -> None:
    shares = left(plan_of(prune(parameters=0.4, flops=0.8)))
    assert shares["parameters"] <= 0.4
    assert shares["flops"] <= 0.8


def test_a_target_is_of_the_original_and_a_second_run_finds_it_met() -> None:
    checked = check_pass(prune(flops=0.6, criterion="l1"), Stack(), IMAGE)
    again = prune(flops=0.6).plan(checked.after, Context(original=checked.before))
    assert again.sites == ()
    assert "the target is met with all" in reasons(again)["a:channels"]


def test_a_target_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(PassError) as info:
        plan_of(prune(flops=0.3, round_to=16))
    text = str(info.value)
    assert text.startswith("Pass `prune` cannot meet `flops=0.3`: with as much removed of 3 groups ")
    possible = float(text.split("allow, ")[1].split("%")[0]) / 100
    assert left(plan_of(prune(flops=possible + 0.001, round_to=16)))["flops"] <= possible + 0.001


@pytest.mark.parametrize("steps", [1, 2])
def test_a_target_given_as_an_amount_is_answered_in_amounts(steps: int) -> None:
    with pytest.raises(PassError) as info:
        plan_of(prune(bytes=2500, round_to=16, steps=steps))
    text = str(info.value)
    assert text.startswith("Pass `prune` cannot meet `bytes=2500`: with as much removed of 3 groups ")
    assert "%" not in text
    possible = int(text.split("allow, ")[1].split(" bytes are left")[0])
    plan_of(prune(bytes=possible, round_to=16))
    with pytest.raises(PassError):
        plan_of(prune(bytes=possible - 1, round_to=16))


def test_a_target_on_a_model_with_nothing_to_remove_says_so() -> None:
    program = capture(models.NeighbourGate().double(), (example(models.NeighbourGate),))
    with pytest.raises(PassError, match=r"no group of this model may lose an index, which leaves 100\.0%"):
        plan_of(prune(parameters=0.5), program)


def test_a_ratio_beside_a_target_is_refused() -> None:
    with pytest.raises(UsageError, match="`ratio` says how much goes and `flops` how much stays; give one of them"):
        prune(ratio=0.5, flops=0.5)


# -- measured --------------------------------------------------------------------------------------------


def timer(seconds: Callable[[Program], float]) -> dict[str, Any]:
    """Return what a context needs to measure times that are computed instead."""

    def ratio(program: Program, reference: Program) -> Spread:
        return Spread.of([seconds(program) / seconds(reference)])

    return {"targets": (TARGET,), "target": TARGET, "timers": {TARGET.name: ratio}}


def _flops(program: Program) -> float:
    return float(cost(program).flops)


def test_a_latency_target_is_met_as_measured_and_replays_without_measuring() -> None:
    pass_ = prune(latency=0.5)
    assert pass_.reads_target
    plan = plan_of(pass_, **timer(_flops))
    assert 0.46 < left(plan)["flops"] <= 0.5
    assert plan.measured["latency left"] == pytest.approx(left(plan)["flops"])
    assert plan.measured["latency left"] in plan.measured["latencies tried"]  # type: ignore[operator]
    stored = PruningPlan.from_json(json.loads(json.dumps(plan.to_json())), plan.tensors)
    assert fingerprint(pass_.apply(stack(), stored)) == fingerprint(pass_.apply(stack(), plan))


@pytest.mark.parametrize("options", [{"steps": 2}, {"guard": "measure"}])
def test_the_latencies_of_every_search_are_recorded(options: dict[str, Any]) -> None:
    taken: list[float] = []

    def slow_unless_whole(program: Program) -> float:
        taken.append(_slow_unless_whole(program))
        return taken[-1]

    plan = plan_of(prune(latency=0.6, **options), **timer(slow_unless_whole))
    compared = [time / whole for time, whole in zip(taken[::2], taken[1::2], strict=True)]
    guarded = [times[1] for times in plan.measured.get("time of all", {}).values()]  # type: ignore[union-attr, index]
    assert sorted([*plan.measured["latencies tried"], *guarded]) == sorted(compared)  # type: ignore[misc]


@pytest.mark.parametrize("options", [{"latency": 0.5}, {"guard": "measure"}])
def test_measuring_needs_a_runtime(options: dict[str, Any]) -> None:
    with pytest.raises(PassError, match="is to decide by measured latency, and `here` is not timed on this machine"):
        plan_of(prune(**options), targets=(TARGET,), target=TARGET)


def test_only_what_is_measured_reads_the_target() -> None:
    assert not prune(flops=0.5).reads_target
    pipeline = Pipeline.parse("prune:ratio=0.5,prune:latency=0.5,int8")
    assert pipeline.fork() == 1


def _slow_unless_whole(program: Program) -> float:
    """A runtime with a kernel for 24 channels that it does not have for fewer."""
    whole = tensor_attribute(program.graph_module, "b.weight").shape[0] == SIZES["b:channels"]
    return _flops(program) * (1 if whole else 3)


def test_the_guard_leaves_whole_what_does_not_pay() -> None:
    plan = plan_of(prune(ratio=0.25, guard="measure"), **timer(_slow_unless_whole))
    assert counts(plan) == {"a:channels": 12, "b:channels": 24, "c:channels": 24}
    assert reasons(plan)["b:channels"].startswith("does not pay in the runtime: 18 of 24 take ")
    times = plan.measured["time of all"]
    assert times["b:channels"][1] > 1 > times["all"][1]  # type: ignore[index, call-overload]


def test_what_does_not_pay_is_made_up_for_by_the_rest() -> None:
    plan = plan_of(prune(flops=0.6, guard="measure"), **timer(_slow_unless_whole))
    assert counts(plan)["b:channels"] == 24
    assert left(plan)["flops"] <= 0.6


def test_the_guard_removes_nothing_where_nothing_is_faster() -> None:
    plan = plan_of(prune(ratio=0.25, guard="measure"), **timer(lambda program: 1 / _flops(program)))
    assert plan.sites == ()
    assert set(reasons(plan)) >= set(SIZES)


def test_groups_that_are_alike_are_timed_together() -> None:
    class Twins(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Conv2d(32, 8, 1), nn.ReLU(), nn.Conv2d(8, 32, 1)) for _ in range(3)
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.c(self.b(self.a(x).relu()).relu())
            for block in self.blocks:
                x = x + block(x)
            return self.head(x.mean((2, 3)))

    asked: list[Program] = []

    def noted(program: Program) -> float:
        asked.append(program)
        return _flops(program)

    plan = plan_of(prune(ratio=0.5, guard="measure"), capture(Twins(), (IMAGE,)), **timer(noted))
    assert len(plan.groups) == 6
    assert sorted(plan.measured["time of all"]) == [  # type: ignore[arg-type]
        "a:channels",
        "all",
        "b:channels",
        "blocks.0.0:channels",
        "c:width",
    ]
    assert len(asked) == 2 * 5


# -- overrides -------------------------------------------------------------------------------------------


def test_overrides_by_glob_go_before_the_ratio() -> None:
    plan = plan_of(prune(ratio=0.5, ratios=("0.25@a", "0@c:*")))
    assert counts(plan) == {"a:channels": 12, "b:channels": 12, "c:channels": 32}
    assert reasons(plan)["c:channels"] == "ratios=0@c:*"


def test_overrides_stay_out_of_a_target_and_of_a_global_ranking() -> None:
    plan = plan_of(prune(flops=0.5, scope="global", ratios=("0.125@c",)))
    assert counts(plan)["c:channels"] == 28
    assert left(plan)["flops"] <= 0.5


@pytest.mark.parametrize("steps", [1, 3])
def test_overrides_that_alone_go_below_the_target_are_named(steps: int) -> None:
    plan = plan_of(prune(flops=0.9, parameters=0.99, ratios=("0.75@b",), steps=steps))
    shares = left(plan)
    assert counts(plan) == {**SIZES, "b:channels": 6}
    assert reasons(plan)["ratios"] == (
        f"the overrides alone leave {shares['parameters']:.1%} of the parameters (parameters=0.99 asked) and "
        f"{shares['flops']:.1%} of the FLOPs (flops=0.9 asked); nothing else is removed"
    )
    assert "overrides alone go below the target" in plan.summary()


@pytest.mark.parametrize("ratios", [("0.125@c",), ("0@b",), ()])
def test_overrides_that_leave_something_to_do_are_not_named(ratios: tuple[str, ...]) -> None:
    assert "ratios" not in reasons(plan_of(prune(flops=0.7, ratios=ratios)))


def test_overrides_survive_pipeline_text_and_toml(tmp_path: Path) -> None:
    text = "prune:flops=0.5:ratios=0.5@layer1.0.conv1:channels+0@layer2.*:skip=head"
    pipeline = Pipeline.parse(text)
    assert pipeline.steps[0].instance.options.ratios == ("0.5@layer1.0.conv1:channels", "0@layer2.*")
    assert pipeline.text == text
    (tmp_path / "p.toml").write_text(pipeline.to_toml())
    assert Pipeline.from_toml(tmp_path / "p.toml").text == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": ("0.5@d.*",)}, r"`ratios=0.5@d\.\*` matches no group.*There are: a:channels, b:channels, c:ch"),
        ({"ratios": ("0.5@a", "0.25@*")}, r"`ratios=0.5@a` and `ratios=0.25@\*` give `a:channels` different ratios"),
        ({"ratios": ("0.5@a",), "skip": ("a*",)}, r"`ratios=0.5@a` and `skip=a\*` give `a:channels` different ratios"),
        ({"ratios": ("1.5@a",)}, "`1.5@a` in `ratios` is no ratio@glob"),
        ({"ratios": ("a=0.5",)}, "`a=0.5` in `ratios` is no ratio@glob"),
        ({"ratios": ("0.5@",)}, "`0.5@` in `ratios` is no ratio@glob"),
    ],
)
def test_overrides_that_say_nothing_or_two_things_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_of(prune(**options))


def test_the_same_ratio_twice_is_no_conflict() -> None:
    assert counts(plan_of(prune(ratio=0, ratios=("0.5@a", "0.5@a*"))))["a:channels"] == 8


# -- alignment -------------------------------------------------------------------------------------------


def test_the_targets_alignment_is_one_of_widths() -> None:
    program = capture(models.FusedAttention(width=64, heads=4).double(), (example(models.FusedAttention),))
    target = dataclasses.replace(TARGET, channel_multiple=16)
    pass_ = Prune(PruneOptions(ratio=0.5))
    plan = pass_.plan(program, Context(original=program, targets=(target,)))
    assert {name: len(kept) for name, kept in plan.groups.items()} == {"embed:width": 32, "qkv:heads": 2}
    assert reasons(plan)["qkv:head_dim"] == "removing 50% of 16 leaves all of them after rounding to 16"


def test_a_count_that_the_minimum_raised_is_said() -> None:
    plan = plan_of(prune(ratio=0.99, min_channels=4))
    assert counts(plan) == dict.fromkeys(SIZES, 4)
    assert reasons(plan)["a:channels"] == "keeps 4 of 16, not 1: minimum is 4"


# -- rounds ----------------------------------------------------------------------------------------------


class Line(nn.Module):
    """Seven units whose weights lie on a line, the fourth in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 7, bias=False), nn.Linear(7, 1, bias=False)
        with torch.no_grad():
            self.first.weight.zero_()
            self.first.weight[:, 0] = torch.tensor([-10, -9, -2, 0, 1, 1.1, 12])
            self.second.weight.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def test_what_is_left_is_ranked_anew_in_every_round() -> None:
    program = capture(Line(), (torch.zeros(2, 2),))
    once, thrice = (
        plan_of(prune(criterion="fpgm", ratio=0.43, steps=steps), program).groups["first:hidden"] for steps in (1, 3)
    )
    assert once == [0, 1, 2, 6]  # the three nearest the median of all
    assert thrice == [0, 1, 5, 6]  # without the first two the median is elsewhere


@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"flops": 0.5}, {"ratio": 0.5, "scope": "global"}])
def test_rounds_make_one_plan_about_the_original(options: dict[str, Any]) -> None:
    data = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    pass_ = prune(**options, steps=3, criterion="taylor", samples=64)
    checked = check_pass(pass_, Stack(), IMAGE, data=[data], idempotent=False)
    assert isinstance(checked.plan, PruningPlan)
    assert checked.plan.compensated
    pass_.prove(checked.before, checked.after, checked.plan)
    if "flops" in options:
        assert left(checked.plan)["flops"] <= 0.5
    elif "scope" not in options:
        assert counts(checked.plan) == {name: size // 2 for name, size in SIZES.items()}


# -- proof -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compensate", [False, True])
def test_the_proof_looks_at_what_is_stored(compensate: bool) -> None:
    data = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    pass_ = prune(ratio=0.5, compensate=compensate)
    plan = pass_.plan(stack(), Context(original=stack()).with_data(TensorSamples((data,))))
    assert bool(plan.tensors) == compensate
    pass_.prove(stack(), pass_.apply(stack(), plan), plan)
    for name in ("a.bias", "head.weight"):  # the one is never refitted, the other is with data
        after = pass_.apply(stack(), plan)
        with torch.no_grad():
            changed = tensor_attribute(after.graph_module, name).clone()
            changed.view(-1)[0] += 1
        after.graph_module.get_submodule(name.split(".")[0])._parameters[name.split(".")[1]] = nn.Parameter(changed)
        with pytest.raises(VerifyError, match=f"`{name}`"):
            pass_.prove(stack(), after, plan)

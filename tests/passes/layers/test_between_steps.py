"""Recovery between the steps of `prune` and `sparsify`: each step trains, and what goes next goes from what was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from graphopt.capturing.capture import capture
from graphopt.errors import DataError, PassError, UsageError
from graphopt.ir.program import Program
from graphopt.passes.layers.between_steps import recovered
from graphopt.passes.prune import Prune, PruningPlan
from graphopt.pipeline.context import Context
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.runner import Rewritten, run
from graphopt.testing import TensorSamples, fingerprint
from tests.graphopt.distillation.models import ResidualNet, settled
from tests.graphopt.distillation.small_lesson import Kept

X = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PRUNE = "prune:ratio=0.6:round_to=1:compensate=no"


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return capture(settled(ResidualNet(), X), X[:2])


def context(program: Program, **more: Any) -> Context:
    return Context(original=program, **more).with_data(TensorSamples((X,)))


def made(program: Program, text: str, **more: Any) -> Rewritten:
    return run(Pipeline.parse(text), program, context(program, **more))


@pytest.mark.parametrize("text", [f"{PRUNE}:steps=3:epochs=1", "sparsify:ratio=0.8:steps=3:epochs=1"])
def test_each_step_keeps_checkpoints_of_its_own(program: Program, text: str) -> None:
    alone, kept = made(program, text), Kept()
    first, again = (made(program, text, checkpoints=kept) for _ in range(2))
    assert {name.partition(": ")[0] for name in kept.held} == {"step 1", "step 2"}
    assert len({fingerprint(found.programs[""]) for found in (alone, first, again)}) == 1


def test_what_goes_last_goes_from_what_was_trained(program: Program) -> None:
    halfway = made(program, "prune:ratio=0.3:round_to=1:compensate=no")
    learned, plan = recovered(halfway.programs[""], 1, context(program), 1)
    assert plan.sites
    whole = made(program, f"{PRUNE}:steps=2:epochs=1")
    (_, before), (_, after) = halfway.plans[0], whole.plans[0]
    assert isinstance(before, PruningPlan)
    assert isinstance(after, PruningPlan)
    assert len(after.groups) > 2
    for name, kept in after.groups.items():
        assert set(kept) < set(before.groups[name])
    inner = "layer1.conv1:channels"
    places = [list(before.groups[inner]).index(index) for index in after.groups[inner]]
    named = "layer1.bn1.weight"
    trained = learned.graph_module.get_parameter(named)
    assert not torch.equal(trained, halfway.programs[""].graph_module.get_parameter(named))
    assert torch.equal(whole.programs[""].graph_module.get_parameter(named), trained[places])


def test_a_plan_with_training_in_it_is_one_removal(program: Program) -> None:
    outcome = made(program, "prune:parameters=0.5:round_to=1:steps=3:epochs=1")
    result, ((_, plan),) = outcome.programs[""], outcome.plans
    assert isinstance(plan, PruningPlan)
    again = Prune().apply(program, plan)
    assert fingerprint(again) == fingerprint(result)
    Prune().prove(program, again, plan)
    left = sum(tensor.numel() for tensor in result.graph_module.parameters())
    assert left <= 0.5 * sum(tensor.numel() for tensor in program.graph_module.parameters())
    assert list(plan.measured) >= ["recovery after step 1", "recovery after step 2"]


@pytest.mark.parametrize(
    ("options", "said"),
    [("epochs=2", "steps=1 has nothing in between"), ("steps=2:epochs=1:guard=measure", "guard=measure leaves groups")],
)
def test_training_in_between_that_cannot_be(options: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Pipeline.parse(f"prune:{options}")


def test_axes_that_cannot_be_told_apart_any_more_are_not_guessed() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 32, 3), nn.GroupNorm(2, 32), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=2), nn.ReLU()
    halves = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)).eval()
    text = "prune:ratio=0.75:steps=3:epochs=1:min_channels=1:round_to=1"
    with pytest.raises(PassError, match=r"an axis of `0:channels` has one index left.* \(min_channels=2\)"):
        made(capture(halves, X[:2]), text)


def test_steps_that_remove_nothing_before_the_last_say_so(program: Program) -> None:
    outcome = made(program, "prune:ratio=0.5:round_to=4:steps=2:epochs=1:compensate=no")
    ((_, plan),) = outcome.plans
    assert plan.notes == ("epochs=1: all that goes goes in the last step, so nothing was trained in between",)


def test_training_in_between_needs_data(program: Program) -> None:
    with pytest.raises(DataError, match="Pass `prune` needs data to recover on between steps"):
        run(Pipeline.parse(f"{PRUNE}:steps=2:epochs=1"), program, Context(original=program))

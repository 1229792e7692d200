"""distill_hooks: which values it taps, what it leaves alone, and that strip undoes insert."""

from __future__ import annotations

import pytest
import torch

from graphopt.capturing.capture import capture
from graphopt.distillation.taps import taps_of
from graphopt.errors import UsageError
from graphopt.ir.program import Program
from graphopt.passes.distill_hooks import DistillHooks, DistillHooksOptions
from graphopt.pipeline.context import Context
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.runner import run
from graphopt.testing import check_pass, fingerprint
from tests.graphopt.distillation.models import ResidualNet


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return capture(ResidualNet(), torch.randn(2, 3, 8, 8))


def hooks(*taps: str, **options: bool | int) -> DistillHooks:
    return DistillHooks(DistillHooksOptions(taps=taps or ("auto",), **options))  # type: ignore[arg-type]


def test_auto_taps_block_boundaries_and_keeps_the_contract(program: Program) -> None:
    checked = check_pass(hooks(), program, program.example_args)
    assert checked.plan.sites == ("layer1.relu:relu#1", "layer2.relu:relu#1")
    assert [tap.address for tap in taps_of(checked.after)] == list(checked.plan.sites)
    assert checked.plan.summary() == "matched 2, rewrote 2"


def test_addresses_and_auto_together(program: Program) -> None:
    checked = check_pass(hooks("auto", "stem:conv2d", "layer2"), program, program.example_args)
    assert set(checked.plan.sites) == {"stem:conv2d", "layer1.relu:relu#1", "layer2.relu:relu#1"}


def test_strip_undoes_insert_in_one_pipeline(program: Program) -> None:
    pipeline = Pipeline.parse([hooks("layer?"), DistillHooks(DistillHooksOptions(strip=True))])
    result = run(pipeline, program, Context(original=program)).programs[""]
    assert result is not program
    assert fingerprint(result) == fingerprint(program)
    assert result.outputs == program.outputs


def test_strip_of_some_keeps_the_rest(program: Program) -> None:
    tapped = hooks("layer1", "layer2").apply(program, hooks("layer1", "layer2").plan(program, Context(program)))
    checked = check_pass(hooks("layer2", "stem", strip=True), tapped, program.example_args)
    assert [tap.address for tap in taps_of(checked.after)] == ["layer1.relu:relu#1"]
    assert [(refusal.site, refusal.reason) for refusal in checked.plan.refusals] == [("stem:conv2d", "it is not a tap")]


def test_a_value_that_is_a_tap_already(program: Program) -> None:
    tapped = check_pass(hooks("layer1"), program, program.example_args).after
    plan = hooks("layer1", "layer2").plan(tapped, Context(original=program))
    assert plan.sites == ("layer2.relu:relu#1",)
    assert [(refusal.site, refusal.reason) for refusal in plan.refusals] == [
        ("layer1.relu:relu#1", "it is a tap already")
    ]


def test_auto_without_a_block_boundary_says_so() -> None:
    program = capture(torch.nn.Linear(3, 2), torch.randn(2, 3))
    plan = hooks().plan(program, Context(original=program))
    assert plan.sites == ()
    assert "no block boundary" in plan.refusals[0].reason


def test_an_unknown_address(program: Program) -> None:
    with pytest.raises(UsageError, match=r"Nothing in the program is at `layer9`. Nearest: `layer2`, `layer1`"):
        hooks("layer9").plan(program, Context(original=program))


def test_addresses_with_an_operator_round_trip_as_pipeline_text() -> None:
    text = "distill_hooks:taps=layer1.conv1:conv2d+layer1.relu:relu#1:limit=3"
    pipeline = Pipeline.parse(text)
    assert pipeline.steps[0].instance.options.taps == ("layer1.conv1:conv2d", "layer1.relu:relu#1")
    assert pipeline.text == text

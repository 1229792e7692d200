"""Running pipelines: contracts are executed, plans replay, targets fork, hooks see everything."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.capturing.capture import capture
from graphopt.errors import DataError, PassError, VerifyError
from graphopt.ir.program import Program
from graphopt.pipeline.context import Context
from graphopt.pipeline.hooks import Dump
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.plan import Plan, Refusal
from graphopt.pipeline.registry import PassRegistry
from graphopt.pipeline.runner import run
from graphopt.quantization.formats import IntegerFormat
from graphopt.targets.description import TargetDescription
from tests.graphopt.toy_passes import ExactLie, NeedsReady, Prepare, Random, SameObject, Scale, ScaleOptions

REGISTRY = PassRegistry([Scale, Random, Prepare, NeedsReady, ExactLie, SameObject])


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4))


def _target(name: str, **alignment: int) -> TargetDescription:
    signed = IntegerFormat(8, narrow=True)
    return TargetDescription(name, 20, signed, signed, **alignment)


def test_steps_run_in_order_and_leave_the_original_alone(program: Program) -> None:
    before = program.graph_module.get_parameter("0.weight").clone()
    outcome = run(
        Pipeline.parse([Scale(ScaleOptions(factor=0.5)), Scale(ScaleOptions(factor=2.0))]), program, Context(program)
    )
    (result,) = outcome.programs.values()
    torch.testing.assert_close(result.graph_module.get_parameter("0.weight"), before)
    torch.testing.assert_close(program.graph_module.get_parameter("0.weight"), before, rtol=0, atol=0)


def test_an_empty_plan_returns_the_program_itself(program: Program) -> None:
    names = ("0.weight", "2.weight")
    outcome = run(Pipeline.parse([Scale(ScaleOptions(skip=names))]), program, Context(program))
    assert outcome.programs[""] is program
    ((_, plan),) = outcome.plans
    assert plan.summary() == "matched 2, rewrote 0, left 2 (2 x in skip)"


def test_an_exact_pass_that_is_not(program: Program) -> None:
    pipeline = Pipeline.parse([ExactLie(ScaleOptions(factor=0.5))])
    with pytest.raises(VerifyError, match="`exact_lie` is exact to 1e-06, but changed the outputs by"):
        run(pipeline, program, Context(program))


def test_a_pass_must_not_return_what_it_was_given(program: Program) -> None:
    with pytest.raises(VerifyError, match=r"returned the program it was given. Work on `program.copy\(\)`"):
        run(Pipeline.parse([SameObject()]), program, Context(program))


def test_targets_fork_at_the_first_pass_that_reads_one(program: Program) -> None:
    ctx = Context(program, targets=(_target("one"), _target("two")))
    outcome = run(Pipeline.parse("scale:factor=0.5,needs_ready", REGISTRY), program, ctx)
    assert list(outcome.programs) == ["one", "two"]
    assert [(target, plan.pass_name) for target, plan in outcome.plans] == [
        ("", "scale"),
        ("", "prepare"),
        ("one", "needs_ready"),
        ("two", "needs_ready"),
    ]
    assert [plan.measured for target, plan in outcome.plans if target] == [{"target": "one"}, {"target": "two"}]


def test_a_pass_that_reads_the_target_says_so_without_one(program: Program) -> None:
    with pytest.raises(PassError, match=r"no target was given\. Try --target onnxruntime"):
        run(Pipeline.parse("needs_ready", REGISTRY), program, Context(program))


def test_alignments_of_several_targets_are_combined(program: Program) -> None:
    ctx = Context(
        program, targets=(_target("a", channel_multiple=4, rank_multiple=8), _target("b", channel_multiple=6))
    )
    assert (ctx.channel_multiple, ctx.rank_multiple) == (12, 8)


def test_missing_data_is_explained(program: Program) -> None:
    with pytest.raises(DataError, match=r"`int8` needs data to find ranges, and none was given\..*--data samples\.npz"):
        Context(program).need_samples("int8", "to find ranges")


def test_randomness_depends_on_seed_and_purpose_only(program: Program) -> None:
    def draw(seed: int, purpose: str) -> torch.Tensor:
        return torch.rand(3, generator=Context(program, seed=seed).generator(purpose))

    torch.testing.assert_close(draw(0, "a"), draw(0, "a"), rtol=0, atol=0)
    assert not torch.equal(draw(0, "a"), draw(0, "b"))
    assert not torch.equal(draw(0, "a"), draw(1, "a"))


def test_plans_are_data_and_replay(program: Program) -> None:
    instance = Random()
    plan = instance.plan(program, Context(program, seed=3))
    stored = Plan.from_json(json.loads(json.dumps(plan.to_json())), plan.tensors)
    x = torch.randn(5, 4)
    torch.testing.assert_close(instance.apply(program, stored)(x), instance.apply(program, plan)(x), rtol=0, atol=0)
    assert stored.to_json() == plan.to_json()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kept": {}}, "`kept`: a field it does not know"),
        ({"sites": "abc"}, "`sites`: input should be a valid array"),
        ({"sites": [1]}, "`sites.0`: input should be a valid string"),
        ({"refusals": [{"site": "a"}]}, "`refusals.0.reason`: field required"),
        ({"tensors": {"a": [1.0]}}, "`tensors.a`"),
        ({"pass_name": None}, "`pass_name`"),
    ],
)
def test_a_stored_plan_of_another_form_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(PassError, match=f"does not fit this version of the pass: {re.escape(said)}"):
        Plan.from_json({"pass_name": "scale", **change}, {})


def test_a_plan_has_no_field_that_manifests_use() -> None:
    with pytest.raises(TypeError, match="has a field `target`, which manifests keep beside a plan"):

        @dataclass(frozen=True, kw_only=True)
        class Targeted(Plan):
            target: str = ""


def test_a_plan_holds_plain_data_only() -> None:
    plan = Plan(pass_name="x", measured={"bad": torch.ones(1)}, refusals=(Refusal("a", "b"),))  # type: ignore[dict-item]
    with pytest.raises(PassError, match="holds Tensor, which is not JSON data"):
        plan.to_json()


def test_hooks_see_every_step(program: Program, tmp_path: Path) -> None:
    run(
        Pipeline.parse("scale:factor=0.5,random", REGISTRY),
        program,
        Context(program),
        [Dump(tmp_path / "dump")],
    )
    assert [file.name for file in sorted((tmp_path / "dump").iterdir())] == ["001_scale.py", "002_random.py"]


def test_a_pass_must_not_fix_a_dynamic_axis(program: Program) -> None:
    class Fixes(Scale):
        """Use a symbolic size as a number."""

        name = "fixes"

        def plan(self, program: Program, ctx: Context) -> Plan:
            """Compare the batch with 2."""
            (placeholder,) = [node for node in program.graph.nodes if node.op == "placeholder"]
            assert int(placeholder.meta["val"].shape[0]) == 2
            return super().plan(program, ctx)

    with pytest.raises(VerifyError, match="`fixes` fixed the dynamic axis `batch` of input `input` to 2"):
        run(Pipeline.parse([Fixes(ScaleOptions(factor=0.5))]), program, Context(program))


def test_a_pass_that_finds_nothing_says_so() -> None:
    program = capture(nn.ReLU(), torch.randn(2, 4))
    ((_, plan),) = run(Pipeline.parse([Scale(ScaleOptions())]), program, Context(program)).plans
    assert plan.summary() == "matched 1, rewrote 0, left 1 (1 x there is nothing in it that the pass rewrites)"

"""qat: integers learn from the unoptimised program, in the graph that quantization made, which runs as before."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.errors import UsageError
from graphopt.ir.program import Program
from graphopt.passes.recover import Qat, QatOptions, RecoverPlan
from graphopt.pipeline.context import Context
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.runner import Rewritten, run
from graphopt.testing import TensorSamples, assert_same_program, check_pass
from tests.graphopt.distillation.models import ResidualNet, settled
from tests.passes.int8_models import WITHOUT_COSTS, Perceptron, folded, kernels, noise

INT2 = "int8:weight_bits=2"


@pytest.fixture(scope="module")
def samples() -> Tensor:
    return torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def teacher(samples: Tensor) -> Program:
    torch.manual_seed(0)
    model = settled(ResidualNet(), samples)
    nn.init.normal_(model.get_parameter("head.weight"))
    return capture(model, samples[:2])


def ran(passes: str, program: Program, samples: Tensor) -> Rewritten:
    targets = (WITHOUT_COSTS,)
    ctx = Context(original=program, targets=targets).with_data(TensorSamples((samples,)))
    return run(Pipeline.parse(passes), program, ctx)


def only(made: Rewritten) -> Program:
    return made.programs[WITHOUT_COSTS.name]


@pytest.fixture(scope="module")
def trained(teacher: Program, samples: Tensor) -> tuple[Program, Program, RecoverPlan]:
    """The program before and after, and the plan."""
    plain = only(ran(INT2, teacher, samples))
    made = ran(f"{INT2},qat:epochs=6:batch_size=16", teacher, samples)
    return plain, only(made), made.plans[-1][1]  # type: ignore[return-value]


def test_it_wins_back_most_of_what_rounding_lost(
    teacher: Program, trained: tuple[Program, Program, RecoverPlan]
) -> None:
    fresh = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = teacher(fresh)
        before, after = (float((program(fresh) - wanted).square().mean()) for program in trained[:2])
    assert after < before / 8
    assert trained[2].taps == {"layer1.relu:relu#1": "values", "layer2.relu:relu#1": "values"}


def test_the_graph_is_that_of_quantization_and_the_runtime_runs_it_on_the_same_kernels(
    trained: tuple[Program, Program, RecoverPlan], samples: Tensor, tmp_path: Path
) -> None:
    plain, result, plan = trained
    assert_same_program(result, plain, compare_tensors=False)
    assert [(node.name, node.target) for node in result.graph.nodes] == [
        (node.name, node.target) for node in plain.graph.nodes
    ]
    before, after = plain.state_dict(), result.state_dict()
    assert {name for name, one in before.items() if not torch.equal(one, after[name])} == set(plan.sites)
    assert {name: (one.dtype, one.shape) for name, one in before.items()} == {
        name: (one.dtype, one.shape) for name, one in after.items()
    }
    for name, folder in (("plain", plain), ("trained", result)):
        (tmp_path / name).mkdir()
        assert kernels(folder, tmp_path / name, samples[:16]) == kernels(plain, tmp_path / name, samples[:16])


def test_it_stands_behind_whatever_quantizes_and_int8_is_inserted_for_it_alone() -> None:
    names = [step.name for step in Pipeline.parse("prune,qat").steps]
    assert names == ["prune", "fold", "int8", "qat"]
    for passes in ("weights,qat", "weights,int8,qat", "codebook,qat"):
        assert [step.name for step in Pipeline.parse(passes).steps] == ["fold", *passes.split(",")]
    with pytest.raises(UsageError, match=r"Pass `qat` must come after `int8`. Write --passes weights,int8,qat\."):
        Pipeline.parse("weights,qat,int8")


def test_weights_start_from_those_before_they_were_rounded(teacher: Program, samples: Tensor) -> None:
    seen = []

    class Seeing(Qat):
        def plan(self, program: Program, ctx: Context) -> RecoverPlan:
            seen.append(ctx.floating)
            return super().plan(program, ctx)

    ctx = Context(original=teacher, targets=(WITHOUT_COSTS,)).with_data(TensorSamples((samples,)))
    run(Pipeline.parse(["fold", INT2, Seeing(QatOptions(epochs=0))]), teacher, ctx)
    assert "stem.weight" in seen[0].state_dict()
    assert not [name for name in seen[0].state_dict() if "bn" in name]  # folded
    assert ctx.floating is None


def test_refusals(teacher: Program, samples: Tensor) -> None:
    ctx = Context(original=teacher).with_data(TensorSamples((samples,)))
    plan = Qat().plan(teacher, ctx)
    assert plan.sites == ()
    assert [one.reason for one in plan.refusals] == ["nothing is stored as integers: recover trains floating weights"]


def test_the_contract_of_a_pass() -> None:
    data = noise(64, 8)
    program = folded(Perceptron(), data)
    stored = only(ran(INT2, program, data))
    check_pass(_Taught(program), stored, (data[:4],), data=[data], target=WITHOUT_COSTS, idempotent=False)


class _Taught(Qat):
    def __init__(self, original: Program) -> None:
        super().__init__(QatOptions(epochs=1, batch_size=16))
        self._original = original

    def plan(self, program: Program, ctx: Context) -> RecoverPlan:
        return super().plan(program, dataclasses.replace(ctx, original=self._original))

"""The helpers that pass tests stand on must themselves notice a pass that lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.capturing.capture import capture
from graphopt.errors import VerifyError
from graphopt.ir.editor import Editor
from graphopt.ir.graph import tensor_attribute
from graphopt.ir.invariants import check_invariants
from graphopt.ir.program import Program
from graphopt.pipeline.pass_base import NoOptions, Pass
from graphopt.pipeline.plan import Plan, Refusal
from graphopt.testing import assert_same_program, check_pass, fingerprint, run_pass

aten = torch.ops.aten
EXAMPLE = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def halve(program: Program, name: str = "first.bias") -> Program:
    program = program.copy()
    editor = Editor(program.graph_module, "made")
    editor.put(name, tensor_attribute(program.graph_module, name) / 2, trainable=True)
    return program.with_graph(editor.finish())


def made_pass(
    apply: Callable[[Program, Plan], Program],
    *,
    sites: tuple[str, ...] = ("first",),
    plan: Callable[[Program], Plan] | None = None,
    tolerance: float | None = None,
    refusals: tuple[Refusal, ...] = (),
) -> Pass[NoOptions, Plan]:
    """Make a pass out of functions, so that each test states its one lie."""

    class Made(Pass[NoOptions, Plan]):
        name = "made"

        def plan(self, program: Program, ctx: Any) -> Plan:
            return self.new_plan(sites=sites, refusals=refusals) if plan is None else plan(program)

        def apply(self, program: Program, plan: Plan) -> Program:
            return apply(program, plan)

    Made.tolerance = tolerance
    return Made()


def test_an_honest_pass_is_accepted() -> None:
    checked = check_pass(made_pass(lambda program, plan: halve(program)), Tiny(), EXAMPLE, idempotent=False)
    assert checked.plan.sites == ("first",)
    assert fingerprint(checked.before) != fingerprint(checked.after)


def test_a_pass_that_does_nothing_is_accepted_when_it_says_so() -> None:
    check_pass(made_pass(lambda program, plan: program.copy(), sites=()), Tiny(), EXAMPLE)


def test_a_pass_that_writes_to_its_input_is_caught() -> None:
    def write(program: Program, plan: Plan) -> Program:
        tensor_attribute(program.graph_module, "first.bias").data.zero_()
        return program

    with pytest.raises(VerifyError, match="changed the program it was given"):
        check_pass(made_pass(write), Tiny(), EXAMPLE)


def test_a_pass_that_claims_a_rewrite_it_did_not_do_is_caught() -> None:
    with pytest.raises(VerifyError, match=r"lists \['first'\] as rewritten and changed nothing"):
        check_pass(made_pass(lambda program, plan: program.copy()), Tiny(), EXAMPLE)


def test_a_pass_that_hides_a_rewrite_is_caught() -> None:
    with pytest.raises(VerifyError, match="lists no site"):
        check_pass(made_pass(lambda program, plan: halve(program), sites=()), Tiny(), EXAMPLE)


def test_a_refusal_without_a_reason_is_caught() -> None:
    silent = made_pass(lambda program, plan: halve(program), refusals=(Refusal("second", " "),))
    with pytest.raises(VerifyError, match=r"\['second'\] alone without a reason"):
        check_pass(silent, Tiny(), EXAMPLE)


def test_an_exact_pass_that_is_not_exact_is_caught() -> None:
    with pytest.raises(VerifyError, match="claims 1e-06 and moved an output by"):
        check_pass(made_pass(lambda program, plan: halve(program), tolerance=1e-6), Tiny(), EXAMPLE)


def test_a_pass_that_never_settles_is_caught() -> None:
    with pytest.raises(VerifyError, match="to rewrite in its own result"):
        check_pass(made_pass(lambda program, plan: halve(program)), Tiny(), EXAMPLE)


def test_a_random_plan_is_caught() -> None:
    def plan(program: Program) -> Plan:
        return Plan(pass_name="made", sites=("first",), tensors={"noise": torch.rand(2)})

    with pytest.raises(VerifyError, match="computed other tensors for its plan"):
        check_pass(made_pass(lambda program, _: halve(program), plan=plan), Tiny(), EXAMPLE)


def test_an_apply_that_depends_on_more_than_its_arguments_is_caught() -> None:
    calls: list[int] = []

    def apply(program: Program, plan: Plan) -> Program:
        calls.append(1)
        return halve(program) if len(calls) == 1 else halve(halve(program))

    with pytest.raises(VerifyError, match="made other bytes of the same plan"):
        check_pass(made_pass(apply), Tiny(), EXAMPLE)


def test_a_node_without_its_value_is_caught() -> None:
    def apply(program: Program, plan: Plan) -> Program:
        program = halve(program)
        relu = next(node for node in program.graph.nodes if node.target == aten.relu.default)
        del relu.meta["val"]
        return program

    with pytest.raises(VerifyError, match=r"without meta\['val'\]"):
        check_pass(made_pass(apply), Tiny(), EXAMPLE)


def test_a_stale_value_is_caught() -> None:
    def apply(program: Program, plan: Plan) -> Program:
        program = halve(program)
        relu = next(node for node in program.graph.nodes if node.target == aten.relu.default)
        relu.meta["val"] = next(node for node in program.graph.nodes if node.op == "placeholder").meta["val"]
        return program

    with pytest.raises(VerifyError, match=r"but its meta\['val'\] says"):
        check_pass(made_pass(apply), Tiny(), EXAMPLE)


def test_a_parameter_that_is_not_finite_is_caught() -> None:
    def apply(program: Program, plan: Plan) -> Program:
        program = program.copy()
        editor = Editor(program.graph_module, "made")
        editor.put("first.bias", torch.full((5,), float("nan")), trainable=True)
        return program.with_graph(editor.finish())

    with pytest.raises(VerifyError, match="NaN"):
        check_pass(made_pass(apply), Tiny(), EXAMPLE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), complex(0, float("nan"))])
@pytest.mark.parametrize("trainable", [True, False])
def test_whatever_a_pass_stores_is_checked(value: complex, trainable: bool) -> None:
    """Scales, embeddings, buffers: the name says nothing."""

    def apply(program: Program, plan: Plan) -> Program:
        program = program.copy()
        editor = Editor(program.graph_module, "made")
        relu = next(node for node in program.graph.nodes if node.target == aten.relu.default)
        with editor.graph.inserting_before(relu):
            editor.put("scale", torch.full((5,), value), trainable=trainable)
            scale = editor.read("scale", like=relu)
            product = editor.call(aten.mul.Tensor, relu.args[0], scale, like=relu)
            real = editor.call(aten.abs.default, product, like=relu)
        relu.update_arg(0, real)
        return program.with_graph(editor.finish())

    with pytest.raises(VerifyError, match="`scale` holds NaN or infinite values"):
        check_pass(made_pass(apply), Tiny(), EXAMPLE)


def test_what_was_not_finite_before_is_not_the_fault_of_the_pass() -> None:
    model = Tiny()
    model.first.weight.data[0, 0] = float("inf")
    check_invariants(program := capture(model, EXAMPLE), halve(program), "halve")


def test_changed_tensors_are_told_from_kept_ones_by_what_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """`state_dict()` makes tensors whose identities are free for others the moment they die."""
    looked: list[torch.Tensor] = []
    monkeypatch.setattr("graphopt.ir.invariants.all_finite", lambda tensor: looked.append(tensor) or True)
    program = capture(Tiny(), EXAMPLE)
    check_invariants(program, program.copy(), "kept")
    assert not looked
    check_invariants(program, program.copy(share_tensors=False), "changed")
    assert len(looked) == len(list(program.parameters()))


def test_names_and_the_order_of_independent_calls_do_not_matter() -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            torch.sigmoid(features)
            return self.b(self.a(features).relu())

    assert_same_program(capture(Tiny(), EXAMPLE), capture(Renamed(), EXAMPLE))


def test_another_operator_is_a_difference() -> None:
    class Other(Tiny):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.sigmoid(self.first(x)))

    with pytest.raises(AssertionError, match=r"aten\.sigmoid"):
        assert_same_program(capture(Tiny(), EXAMPLE), capture(Other(), EXAMPLE))


def test_another_literal_is_a_difference() -> None:
    class Scaled(Tiny):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.factor

    with pytest.raises(AssertionError, match=r"other=3\.0"):
        assert_same_program(capture(Scaled(2.0), EXAMPLE), capture(Scaled(3.0), EXAMPLE))


def test_another_weight_is_a_difference_unless_asked_otherwise() -> None:
    one = capture(Tiny(), EXAMPLE)
    with pytest.raises(AssertionError, match=r"Tensor `first\.bias`"):
        assert_same_program(halve(one), one)
    assert_same_program(halve(one), one, compare_tensors=False)


def test_sharing_a_weight_is_a_difference() -> None:
    class Pair(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one = nn.Linear(6, 6, bias=False)
            self.two = nn.Linear(6, 6, bias=False)
            if tied:
                self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x))

    with pytest.raises(AssertionError, match="@1"):
        assert_same_program(capture(Pair(True), EXAMPLE), capture(Pair(False), EXAMPLE), compare_tensors=False)


def test_run_pass_captures_plans_and_applies() -> None:
    result = run_pass(made_pass(lambda program, plan: halve(program)), Tiny(), EXAMPLE)
    torch.testing.assert_close(result.state_dict()["first.bias"], Tiny().first.bias.detach() / 2)

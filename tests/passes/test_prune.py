"""prune: what goes, what stays and why, and that the rest computes what it did."""

from __future__ import annotations

import math
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
from graphopt.job.optimizing import optimize
from graphopt.passes.prune import Prune, PruneOptions, PruningPlan
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import build
from graphopt.quantization.formats import IntegerFormat
from graphopt.targets.description import TargetDescription
from graphopt.testing import assert_same_program, check_pass, run_pass
from tests import models
from tests.models import EXAMPLES, example

VECTOR = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Hidden(nn.Module):
    """One hidden layer whose row i has magnitude i + 1, in the order given."""

    def __init__(self, order: tuple[int, ...] = (3, 0, 5, 1, 4, 2), kept: tuple[int, ...] | None = None) -> None:
        super().__init__()
        chosen = range(len(order)) if kept is None else kept
        scale = torch.tensor([float(order[i] + 1) for i in chosen])
        self.first, self.second = nn.Linear(4, len(scale)), nn.Linear(len(scale), 3)
        pattern = torch.sin(torch.arange(12.0)).view(3, 4)
        with torch.no_grad():
            self.first.weight.copy_(scale[:, None] * pattern[0])
            self.first.bias.copy_(scale / 10)
            self.second.weight.copy_(pattern[:, :1] * scale)
            self.second.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def prune(**options: Any) -> Prune:
    return Prune(build("prune", PruneOptions, options))


def plan_of(pass_: Prune, model: nn.Module | Program, x: Tensor | None = None, **context: Any) -> PruningPlan:
    program = model if isinstance(model, Program) else capture(model, (example(model) if x is None else x,))
    return pass_.plan(program, Context(original=program, **context))


def reasons(plan: PruningPlan) -> dict[str, str]:
    return {refusal.site: refusal.reason for refusal in plan.refusals}


# -- given and expected ----------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_the_smallest_rows_go(criterion: str) -> None:
    found = run_pass(prune(ratio=0.5, criterion=criterion, round_to=1), Hidden(), VECTOR)
    assert_same_program(found, capture(Hidden(kept=(0, 2, 4)), (VECTOR,)))


def test_the_plan_says_which_positions_of_which_parameter_stay() -> None:
    plan = plan_of(prune(ratio=0.5, round_to=1), Hidden(), VECTOR)
    assert plan.sites == ("first:hidden",)
    assert plan.kept == {
        "first.weight": {0: [0, 2, 4]},
        "first.bias": {0: [0, 2, 4]},
        "second.weight": {1: [0, 2, 4]},
    }


def test_equal_scores_keep_the_lower_index() -> None:
    plan = plan_of(prune(ratio=0.5, round_to=1), Hidden(order=(1, 1, 1, 1, 1, 1)), VECTOR)
    assert plan.groups == {"first:hidden": [0, 1, 2]}


def test_random_is_drawn_from_the_seed_alone() -> None:
    pass_ = prune(criterion="random", ratio=0.5, round_to=1)
    plans = [plan_of(pass_, models.GroupedShuffle().double(), seed=seed).kept for seed in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


# -- how many --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"ratio": 0.0}, 6),
        ({"ratio": 0.3}, 5),
        ({"ratio": 0.34}, 4),
        ({"ratio": 0.99}, 2),
        ({"ratio": 0.99, "min_channels": 1}, 1),
        ({"ratio": 0.99, "min_channels": 5}, 5),
        ({"ratio": 0.5, "round_to": 2}, 4),
        ({"ratio": 0.5, "round_to": 4}, 4),
        ({"ratio": 0.5, "round_to": 5}, 5),
        ({"ratio": 0.5, "round_to": 8}, 6),
    ],
)
def test_the_kept_count_is_rounded_up_and_never_below_the_minimum(options: dict[str, Any], count: int) -> None:
    plan = plan_of(prune(**{"round_to": 1, **options}), Hidden(), VECTOR)
    assert len(plan.groups.get("first:hidden", range(6))) == count


def test_the_targets_alignment_is_the_default_rounding() -> None:
    whole = IntegerFormat(8)
    target = TargetDescription(name="four", opset=20, activation=whole, weight=whole, channel_multiple=4)
    plan = plan_of(prune(ratio=0.5), Hidden(), VECTOR, targets=(target,))
    assert len(plan.groups["first:hidden"]) == 4


class TwoWidths(nn.Module):
    """Two hidden layers; the second has two dead units, which a global ranking finds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        with torch.no_grad():
            for layer in (self.a, self.b, self.c):
                layer.weight.fill_(1.0)
            self.b.weight[:2] = 0.01
            self.c.weight[:, :2] = 0.01

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def test_a_global_ranking_takes_from_where_least_is_lost() -> None:
    plan = plan_of(prune(ratio=2 / 12, scope="global", round_to=1), TwoWidths(), VECTOR)
    assert plan.groups == {"b:hidden": [2, 3, 4, 5]}
    assert reasons(plan)["a:hidden"] == "all 6 score above the global threshold"


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "site", "reason"),
    [
        ({}, "first:hidden#2", "reaches graph input `x`"),
        ({}, "second:hidden", "reaches graph output `linear_1`"),
        ({"min_channels": 6}, "first:hidden", "6 left, minimum is 6"),
        ({"ratio": 0.1}, "first:hidden", "removing 10% of 6 leaves all of them after rounding to 1"),
        ({"skip": ("first*",)}, "first:hidden", "skip=first*"),
        ({"kinds": ("heads",)}, "first:hidden", "kind `hidden` is not in kinds"),
    ],
)
def test_what_is_left_alone_says_why(options: dict[str, Any], site: str, reason: str) -> None:
    assert reasons(plan_of(prune(**{"round_to": 1, **options}), Hidden(), VECTOR))[site] == reason


@pytest.mark.parametrize(("round_to", "noted"), [(4, True), (1, False)])
def test_what_rounding_leaves_of_a_ratio_is_said(round_to: int, noted: bool) -> None:
    plan = plan_of(prune(ratio=0.2, round_to=round_to), Hidden(), VECTOR)
    said = "ratio=0.2: 0% of the indices go, without rounding it were 17%: counts are rounded up to multiples of 4"
    assert [note.startswith(said) and "round_to=1" in note for note in plan.notes] == [True] * noted


@pytest.mark.parametrize(("round_to", "noted"), [(60, False), (61, True)])
def test_a_fifth_less_than_was_asked_is_said(round_to: int, noted: bool) -> None:
    """Half of 100 is asked for, and 40 or 39 go."""
    model = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 3))
    plan = plan_of(prune(ratio=0.5, round_to=round_to), model, torch.randn(2, 4))
    assert ["without rounding it were 50%" in note for note in plan.notes] == [True] * noted


def test_a_glob_that_matches_nothing_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"`skip=layer9\.\*` matches no group.*first:hidden"):
        plan_of(prune(skip=("layer9.*",)), Hidden(), VECTOR)


def test_skipping_what_stays_whole_anyway_is_no_error() -> None:
    plan = plan_of(prune(skip=("second",), round_to=1), Hidden(), VECTOR)
    assert list(plan.groups) == ["first:hidden"]
    assert "reaches graph output" in reasons(plan)["second:hidden"]


@pytest.mark.parametrize("options", [{"ratio": 1.5}, {"ratio": 1.0}, {"ratio": -0.1}, {"round_to": 0}, {"scope": "x"}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="Pass `prune` cannot take"):
        prune(**options)


def test_a_plan_for_another_program_is_refused() -> None:
    plan = plan_of(prune(ratio=0.5, round_to=1), Hidden(), VECTOR)
    with pytest.raises(PassError, match="which this program does not have"):
        prune().apply(models.captured(models.Residual), plan)
    with pytest.raises(PassError, match="has 4 indices"):
        prune().apply(capture(Hidden(order=(0, 1, 2, 3)), (VECTOR,)), plan)


# -- edges, invariants, meaning --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in EXAMPLES if k is not models.NeighbourGate], ids=lambda k: k.__name__)
def test_every_structure_keeps_the_contract_and_its_meaning(kind: type[nn.Module]) -> None:
    pass_ = prune(ratio=0.5, round_to=1, min_channels=1)
    checked = check_pass(pass_, models.captured(kind), example(kind), idempotent=False)
    assert isinstance(checked.plan, PruningPlan)
    assert sum(p.numel() for p in checked.after.parameters()) < sum(p.numel() for p in checked.before.parameters())
    pass_.prove(checked.before, checked.after, checked.plan)


def test_nothing_to_remove_is_said() -> None:
    checked = check_pass(prune(ratio=0.5), models.NeighbourGate().double(), example(models.NeighbourGate))
    assert checked.plan.sites == ()
    assert "spatial dimension at aten::conv1d" in reasons(checked.plan)["stem:channels"]  # type: ignore[arg-type]


class Integers(nn.Module):
    """Two products with integer matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first", torch.arange(16).view(4, 4))
        self.register_buffer("second", torch.arange(16).view(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.first) @ self.second  # type: ignore[operator]


def test_integer_weights_and_no_weights_are_named() -> None:
    plan = plan_of(prune(), Integers(), torch.ones(2, 4, dtype=torch.int64))
    assert plan.sites == ()
    assert set(reasons(plan).values()) == {"its weight holds int64; prune before quantizing"}
    plan = plan_of(prune(), nn.ReLU(), VECTOR)
    assert reasons(plan) == {"the program": "no weight of it produces or consumes an axis"}
    with pytest.raises(PassError, match=r"no group of this model may lose an index, which leaves 100\.0%"):
        plan_of(prune(bytes=0.5), Integers(), torch.ones(2, 4, dtype=torch.int64))


def test_a_quantized_program_is_left_whole_and_says_why() -> None:
    program = optimize(Hidden(), VECTOR.repeat(8, 1), "int8:guard=none", lower=False).program
    plan = plan_of(prune(), program)
    assert plan.sites == ()
    assert reasons(plan)["the program"].endswith("`first.weight_int8` holds integers, so prune before quantizing")


def test_a_hidden_value_that_is_also_an_output_is_left_whole() -> None:
    class Exposed(Hidden):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            hidden = self.first(x).relu()
            return self.second(hidden), hidden

    plan = plan_of(prune(ratio=0.5, round_to=1), Exposed(), VECTOR)
    assert plan.sites == ()
    assert reasons(plan)["first:hidden"] == "reaches graph output `relu`"


def test_a_wrong_removal_does_not_pass_the_proof() -> None:
    program = capture(Hidden().double(), (VECTOR.double(),))
    pass_ = prune(ratio=0.5, round_to=1)
    plan = pass_.plan(program, Context(original=program))
    after = pass_.apply(program, plan)
    swapped = tensor_attribute(after.graph_module, "second.weight")
    with torch.no_grad():
        swapped.copy_(swapped.flip(1))
    dishonest = {**plan.kept, "second.weight": {1: [1, 3, 5]}}
    object.__setattr__(plan, "kept", dishonest)
    with pytest.raises(VerifyError):
        pass_.prove(program, after, plan)


def test_the_original_and_its_weights_are_untouched() -> None:
    program = capture(Hidden(), (VECTOR,))
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    run_pass(prune(ratio=0.5, round_to=1), program, VECTOR)
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict().items())


@settings(max_examples=20, deadline=None)
@given(
    st.floats(0, 0.999), st.integers(1, 9), st.integers(1, 9), st.sampled_from(["local", "global"]), st.integers(0, 99)
)
def test_any_options_keep_counts_honest(ratio: float, round_to: int, least: int, scope: str, seed: int) -> None:
    pass_ = prune(ratio=ratio, round_to=round_to, min_channels=least, scope=scope, criterion="random")
    plan = plan_of(pass_, _shuffled(), seed=seed)
    sizes = {
        "stem:channels": 3,
        "stem:channels#2": 4,
        "grouped:channels": 4,
        "grouped:channels#2": 4,
        "right:channels": 12,
    }
    assert set(plan.groups) | set(reasons(plan)) >= set(sizes)
    for name, indices in plan.groups.items():
        assert len(indices) % round_to == 0
        assert least <= len(indices) < sizes[name]
        assert list(indices) == sorted(set(indices))
        if scope == "local":
            assert len(indices) >= sizes[name] - math.floor(ratio * sizes[name] + 1e-7)
    pruned = pass_.apply(_shuffled(), plan)
    assert pruned(example(models.GroupedShuffle, 3)).shape == (3, 5)


def _shuffled() -> Program:
    return models.captured(models.GroupedShuffle)

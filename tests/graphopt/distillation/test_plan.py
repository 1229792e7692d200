"""DistillPlan: TOML in, JSON out, and one sentence for what cannot be followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graphopt.distillation.plan import DistillPlan
from graphopt.errors import UsageError

TOML = """
temperature = 4
alpha = 0.7
epochs = 15
augment = ["flip", "cutmix"]

[[outputs]]
student = "logits"
loss = "dist"

[[teachers]]
weight = 2.0

[[pairs]]
student = "features.6"
teacher = "layer2"
loss = "my_losses:sharper"
channels = [0, 2]

[[pairs]]
student = "features.2"
teacher = "features.6"
by = "student"
"""


def test_a_file_and_its_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(TOML)
    plan = DistillPlan.of(str(tmp_path / "plan.toml"))
    assert (plan.temperature, plan.alpha, plan.epochs) == (4.0, 0.7, 15)
    assert [pair.by for pair in plan.pairs] == [0, "student"]
    assert DistillPlan.of(plan.to_json()) == plan


def test_what_the_defaults_need_no_labels_for_and_what_does() -> None:
    assert not DistillPlan().needs_labels
    assert not DistillPlan(alpha=1.0).needs_labels
    assert DistillPlan(alpha=0.7).needs_labels
    assert DistillPlan(label_loss="mse").needs_labels


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"alpha": 2}, "`alpha`: input should be less than or equal to 1."),
        ({"temperature": 0}, "`temperature`: input should be greater than 0."),
        ({"temperature": float("nan")}, "`temperature`: input should be a finite number."),
        ({"alfa": 0.5}, "`alfa`: a field it does not know. Known: temperature, alpha,"),
        ({"pairs": [{"student": "a", "teacher": "b", "adaptor": "none"}]}, "`pairs.0.adaptor`: a field it does not"),
        ({"pairs": [{"student": "a"}]}, "`pairs.0.teacher`: field required."),
        ({"pairs": [{"student": "a", "teacher": "b", "loss": "hint"}]}, "or a function of yours, `module:function`."),
        ({"epochs": 1.5}, "`epochs`: input should be a valid integer."),
        (
            {"augment": ["flop"]},
            "`augment.0`: input should be 'auto', 'flip', 'shift', 'mixup', 'cutmix' or 'adversarial'.",
        ),
    ],
)
def test_bad_values_are_one_sentence(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match="The distillation plan cannot be followed: ") as caught:
        DistillPlan.of(given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plan_is_no_list() -> None:
    with pytest.raises(UsageError, match="A distillation plan cannot be of type list"):
        DistillPlan.of([1])  # type: ignore[arg-type]


def test_files_that_are_no_plans_are_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("alpha = ")
    for name, said in (("broken.toml", "Invalid value"), ("missing.toml", "No such file")):
        with pytest.raises(UsageError, match=f"{name} is no distillation plan: {said}"):
            DistillPlan.of(tmp_path / name)

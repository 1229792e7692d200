"""Cost tables: what they say, and that nothing else is taken for one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from graphopt.errors import LoweringError
from graphopt.targets.costs import CostTable, KernelCost, Work, read_costs

COSTS = (KernelCost("conv2d", "static", 1, 1e-6, 2e-9, 3e-9), KernelCost("conv2d", "static", 8, 5e-6, 4e-9, 0))
TABLE = CostTable("here", "a processor", "a runtime 1.0", COSTS, like={"conv3d": "conv2d"})


def test_a_call_takes_its_share_of_everything() -> None:
    assert TABLE.seconds("conv2d", "static", Work(1000, 100)) == pytest.approx(1e-6 + 2e-6 + 3e-7)
    assert TABLE.batches == (1, 8)
    assert TABLE.seconds("conv2d", "static", Work(1000, 100), samples=8) == pytest.approx(5e-6 + 8 * 4e-6)


def test_what_was_not_measured_may_be_like_what_was() -> None:
    assert TABLE.seconds("conv3d", "static", Work(1000, 100)) == TABLE.seconds("conv2d", "static", Work(1000, 100))
    own = dataclasses.replace(TABLE, costs=(*COSTS, KernelCost("conv3d", "static", 1, 7e-6, 0, 0)))
    assert own.seconds("conv3d", "static", Work(1000, 100)) == 7e-6


@pytest.mark.parametrize(("kernel", "form"), [("conv2d", "float"), ("conv3d", "float"), ("conv1d", "static")])
def test_what_was_not_measured_is_not_known(kernel: str, form: str) -> None:
    assert TABLE.seconds(kernel, form, Work(1, 1)) is None  # type: ignore[arg-type]


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text(TABLE.to_json())
    assert read_costs(tmp_path / "costs.json") == TABLE


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("fixed", -1e-6, "fixed"), ("form", "ternary", "form"), ("element", "3e-9", "element"), ("threads", 1, "threads")],
)
def test_what_is_no_table_is_refused(tmp_path: Path, field: str, value: object, said: str) -> None:
    data = json.loads(TABLE.to_json())
    data["costs"][0][field] = value
    (tmp_path / "costs.json").write_text(json.dumps(data))
    with pytest.raises(LoweringError, match=rf"costs\.json is no table of costs: .*{said}"):
        read_costs(tmp_path / "costs.json")


def test_a_missing_table_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"cannot be read: .*none\.json"):
        read_costs(tmp_path / "none.json")

"""The environment for another torch holds what was tested together, but for torch."""

from __future__ import annotations

from pathlib import Path

from tools.test_with_torch import constraints_with

_CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def test_one_torch_and_everything_else_as_it_was() -> None:
    before = _CONSTRAINTS.read_text().splitlines()
    after = constraints_with("2.14.1", _CONSTRAINTS.read_text()).splitlines()
    assert set(after) - set(before) == {"torch==2.14.1"}
    assert {line.partition("==")[0] for line in set(before) - set(after)} == {"torch", "setuptools"}

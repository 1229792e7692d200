"""A save that is killed or finds the disk full leaves one result or the other; `tools/kill_runs.py` tries more."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch

import graphopt
from tools.kill_runs import Case, kill_at_moments, kill_at_steps, limit_files, small_model


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    place = tmp_path_factory.mktemp("runs")
    x = torch.randn(4, 3, 8, 8)
    graphopt.optimize(small_model(0), x, "", bench=False).save(place / "old")
    new = graphopt.optimize(small_model(1), x, "", None)
    new.save(place / "new")
    return Case(place, place / "old", place / "new", new.save)


@pytest.fixture(autouse=True)
def temporary_files_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is killed here from what others are writing."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_killed_at_a_step(case: Case) -> None:
    left = Counter(kill_at_steps(case, every=7))
    assert {*left} == {"old", "new", "none"}
    assert left.total() >= 12


def test_killed_at_any_moment(case: Case) -> None:
    left = Counter(kill_at_moments(case, 4, seed=0))
    assert left.total() == 4


def test_no_room_for_a_file(case: Case) -> None:
    """The largest is the `.pt2`, whose writer in torch ends the process if it is told."""
    sizes = sorted(path.stat().st_size for path in case.new.iterdir())
    too_small = [1000, *(size - 1 for size in sizes[-2:])]  # there is room for what is said of it
    assert [*limit_files(case, [*too_small, sizes[-1]])] == ["old", "old", "old", "new"]

"""What training computes, as events for TensorBoard, whose package is an extra."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import graphopt
from graphopt.distillation.loop import Schedule
from graphopt.errors import UsageError
from tests.graphopt.distillation.small_lesson import fit, student


class Writer:
    """Keeps what torch's writer would write."""

    def __init__(self, directory: str) -> None:
        self.written: dict[str, list[tuple[int, float]]] = {}
        Path(directory).mkdir()

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.written.setdefault(tag, []).append((step, value))

    def flush(self) -> None:
        pass


def test_losses_and_rates_are_written_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    logged = graphopt.TensorBoard(tmp_path / "runs")
    _, history = fit(student(), Schedule(3, 0.01), progress=logged)
    written: dict[str, Any] = logged._writer.written
    assert written["training/held-out loss"] == [*zip((4, 8, 12), history.losses[1:], strict=True)]
    assert [step for step, _ in written["training/loss"]] == [4, 8, 12]
    assert written["training/loss"][-1][1] < written["training/loss"][0][1]
    assert written["training/rate"][0][1] > written["training/rate"][-1][1] > 0
    with pytest.raises(UsageError, match="No events can be written to"):
        graphopt.TensorBoard(tmp_path / "runs")


def test_without_the_extra_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"pip install 'graphopt\[tensorboard\]'"):
        graphopt.TensorBoard(tmp_path)

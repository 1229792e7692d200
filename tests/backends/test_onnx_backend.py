"""A third runtime that reads ONNX is a description and a few methods, and its files have an ending of its own."""

from __future__ import annotations

import dataclasses
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
import torch

import graphopt
from graphopt import capture
from graphopt.backends.onnx_backend import OnnxBackend
from graphopt.backends.onnx_lowering.lowering import Style
from graphopt.backends.onnxruntime.description import DESCRIPTION
from graphopt.errors import LoweringError
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.job.contenders import open_contender
from graphopt.pipeline import registry
from graphopt.targets.backend import Artifact, Finding
from graphopt.targets.description import TargetDescription
from tests.models import Residual, example


class Third(OnnxBackend):
    """A runtime of which only the description and what it says of a file are its own."""

    name: ClassVar[str] = "third"
    suffix: ClassVar[str] = ".third"
    style: ClassVar[Style] = Style(opset=DESCRIPTION.opset)

    @property
    def description(self) -> TargetDescription:
        return dataclasses.replace(DESCRIPTION, name="third")

    def options(self, model: ir.Model) -> dict[str, Json]:
        return {"optimization": "basic"}

    def check(self, artifact: Artifact) -> list[Finding]:
        return [Finding("warning", "", "as slow as it looks")]

    def summary(self, artifact: Artifact) -> str:
        return f"{artifact.facts['operators']} operators"


class Picky(Third):
    """Refuses every file once it is written."""

    def accept(self, path: Path, model: ir.Model, program: Program) -> dict[str, Json]:
        assert path.is_file()
        raise LoweringError("no")


@pytest.fixture(scope="module")
def result() -> graphopt.Result:
    torch.manual_seed(0)
    return graphopt.optimize(Residual().eval(), example(Residual, 8).float(), "", Third(), bench=False)


def test_a_third_backend_delivers(result: graphopt.Result, tmp_path: Path) -> None:
    row = result.report.rows[-1]
    assert row.summary == f"{result.artifact.facts['operators']} operators"
    assert "third: as slow as it looks" in result.report.notes
    names = {path.name for path in result.save(tmp_path / "out")}
    assert {"third.third", "program.pt2", "run.py"} <= names
    assert "third.third" in (tmp_path / "out" / "run.py").read_text()


def test_what_it_opens_runs_as_what_it_lowered(result: graphopt.Result) -> None:
    opened = Third().open(result.artifact.path)
    assert (opened.inputs, opened.outputs) == (result.artifact.inputs, result.artifact.outputs)
    assert opened.session_options == result.artifact.session_options == {"optimization": "basic"}
    x = np.ones((3, 3, 8, 8), np.float32)
    np.testing.assert_array_equal(opened.session(threads=1)(x)[0], result.artifact.session(threads=1)(x)[0])


def test_a_refused_file_goes(tmp_path: Path) -> None:
    program = capture(Residual().eval(), example(Residual, 2).float())
    backend = Picky(external_data_above=100)
    with pytest.raises(LoweringError, match="no"):
        backend.lower(program, backend.path_in(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("raised", [KeyboardInterrupt, RuntimeError])
def test_a_file_that_was_not_accepted_goes(
    tmp_path: Path, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def accept(self: OnnxBackend, path: Path, *rest: object) -> dict[str, Json]:
        assert path.exists()
        raise raised

    monkeypatch.setattr(Third, "accept", accept)
    backend = Third(external_data_above=100)
    with pytest.raises(raised):
        backend.lower(capture(Residual().eval(), example(Residual, 2).float()), backend.path_in(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_ending_of_a_file_says_whose_it_is(result: graphopt.Result, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("first", f"{__name__}:Third", registry.BACKENDS),
        EntryPoint("second", f"{__name__}:Third", registry.BACKENDS),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == registry.BACKENDS else [])
    monkeypatch.setattr(EntryPoint, "load", lambda self: Third if self.name == "second" else Picky)
    path = result.artifact.path
    assert type(registry.backend_of(path, preferred="second")) is Third
    assert type(registry.backend_of(path, preferred="unknown")) is Picky
    assert registry.backend_of(path.with_suffix(".onnx"), preferred="first") is None
    opened = open_contender(path, data=None, trust=False, seed=0)
    assert isinstance(opened.loaded, Artifact)
    assert opened.inputs == result.artifact.inputs

"""What is given for a program that brings its own is refused, not ignored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt.capturing.capture import capture
from graphopt.capturing.load import load
from graphopt.data import InputSpec
from graphopt.errors import UsageError

X = torch.randn(4, 5)
SHAPES = {"input": {1: "width"}}
INPUT = InputSpec("input", (2, 5), torch.float32)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored") / "model.pt2"
    capture(nn.Linear(5, 3), X).save(path)
    return path


def test_axes_of_a_program_of_graphopts_are_settled(stored: Path) -> None:
    with pytest.raises(UsageError, match=r"model.pt2` is a program of graphopt's, whose axes are settled"):
        load(stored, dynamic_shapes=SHAPES)
    with pytest.raises(UsageError, match="the model is a program of graphopt's, whose axes are settled"):
        graphopt.optimize(load(stored), X, passes="", target=None, dynamic_shapes=SHAPES)


def test_shapes_beside_a_program_or_data_are_refused(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model.pt2` brings inputs of its own"):
        load(stored, inputs=[INPUT])
    module = tmp_path / "module.pt"
    torch.save(nn.Linear(5, 3), module)
    with pytest.raises(UsageError, match="the data brings inputs of its own"):
        load(module, data=X, inputs=[INPUT])

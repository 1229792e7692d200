"""Artifacts are verified at other sizes of every dynamic axis, as far as the program takes them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from graphopt import capture
from graphopt.backends.onnx_execution.other_sizes import other_sizes
from graphopt.backends.onnx_execution.session import PRECISE, SessionSettings
from graphopt.backends.onnx_execution.verification import verify
from graphopt.backends.onnx_lowering.lowering import Style, lower
from graphopt.backends.onnx_lowering.saving import save
from graphopt.errors import LoweringError
from graphopt.ir.program import Program

SETTINGS = SessionSettings(threads=1, config=PRECISE)
T = {"x": {1: Dim.DYNAMIC(min=3, max=64)}}


class Scaled(nn.Module):
    """Divides by a size, or by what it is in the example."""

    def __init__(self, fixed: bool = False) -> None:
        super().__init__()
        self.fixed = fixed

    def forward(self, x: Tensor) -> Tensor:
        return x / (8 if self.fixed else x.shape[1])


class Positions(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(x.shape[1]))


class Eighth(nn.Module):
    """Reads nothing of the eighth row, where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.tensor([7]))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.shape[1] + 0 * x.index_select(1, self.place)


class Together(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum(1), y.sum(1)


def written(program: Program, home: Path) -> Path:
    save(lower(program, Style(20)), home / "model.onnx")
    return home / "model.onnx"


def shapes(program: Program) -> list[list[list[tuple[int, ...]]]]:
    return [[[array.shape for array in arrays] for _, arrays in sized] for sized in other_sizes(program, None)]


def test_what_is_right_at_the_size_of_the_example_alone_is_found(tmp_path: Path) -> None:
    x = torch.randn(2, 8, 4)
    wrong = written(capture(Scaled(fixed=True), x, dynamic_shapes=T), tmp_path)
    with pytest.raises(LoweringError, match=r"where axis 1 of `x` has a size of 3\. .* with that axis of one size"):
        verify(wrong, capture(Scaled(), x, dynamic_shapes=T), None, SETTINGS)


def test_what_does_not_run_at_another_size_is_found(tmp_path: Path) -> None:
    x = torch.randn(2, 8, 4)
    wrong = written(capture(Eighth(), x, dynamic_shapes=T), tmp_path)
    with pytest.raises(
        LoweringError, match=r"fails on inputs x: 1x3x4.* The program runs where axis 1 of `x` has a size"
    ):
        verify(wrong, capture(Scaled(), x, dynamic_shapes=T), None, SETTINGS)


def test_a_size_that_the_program_does_not_take_is_none_to_verify_at(tmp_path: Path) -> None:
    program = capture(Positions(8), torch.randn(2, 8, 4), dynamic_shapes=T)
    assert verify(written(program, tmp_path), program, None, SETTINGS) < 1e-6


def test_sizes_lie_in_their_range_and_follow_each_other() -> None:
    n = Dim("n", min=3, max=9)
    program = capture(
        Together(), (torch.randn(2, 8), torch.randn(5, 16)), dynamic_shapes={"x": {1: n}, "y": {1: 2 * n}}
    )
    smaller, larger = shapes(program)
    assert smaller[0] == [(1, 3), (5, 6)]
    assert larger == [[(1, 9), (5, 18)]]


def test_the_batch_alone_is_no_other_axis() -> None:
    assert shapes(capture(Scaled(), torch.randn(2, 8, 4))) == []


def test_sizes_are_those_that_memory_has() -> None:
    program = capture(
        Together(), (torch.randn(2, 8), torch.randn(5, 16)), dynamic_shapes={"x": {1: "n"}, "y": {1: "m"}}
    )
    x, y = program.inputs
    odd = dataclasses.replace(x, shape=(2, "200000*n-1599992")), dataclasses.replace(y, shape=(5, f"{10**15}-m"))
    grown, shrunk = shapes(dataclasses.replace(program, inputs=odd))[1::2]
    assert [first for first, _ in grown] == [(2, 200008), (2, 400008), (2, 800008)]
    assert [second for _, second in shrunk] == [(5, size) for size in (15, 14, 12, 8, 0)]

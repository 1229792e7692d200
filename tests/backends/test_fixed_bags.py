"""Bags of a fixed size become an embedding and a reduction: exact, with any batch, on both runtimes."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from graphopt import capture
from graphopt.backends.onnx_lowering.lowering import Style, lower
from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.backends.tensorrt import TensorRTBackend, engine
from graphopt.ir.program import Program

ROUNDING = 1e-6  # sums of five float32 in another order, over the largest output

PADDED = np.array([[3, 3, 3, 3, 3], [3, 1, 3, 4, 0], [9, 8, 7, 6, 5]])  # the first bag has nothing but padding
CASES = [(mode, padding, False) for mode in ("sum", "mean", "max") for padding in (None, 3)]
CASES += [("sum", None, True), ("sum", 3, True)]


class Bag(nn.Module):
    """A bag and a layer behind it."""

    def __init__(self, mode: str, padding: int | None) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(10, 8, mode=mode, padding_idx=padding)
        nn.init.normal_(self.bag.weight)  # the row of the padding too, which must not count

    def forward(self, indices: Tensor, weights: Tensor | None = None) -> Tensor:
        found: Tensor = self.bag(indices, per_sample_weights=weights)
        return found


@functools.cache
def captured(mode: str, padding: int | None, weighted: bool) -> tuple[Bag, Program]:
    torch.manual_seed(0)
    model = Bag(mode, padding)
    example = (torch.randint(0, 10, (4, 5)), *([torch.rand(4, 5)] if weighted else []))
    return model, capture(model, example)


@pytest.mark.parametrize(("mode", "padding", "weighted"), CASES)
def test_equals_torch_at_every_batch(mode: str, padding: int | None, weighted: bool, tmp_path: Path) -> None:
    model, program = captured(mode, padding, weighted)
    backend = OnnxRuntimeBackend()
    artifact = backend.lower(program, tmp_path / "bag.onnx")
    assert backend.verify(artifact, program) < ROUNDING
    session = artifact.session()
    for rows in (PADDED, PADDED[:1], np.tile(PADDED, (3, 1))):
        weights = [np.random.default_rng(0).random(rows.shape, np.float32)] if weighted else []
        (found,) = session(rows, *weights)
        with torch.no_grad():
            expected = model(torch.from_numpy(rows), *map(torch.from_numpy, weights))
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=ROUNDING, atol=ROUNDING)
    kinds = {node.op_type for node in ir.load(tmp_path / "bag.onnx").graph.all_nodes()}
    assert not kinds & {"SequenceEmpty", "Loop", "SequenceInsert"}


@pytest.mark.skipif(not engine.available(), reason="the extra graphopt[tensorrt] is not installed")
@pytest.mark.parametrize(("mode", "padding", "weighted"), CASES)
def test_built_by_tensorrt(mode: str, padding: int | None, weighted: bool, tmp_path: Path) -> None:
    _, program = captured(mode, padding, weighted)
    backend = TensorRTBackend()
    artifact = backend.lower(program, tmp_path / "bag.onnx")
    assert str(artifact.facts["engine"]).startswith("built by tensorrt-rtx")
    assert backend.verify(artifact, program) < ROUNDING


def test_bags_of_different_sizes_stay_as_they_are() -> None:
    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(10, 8)

        def forward(self, indices: Tensor, offsets: Tensor) -> Tensor:
            found: Tensor = self.bag(indices, offsets)
            return found

    example = (torch.randint(0, 10, (6,)), torch.tensor([0, 2]))
    program = capture(Ragged(), example, dynamic_shapes={"indices": None, "offsets": None})
    kinds = {node.op_type for node in lower(program, Style(20)).graph.all_nodes()}
    assert "SequenceEmpty" in kinds

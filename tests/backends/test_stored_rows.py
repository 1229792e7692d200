"""Weights and tables stored as packed integers: exact in both runtimes, on the kernels that are meant for them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from graphopt import capture
from graphopt.backends.onnx_execution import verification
from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.backends.tensorrt import TensorRTBackend
from graphopt.errors import LoweringError
from graphopt.quantization.ops import pack

OPS = torch.ops.graphopt
ROWS = 24
MIDDLE, EACH, OTHER = "middle", "each", "other"  # zero points


class Rows(nn.Module):
    """A matrix of random integers that is read whole and by rows."""

    def __init__(self, columns: int, bits: int, block: int, low: int, zero_point: str) -> None:
        super().__init__()
        self.columns, self.bits, self.block, self.low = columns, bits, block, low
        shape = (ROWS, -(-columns // block))
        self.integers = nn.Buffer(self.stored(torch.randint(low, low + (1 << bits), (ROWS, columns))))
        self.scale = nn.Buffer(torch.rand(shape) + 0.1)
        self.each = zero_point == EACH
        zeros = torch.randint(low, low + (1 << bits), shape)
        one = torch.tensor(low + (1 << bits - 1) + (zero_point == OTHER))
        self.zero_point = nn.Buffer(self.stored(zeros) if self.each else one.to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.low < 0 else torch.uint8

    def stored(self, integers: Tensor) -> Tensor:
        return pack(integers, self.bits, self.low) if self.bits < 8 else integers.to(self.dtype)

    def unpacked(self, stored: Tensor, size: int) -> Tensor:
        return OPS.unpack(stored, size, self.bits, self.low) if self.bits < 8 else stored

    def forward(self, ids: Tensor | None = None) -> Tensor:
        def read(tensor: Tensor) -> Tensor:
            return tensor if ids is None else embedding(ids, tensor)

        integers, blocks = self.unpacked(read(self.integers), self.columns), self.scale.shape[1]
        zeros = self.unpacked(read(self.zero_point), blocks) if self.each else self.zero_point
        return OPS.dequantize(integers, read(self.scale), zeros, -1, self.block)


class Layers(nn.Module):
    """Products and reads of several matrices, each at once and in turn."""

    def __init__(self, *rows: Rows, reads: bool = True) -> None:
        super().__init__()
        self.rows, self.reads = nn.ModuleList(rows), reads
        self.bias = nn.Parameter(torch.randn(ROWS))

    def forward(self, x: Tensor, ids: Tensor) -> list[Tensor]:
        results = []
        for rows in self.rows:
            own, weight = x[..., : rows.columns], rows()
            results += [linear(own, weight, self.bias), linear(own[:, 0], weight)]
            results += [rows(ids)] if self.reads else []
        return [*results, linear(own[0, 0], weight)]


def lowered(backend: OnnxRuntimeBackend | TensorRTBackend, model: Layers, path: Path) -> Counter[str]:
    """Lower at a dynamic batch, verify from disk at several, and count the operators of the file."""
    columns = max(rows.columns for rows in model.rows)
    batch = {0: torch.export.Dim.DYNAMIC}
    inputs = torch.randn(2, 3, columns), torch.tensor([[1, 7], [ROWS - 1, 0]])
    program = capture(model.eval(), inputs, dynamic_shapes=(batch, batch))
    artifact = backend.lower(program, path)
    assert backend.verify(artifact, program) < 0.02  # int8 activations: 1 / 254 of the largest of a block each
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_kernels_of_onnxruntime(tmp_path: Path) -> None:
    """Every number of bits, whole and cut blocks, signed and not, and whole rows of one scale."""
    torch.manual_seed(0)
    forms = [
        (100, 4, 32, 0, EACH), (300, 4, 300, 0, EACH), (100, 8, 32, -128, EACH), (64, 2, 64, -2, MIDDLE),
    ]  # fmt: skip
    found = lowered(OnnxRuntimeBackend(), Layers(*(Rows(*form) for form in forms)), tmp_path / "ort.onnx")
    assert found["MatMulNBits"] == 2 * len(forms) + 1
    assert found["GatherBlockQuantized"] == len(forms)
    assert not {"MatMul", "Gemm", "BitShift", "Add"}.intersection(found)


def test_what_has_no_kernel_is_computed_all_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    forms = [(64, 4, 24, 0, OTHER), (64, 1, 32, 0, EACH), (33, 4, 16, -8, EACH)]
    found = lowered(OnnxRuntimeBackend(), Layers(*(Rows(*form) for form in forms)), tmp_path / "ort.onnx")
    assert found["MatMulNBits"] == 3  # with the last, whose rows end within a byte
    assert found["GatherBlockQuantized"] == 0


def test_a_table_and_the_product_tied_to_it_are_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lowered(OnnxRuntimeBackend(), Layers(Rows(64, 4, 32, 0, EACH)), tmp_path / "ort.onnx")
    stored = onnx.load(tmp_path / "ort.onnx").graph.initializer
    sizes = [int(np.prod(tensor.dims)) for tensor in stored if tensor.data_type == onnx.TensorProto.UINT8]
    assert sorted(sizes) == [ROWS, ROWS * 64 // 2]  # two zero points in a byte


def test_a_wrong_zero_point_is_found(tmp_path: Path) -> None:
    """One step of one block is far below what rounding activations explains, and above what digits do."""
    torch.manual_seed(0)
    model = Layers(Rows(64, 4, 32, 0, EACH))
    path, backend = tmp_path / "ort.onnx", OnnxRuntimeBackend()
    program = capture(model.eval(), (torch.randn(2, 3, 64), torch.tensor([[1, 7]])))
    artifact = backend.lower(program, path)
    stored = onnx.load(path)
    zeros = next(tensor for tensor in stored.graph.initializer if tensor.dims == [ROWS, 1])
    zeros.raw_data = bytes([zeros.raw_data[0] ^ 1]) + zeros.raw_data[1:]
    onnx.save(stored, path)
    with pytest.raises(LoweringError, match="computes something else"):
        backend.verify(artifact, program)


def test_more_than_rounding_explains_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    program = capture(Layers(Rows(64, 4, 32, 0, EACH)).eval(), (torch.randn(2, 3, 64), torch.tensor([[1, 7]])))
    backend = OnnxRuntimeBackend()
    artifact = backend.lower(program, tmp_path / "ort.onnx")
    monkeypatch.setattr(verification, "WORSE_THAN_TORCH", 0.05)
    with pytest.raises(LoweringError, match="rounds activations to int8"):
        backend.verify(artifact, program)


def test_kernels_of_tensorrt(tmp_path: Path) -> None:
    torch.manual_seed(0)
    forms = [(64, 4, 32, 0, MIDDLE), (64, 4, 16, -8, MIDDLE), (96, 4, 96, -8, MIDDLE), (64, 8, 32, -128, MIDDLE)]
    backend, path = TensorRTBackend(), tmp_path / "tensorrt.onnx"
    found = lowered(backend, Layers(*(Rows(*form) for form in forms), reads=False), path)
    assert found["DequantizeLinear"] == len(forms) + 1  # whole rows either way round, as products read them
    assert "BitShift" not in found
    types = Counter(tensor.data_type for tensor in onnx.load(path).graph.initializer)
    assert types[onnx.TensorProto.INT4] == 4
    assert types[onnx.TensorProto.INT8] == 1
    assert backend.check(backend.open(path)) == []


def test_tensorrt_refuses_what_it_has_no_kernel_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = capture(Layers(Rows(64, 4, 32, 0, EACH)).eval(), (torch.randn(2, 3, 64), torch.tensor([[1, 7]])))
    with pytest.raises(LoweringError, match="BitShift"):
        TensorRTBackend().lower(program, tmp_path / "tensorrt.onnx")

"""A program as an ONNX file: names, axes, what is left out, the same bytes, external data, refusals."""

from __future__ import annotations

import hashlib
import logging
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.onnx import OnnxExporterError

from graphopt import capture
from graphopt.backends.onnx_execution.session import OnnxSession, SessionSettings
from graphopt.backends.onnx_execution.verification import verify
from graphopt.backends.onnx_lowering.lowering import Style, lower
from graphopt.backends.onnx_lowering.saving import save
from graphopt.errors import LoweringError, UsageError
from graphopt.ir.program import Program
from graphopt.ir.torch_internals import onnx_exporter
from tests.backends.quantized import IntegerFeedForward
from tests.models import Residual

STYLE = Style(opset=20, global_pooling=True)


class Detector(nn.Module):
    """Several inputs, keyword and plain ones among them; nested outputs, one of them an input, one returned twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embed = nn.Conv2d(3, 4, 3), nn.Embedding(11, 4)

    def forward(self, image: Tensor, scale: float, *, tokens: Tensor) -> dict[str, object]:
        feature = self.conv(image) * scale
        words = self.embed(tokens)
        return {"image": image, "boxes": (feature, words), "again": words, "best": words.argmax(-1)}


class Leaky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x @ x.transpose(-1, -2))


def detector() -> Program:
    torch.manual_seed(0)
    return capture(
        Detector().eval(),
        (torch.randn(2, 3, 8, 8), 0.5),
        {"tokens": torch.randint(0, 11, (2, 5))},
        dynamic_shapes={"tokens": {1: torch.export.Dim("length")}},
    )


@pytest.fixture(scope="module")
def residual() -> Program:
    torch.manual_seed(0)
    return capture(Residual().eval(), torch.randn(2, 3, 8, 8))


@pytest.fixture(scope="module")
def lowered(residual: Program) -> ir.Model:
    return lower(residual, STYLE)


def test_signature_is_the_programs(tmp_path: Path) -> None:
    program = detector()
    model = lower(program, STYLE)
    for values, specs in ((model.graph.inputs, program.inputs), (model.graph.outputs, program.outputs)):
        assert [value.name for value in values] == [spec.name for spec in specs]
        assert [tuple(str(size) for size in value.shape) for value in values] == [
            tuple(map(str, spec.shape)) for spec in specs
        ]
    assert [spec.name for spec in program.inputs] == ["image", "tokens"]
    save(model, tmp_path / "model.onnx")
    assert verify(tmp_path / "model.onnx", program, None, SessionSettings()) < 1e-5
    session = OnnxSession(tmp_path / "model.onnx", SessionSettings())
    image, first, second, again, best = session(np.ones((5, 3, 8, 8), "float32"), np.ones((5, 9), "int64"))
    assert image.shape == (5, 3, 8, 8)
    assert first.shape == (5, 4, 6, 6)
    assert best.shape == (5, 9)
    np.testing.assert_array_equal(second, again)


def test_no_axis_keeps_the_exporters_symbol(lowered: ir.Model) -> None:
    symbols = {
        str(size) for value in _values(lowered) if value.shape for size in value.shape if not isinstance(size, int)
    }
    assert symbols == {"batch"}


def test_nothing_about_this_machine_is_in_the_file(lowered: ir.Model, tmp_path: Path) -> None:
    (file,) = save(lowered, tmp_path / "model.onnx")
    content = file.read_bytes()
    for leak in (b".py", b"stack_trace", b"pkg.", str(Path.home()).encode(), str(Path(__file__).parents[2]).encode()):
        assert leak not in content
    assert lowered.producer_name == "graphopt"


def test_nodes_say_which_module_they_come_from(lowered: ir.Model) -> None:
    convolutions = [node.name for node in lowered.graph if node.op_type == "Conv"]
    assert len(convolutions) == 3
    assert convolutions[-1] == "outer/Conv"
    assert not any(node.metadata_props for node in lowered.graph)  # their names say it
    names = [node.name for node in lowered.graph]
    assert len(set(names)) == len(names)


def test_spatial_mean_is_a_global_pool_and_batch_norm_is_folded(lowered: ir.Model) -> None:
    operators = [node.op_type for node in lowered.graph]
    assert operators == ["Conv", "Relu", "Conv", "Relu", "Conv", "Add", "GlobalAveragePool", "Squeeze", "Gemm"]


def test_same_bytes_each_time(tmp_path: Path) -> None:
    """In another process, too: `tests/e2e/test_same_bytes.py`."""
    torch.manual_seed(0)
    program = capture(IntegerFeedForward().eval(), torch.randn(2, 5, 32))
    for name in ("here.onnx", "again.onnx"):
        save(lower(program, Style(20)), tmp_path / name)
    assert _digest(tmp_path / "here.onnx") == _digest(tmp_path / "again.onnx")


def test_external_data_above_the_threshold(lowered: ir.Model, residual: Program, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    assert save(lowered, path, external_data_above=100) == (path, tmp_path / "model.onnx.data")
    assert path.stat().st_size < (tmp_path / "model.onnx.data").stat().st_size
    digests = [_digest(file) for file in sorted(tmp_path.iterdir())]
    verify(path, residual, None, SessionSettings())
    save(lowered, path, external_data_above=100)
    assert [_digest(file) for file in sorted(tmp_path.iterdir())] == digests
    assert save(lowered, path) == (path,)  # and the file that is no longer needed is gone
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written(lowered: ir.Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="Could not write"):
        save(lowered, tmp_path / "file" / "model.onnx")
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_an_operator_without_onnx_form_is_named_with_its_line() -> None:
    program = capture(Leaky(), torch.randn(2, 4, 4))
    with pytest.raises(
        LoweringError, match=r"aten\._linalg_eigh at .*test_onnx_lowering\.py:\d+ has no ONNX form\. Write"
    ):
        lower(program, STYLE)


def test_torchs_exporter_is_one_threads_at_a_time_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = threading.Event()

    def enter() -> None:
        with onnx_exporter():
            entered.set()

    def export(*_: Any, **__: Any) -> None:
        other.start()
        assert not entered.wait(0.2)
        raise OnnxExporterError("stopped")

    def settings() -> tuple[object, ...]:
        return (*(logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir")), warnings.filters)

    monkeypatch.setattr(torch.onnx, "export", export)
    other, before = threading.Thread(target=enter), settings()
    with pytest.raises(LoweringError, match="stopped"):
        lower(capture(nn.Linear(2, 2), torch.ones(3, 2)), STYLE)
    other.join()
    assert entered.is_set()
    assert settings() == before


def test_complex_outputs_are_refused() -> None:
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.complex(x, x)

    with pytest.raises(LoweringError, match="`output` is complex, and ONNX models have no complex"):
        lower(capture(Spectrum(), torch.randn(2, 4)), STYLE)


def test_bfloat16_inputs_are_refused() -> None:
    with pytest.raises(LoweringError, match=r"`input` is bfloat16, which numpy arrays cannot hold.*model.float\(\)"):
        lower(capture(nn.ReLU(), torch.randn(2, 4, dtype=torch.bfloat16)), STYLE)


def test_static_batch_and_integer_inputs(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
            return (ids.reshape(2, -1) * 3).where(keep, 0)

    program = capture(Fixed(), (torch.arange(8).reshape(2, 4), torch.rand(2, 4) > 0.5))
    assert program.batch_size == 2
    model = lower(program, STYLE)
    assert [value.dtype for value in model.graph.inputs] == [ir.DataType.INT64, ir.DataType.BOOL]
    save(model, tmp_path / "model.onnx")
    assert verify(tmp_path / "model.onnx", program, None, SessionSettings()) == 0.0


def test_a_reshape_of_attention_whose_strides_the_exporter_changes(tmp_path: Path) -> None:
    """As in T5: traced, the attention's result needs no copy before the reshape; decomposed, it does."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.bias = nn.Linear(16, 48), nn.Parameter(torch.randn(1, 4, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            shape = (*x.shape[:-1], 4, 4)
            q, k, v = (part.view(shape).transpose(1, 2) for part in self.project(x).chunk(3, -1))
            mask = self.bias.expand(x.shape[0], -1, -1, -1).clone()
            attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
            attended = attended.reshape(attended.shape)
            return attended.transpose(1, 2).reshape(*x.shape[:-1], -1).contiguous()

    program = capture(Attention().eval(), torch.randn(2, 6, 16))
    save(lower(program, STYLE), tmp_path / "model.onnx")
    assert verify(tmp_path / "model.onnx", program, None, SessionSettings()) < 1e-5


def test_names_of_inputs_and_outputs_win(tmp_path: Path) -> None:
    class Swap(nn.Module):
        """Its outputs bear the names its values and weights have inside."""

        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.Parameter(torch.ones(4))

        def forward(self, add: Tensor) -> dict[str, Tensor]:
            hidden = torch.relu(add + self.relu)
            return {"relu": hidden * 2, "mul": hidden, "weight": hidden.sum(-1)}

    program = capture(Swap(), torch.randn(2, 4))
    save(lower(program, STYLE), tmp_path / "model.onnx")
    assert verify(tmp_path / "model.onnx", program, None, SessionSettings()) < 1e-6


def _values(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_results_that_are_no_tensors_are_left_out() -> None:
    class Mixed(nn.Module):
        def forward(self, x: torch.Tensor, scale: int = 2, *, flag: bool = True) -> dict[str, object]:
            y = x * scale
            return {"a": y if flag else -y, "size": x.shape[0], "none": None, "three": 3, "b": (y.relu(), y)}

    program = capture(Mixed(), (torch.randn(2, 5), 3), {"flag": False})
    model = lower(program, STYLE)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert [value.name for value in model.graph.outputs] == ["a", "b_0", "b_1"]

"""int8 of LSTMs: what becomes of them, and that ONNX Runtime computes what the program says."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.capturing.capture import capture
from graphopt.errors import LoweringError
from graphopt.ir.operators import short_name
from graphopt.ir.program import Program
from graphopt.measure.equivalence import measure
from graphopt.passes.int8 import Int8, Int8Options
from graphopt.pipeline.context import Context
from graphopt.quantization.recurrent import lstm
from graphopt.testing import check_pass
from tests.passes.int8_models import WITHOUT_COSTS, noise, quantized, reasons


class Tagger(nn.Module):
    def __init__(self, *, bias: bool = True, batch_first: bool = True, layers: int = 2, both_ways: bool = True) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, layers, bias=bias, batch_first=batch_first, bidirectional=both_ways)
        self.out = nn.Linear(16 if both_ways else 8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states, (hidden, _) = self.lstm(x)
        return self.out(states), hidden


class OneWay(nn.Module):
    """One direction, one layer, states from outside; run twice with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 6)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        first, state = self.lstm(x, (h, c))
        return self.lstm(first, state)[0]


@pytest.fixture(scope="module")
def tagger() -> Program:
    torch.manual_seed(0)
    return capture(Tagger().eval(), (noise(4, 5, 6),))


def recurrent(program: Program) -> list[str]:
    return [short_name(node) for node in program.graph.nodes if "lstm" in short_name(node)]


def test_layer_by_layer_in_the_runtime(tagger: Program, tmp_path: Path) -> None:
    x = noise(16, 5, 6)
    program, plan = quantized(tagger, x)
    assert recurrent(program) == ["dynamic_lstm", "dynamic_lstm"]
    assert len(plan.recurrent) == 2
    assert measure(tagger, program.call_flat, (x,)).sqnr > 25
    backend = OnnxRuntimeBackend()
    artifact = backend.lower(program, tmp_path / "a.onnx")
    assert backend.verify(artifact, program) < 0.1
    kinds = [node.op_type for node in onnx.load(artifact.path).graph.node]
    assert kinds.count("DynamicQuantizeLSTM") == 2
    between = kinds[kinds.index("DynamicQuantizeLSTM") + 1 : len(kinds) - kinds[::-1].index("DynamicQuantizeLSTM") - 1]
    assert between.count("Transpose") == 1  # directions side by side; steps stay first


def test_keeps_the_contract_of_passes(tagger: Program) -> None:
    check_pass(Int8(Int8Options(mode="dynamic")), tagger, (noise(4, 5, 6),), target=WITHOUT_COSTS)


@pytest.mark.parametrize(("bias", "batch_first"), [(False, True), (True, False)])
def test_layouts(bias: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    x = noise(4, 5, 6)
    original = capture(Tagger(bias=bias, batch_first=batch_first, layers=1).eval(), (x,), dynamic_shapes=({},))
    program, _ = quantized(original, x, options=Int8Options(mode="dynamic"))
    assert measure(original, program.call_flat, (x,)).sqnr > 25


def test_shared_weights_are_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = noise(5, 4, 6), noise(1, 4, 6), noise(1, 4, 6)
    dynamic = ({1: torch.export.Dim.DYNAMIC},) * 3
    original = capture(OneWay().eval(), inputs, dynamic_shapes=dynamic)
    instance = Int8(Int8Options(mode="dynamic"))
    plan = instance.plan(original, Context(original=original, target=WITHOUT_COSTS))
    program = instance.apply(original, plan)
    assert [record["stored"] for record in plan.recurrent] == [plan.recurrent[0]["site"]] * 2
    assert measure(original, program.call_flat, inputs).sqnr > 25
    backend = OnnxRuntimeBackend()
    backend.verify(backend.lower(program, tmp_path / "a.onnx"), program)


def test_stays_float_layer_by_layer_where_its_inputs_span_too_much() -> None:
    torch.manual_seed(0)
    x = noise(16, 5, 6) * torch.logspace(0, 5, 6)  # of each step, one input dwarfs the others
    model = Tagger(both_ways=False).eval()
    with torch.no_grad():
        model.lstm.weight_ih_l0.mul_(torch.logspace(0, -5, 6))
    program, plan = quantized(capture(model, (x[:2],)), x)
    assert recurrent(program) == ["lstm", "dynamic_lstm"]
    assert any("8 bits leave its result" in reason for reason in reasons(plan).values())


def test_projections_and_static_scales_are_refused() -> None:
    x = noise(4, 5, 6)
    model = nn.LSTM(6, 8, proj_size=4, batch_first=True)
    _, plan = quantized(capture(model.eval(), (x,)), x)
    assert "projections" in next(iter(reasons(plan).values()))
    _, plan = quantized(capture(nn.LSTM(6, 8, batch_first=True).eval(), (x,)), x, options=Int8Options(mode="static"))
    assert set(reasons(plan).values()) == {"no kernel of onnxruntime takes it with static scales"}


def test_another_kernel_is_caught(tagger: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, _ = quantized(tagger, noise(16, 5, 6), options=Int8Options(mode="dynamic"))
    backend = OnnxRuntimeBackend()
    artifact = backend.lower(program, tmp_path / "a.onnx")
    model = onnx.load(artifact.path)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(".bias") and len(tensor.dims) == 2)
    values = onnx.numpy_helper.to_array(bias).copy()
    values[0, :8] += 0.5  # the input gates of one direction
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(model, artifact.path)
    with pytest.raises(LoweringError, match=r"the result of `lstm` of `lstm` otherwise .* rounding explains"):
        backend.verify(artifact, program)


def test_one_step_by_hand() -> None:
    x, h, c = torch.tensor([[[2.0]]]), torch.tensor([[[0.5]]]), torch.tensor([[[0.25]]])
    weight = torch.tensor([[[10, 20, 30, 40]]], dtype=torch.int8)  # input, output, forget, cell
    again = torch.tensor([[[4, 3, 2, 1]]], dtype=torch.int8)
    scale, bias = torch.full((1, 4), 0.1), torch.arange(8.0).unsqueeze(0) / 10
    states, last, cell = lstm(x, h, c, weight, scale, again, scale, bias, read=lambda value: value)
    gates = [2 * (1 + n) + 0.5 * (4 - n) / 10 + (n + n + 4) / 10 for n in range(4)]
    i, o, f = (torch.sigmoid(torch.tensor(gate)) for gate in gates[:3])
    wanted = f * 0.25 + i * torch.tanh(torch.tensor(gates[3]))
    torch.testing.assert_close(cell.flatten(), wanted.reshape(1))
    torch.testing.assert_close(last.flatten(), (o * torch.tanh(wanted)).reshape(1))
    torch.testing.assert_close(states[0], last)

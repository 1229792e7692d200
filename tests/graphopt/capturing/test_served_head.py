"""Programs that take bytes: what they compute is what the model computes of floats made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.capturing.capture import capture
from graphopt.capturing.served_head import serve
from graphopt.data.served import ServedInput
from graphopt.errors import DataError, UsageError
from graphopt.passes.fold import Fold
from graphopt.testing import check_pass
from tests.graphopt.cli.conftest import small_net

IMAGENET = "input:uint8:nhwc:scale=1/255:mean=0.485,0.456,0.406:std=0.229,0.224,0.225"


class Doubled(nn.Module):
    """Writes to its input, asks for its sizes, and returns it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x.mul_(2)
        return x, x.reshape(x.shape[0], -1).sum(1) / x.shape[2]


def drawn(served: ServedInput, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 128, shape, generator=torch.Generator().manual_seed(0)).to(served.dtype)


@pytest.mark.parametrize(
    ("model", "text", "shape"),
    [
        (nn.Conv2d(3, 4, 3, padding=1), IMAGENET, (2, 8, 9, 3)),
        (nn.Conv1d(2, 4, 3), "input:nwc:mean=1,2", (2, 9, 2)),
        (nn.Conv3d(2, 4, 2), "input:ndhwc:int8:scale=1/128", (2, 4, 5, 6, 2)),
        (nn.Linear(3, 4), "input:int16:mean=1,2,3:std=4,5,6", (2, 5, 3)),
        (nn.Linear(3, 4), "input:float32:mean=0.5", (2, 3)),
        (Doubled(), "x:nhwc:float64", (2, 4, 5, 3)),
        (Doubled(), "x:nwc", (2, 4, 3)),  # whose strides a view would stumble over
    ],
)
def test_bytes_give_what_floats_made_of_them_give(model: nn.Module, text: str, shape: tuple[int, ...]) -> None:
    """Exact in float64, in which weights and input of the model are."""
    served = ServedInput.parse(text)
    values = drawn(served, shape)
    taken = served.taken(values, torch.float64)
    program = capture(model.double(), (taken,))
    made = serve(program, [served])
    with torch.no_grad():
        torch.testing.assert_close(made(values), program(taken), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(made(values[:1]), program(taken[:1]), rtol=1e-12, atol=1e-12)
    assert torch.equal(made.flat_examples()[0], values)
    assert [*map(str, made.outputs)] == [*map(str, program.outputs)]
    assert made.inputs[0].dtype is served.dtype


def test_names_and_dynamic_axes_move_along() -> None:
    program = capture(nn.Conv2d(3, 4, 3), (torch.randn(2, 3, 8, 9),), dynamic_shapes={"input": {2: "height"}})
    made = serve(program, [ServedInput.parse(IMAGENET)])
    (before,), (after,) = program.inputs, made.inputs
    assert after.shape == (before.shape[0], before.shape[2], 9, 3)
    assert isinstance(before.shape[2], str)
    assert made(torch.zeros(1, 5, 9, 3, dtype=torch.uint8)).shape == (1, 4, 3, 7)
    assert "is taken as it is served, input:uint8:nhwc" in made.notes[-1].text


def test_the_type_of_the_model_is_the_last_step() -> None:
    program = capture(nn.Linear(2, 2).half(), (torch.randn(3, 2).half(),))
    made = serve(program, [ServedInput("input", mean=(123.675,))])
    values = torch.tensor([[123, 125]], dtype=torch.uint8)  # 123.675 would be 123.6875 in float16
    torch.testing.assert_close(made(values), program((values - 123.675).half()), rtol=0, atol=0)


def test_one_of_several_inputs() -> None:
    program = capture(nn.Bilinear(3, 4, 2), (torch.randn(2, 3), torch.randn(2, 4)))
    made = serve(program, [ServedInput("input2", scale=0.5)])
    one, two = torch.randn(5, 3), torch.randint(0, 256, (5, 4), dtype=torch.uint8)
    torch.testing.assert_close(made(one, two), program(one, two * 0.5))
    assert [spec.dtype for spec in made.inputs] == [torch.float32, torch.uint8]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("inputs", "has no input `inputs` to be served; it takes input, offsets. Did you mean `input`"),
        ("offsets", "takes int64, of which nothing has to be made"),
        ("input:float32", "is served as the model takes it"),
    ],
)
def test_refused(text: str, said: str) -> None:
    class Offset(nn.Module):
        def forward(self, input: Tensor, offsets: Tensor) -> Tensor:
            return input + offsets

    program = capture(Offset(), (torch.randn(2, 3), torch.zeros(2, 3, dtype=torch.int64)))
    with pytest.raises(UsageError, match=said):
        serve(program, [ServedInput.parse(text)])


@pytest.mark.parametrize(("padding", "left"), [(0, []), (1, ["aten.sub.Tensor"])])
def test_a_convolution_takes_in_scales_and_where_it_pads_no_zeros_means(padding: int, left: list[str]) -> None:
    program = capture(nn.Conv2d(3, 4, 3, padding=padding), (torch.randn(2, 3, 8, 8),))
    made = check_pass(Fold(), serve(program, [ServedInput.parse(IMAGENET)]), ()).after
    called = [str(node.target) for node in made.graph.nodes]
    assert [name for name in called if name in ("aten.sub.Tensor", "aten.mul.Tensor")] == left


def test_a_run_on_bytes(tmp_path: Any) -> None:
    """Calibration, metric, artifact and what was saved of it take bytes; the artifact computes what the model does."""
    net, served = small_net(), ServedInput.parse(IMAGENET)
    values = drawn(served, (48, 8, 8, 3)) * 2
    taken = served.taken(values, torch.float32)
    with torch.no_grad():
        wanted = net(taken)
    labels = wanted.argmax(1)
    result = graphopt.optimize(net, values, "int8:guard=none", eval=(values, labels), served=served, bench=False)
    assert result.report.original.metric == 100
    (found,) = result.artifact.session()(values.numpy())
    first = [node.op_type for node in onnx.load(result.artifact.path).graph.node if node.op_type != "DequantizeLinear"]
    assert first[:4] == ["Cast", "Sub", "Transpose", "QuantizeLinear"]  # rows of channels, not one after the other
    noise = np.square(found - wanted.numpy()).mean()
    assert 10 * np.log10(np.square(wanted.numpy()).mean() / noise) > 25
    result.save(tmp_path / "made")
    opened = graphopt.open(tmp_path / "made")
    assert opened.served == result.served == (served,)
    assert [*map(str, opened.program.inputs)] == ["input: batchx8x8x3 uint8"]
    program = graphopt.capture(net, (taken[:2],))
    with pytest.raises(graphopt.PassError, match="served='input:uint8:nhwc"):
        graphopt.replay(program, tmp_path / "made" / "manifest.json")
    again = graphopt.replay(serve(program, opened.served), tmp_path / "made" / "manifest.json")
    with torch.no_grad():
        assert torch.equal(again["onnxruntime"](values), result.program(values))


def test_bytes_for_a_model_of_floats_get_a_hint() -> None:
    values = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"fails on the first samples.*or let the program.*--served input:uint8:scale="):
        graphopt.optimize(nn.Conv2d(3, 4, 3), values, "")
    program = capture(nn.Conv2d(3, 4, 3), (torch.randn(2, 3, 8, 8),))
    with pytest.raises(DataError, match=r"takes float32, but the data has uint8.*--served input:uint8:scale="):
        graphopt.optimize(program, values.permute(0, 3, 1, 2), "")

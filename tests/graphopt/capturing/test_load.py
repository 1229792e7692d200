"""Data that a module is captured on: a list holds batches, and single samples in it are told apart from them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from graphopt.capturing.capture import capture
from graphopt.capturing.load import load, with_data
from graphopt.errors import CaptureError, DataError, GraphOptError, UsageError


class Fixed(nn.Module):
    """Takes batches of four alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, 8) * 2


@pytest.mark.parametrize(
    ("model", "shape"), [(nn.Linear(8, 4), (8,)), (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (3, 8, 8))]
)
def test_a_list_of_single_samples_is_refused(model: nn.Module, shape: tuple[int, ...]) -> None:
    data = torch.randn(5, *shape)
    with pytest.raises(DataError, match=r"a list of 5 single samples of shape \(.*torch\.stack\(data\)"):
        with_data(model, [*data])
    program, _ = with_data(model, torch.stack([*data]))
    assert program.batch_size is None
    with pytest.raises(DataError, match=r"batches, not samples: put samples together, as in `torch\.stack\(data\)`"):
        with_data(program, [*data])


def test_batches_of_a_fixed_size_are_no_single_samples() -> None:
    program, samples = with_data(Fixed(), [torch.randn(4, 8), torch.randn(4, 8)])
    assert program.batch_size == 4
    assert samples is not None
    assert samples.names == ("x",)


def test_a_sample_without_its_axis_keeps_the_other_advice() -> None:
    with pytest.raises(DataError, match="The first axis must count samples: add one"):
        with_data(capture(nn.Linear(8, 4), torch.randn(2, 8)), torch.randn(8))


def test_a_number_that_differs_from_call_to_call_is_refused(tmp_path: Path) -> None:
    class Times(nn.Module):
        def forward(self, x: Tensor, n: int) -> Tensor:
            return x * n

    class Idle(nn.Module):
        def forward(self, x: Tensor, n: int) -> Tensor:
            return x * 2

    given = (torch.ones(2, 3), 5)
    for model in (Times(), Idle()):
        exported = torch.export.export(model, given, dynamic_shapes=({}, Dim.DYNAMIC))
        torch.export.save(exported, tmp_path / f"{type(model).__name__}.pt2")
    said = "The input `n` is a number that differs from call to call"
    with pytest.raises(CaptureError, match=said):
        load(tmp_path / "Times.pt2")
    for asked in (Dim.DYNAMIC, Dim("n")):
        with pytest.raises(UsageError, match="Input `n` is no tensor; only sizes of tensors can be dynamic"):
            capture(Times(), given, dynamic_shapes={"n": asked})
    capture(Times(), given, dynamic_shapes={"x": {1: "width"}, "n": None})
    assert torch.equal(capture(Times(), given)(*given), given[0] * 5)
    assert torch.equal(load(tmp_path / "Idle.pt2")(given[0], 7), given[0] * 2)


class Sums(nn.Module):
    """Takes a list and a dictionary."""

    def forward(self, pair: list[Tensor], named: dict[str, Tensor]) -> Tensor:
        return pair[0] + pair[1] + named["x"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([None, None, {1: "t"}], "describes 3 inputs, and the model takes pair, named"),
        ([{1: "t"}], "Input `pair` is a list of 2, and dynamic_shapes gives it"),
        ({"pair": [{1: "t"}]}, "Give a list of 2"),
        ({"named": {"y": {1: "t"}}}, "Input `named` is a dictionary of x, and dynamic_shapes gives it"),
        ({"named": [{1: "t"}]}, "Give a dictionary with some of these names"),
        ("pair", "dynamic_shapes cannot be 'pair'"),
        ({"named": {"x": "t"}}, "dynamic_shapes gives input `named_x` 't'"),
    ],
)
def test_axes_of_another_structure_are_refused(asked: Any, said: str) -> None:
    x = torch.randn(2, 5)
    with pytest.raises(UsageError, match=said):
        capture(Sums(), ([x, x], {"x": x}), dynamic_shapes=asked)


@pytest.mark.parametrize("axes", [{}, {0: Dim.DYNAMIC}], ids=["static", "dynamic"])
def test_a_file_whose_call_would_write_beyond_its_memory(axes: dict[int, Any], tmp_path: Path) -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 9))
    exported = torch.export.export(layer, (torch.randn(2, 4),), dynamic_shapes=(axes,))
    torch.export.save(exported, tmp_path / "honest.pt2")
    assert load(tmp_path / "honest.pt2").graph
    exported.state_dict["parametrizations.weight.original0"] = nn.Parameter(torch.ones(1))
    torch.export.save(exported, tmp_path / "hostile.pt2")
    with pytest.raises(CaptureError, match=r"with weights `v` and `g` of the shapes \(9, 4\) and \(1,\)"):
        load(tmp_path / "hostile.pt2")


@pytest.mark.parametrize("axes", [{}, {0: Dim.DYNAMIC}], ids=["static", "dynamic"])
def test_layers_without_gradients_are_loaded(axes: dict[int, Any], tmp_path: Path) -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 9))
            self.head = nn.Linear(9, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                features = self.layer(x)
            head: Tensor = self.head(features)
            return head

    model, x = Frozen(), torch.randn(2, 4)
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=(axes,)), tmp_path / "model.pt2")
    torch.testing.assert_close(load(tmp_path / "model.pt2")(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("axes", [{}, {0: Dim.DYNAMIC}], ids=["static", "dynamic"])
def test_a_file_whose_dtype_is_a_number(axes: dict[int, Any], tmp_path: Path) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(1, torch.float64)

    exported = torch.export.export(Double(), (torch.randn(2, 4),), dynamic_shapes=(axes,))
    torch.export.save(exported, tmp_path / "honest.pt2")
    with zipfile.ZipFile(tmp_path / "honest.pt2") as honest, zipfile.ZipFile(tmp_path / "hostile.pt2", "w") as hostile:
        for name in honest.namelist():
            data = honest.read(name).replace(b'{"as_scalar_type": 8}', b'{"as_int": 2147483647}')
            hostile.writestr(name, data)
    with pytest.raises(CaptureError, match="calls `softmax` with 2147483647 as `dtype`"):
        load(tmp_path / "hostile.pt2")


@pytest.mark.parametrize("axes", [{}, {0: Dim.DYNAMIC}], ids=["static", "dynamic"])
def test_a_model_that_does_not_run_twice(axes: dict[int, Any], tmp_path: Path) -> None:
    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("at", torch.tensor([0]))

        def forward(self, x: Tensor) -> Tensor:
            read = x.index_select(1, self.at)
            self.at.add_(3)
            return read

    exported = torch.export.export(Moves(), (torch.randn(2, 4),), dynamic_shapes=(axes,))
    torch.export.save(exported, tmp_path / "model.pt2")
    with pytest.raises(GraphOptError):
        load(tmp_path / "model.pt2")


@pytest.mark.parametrize("lies", ["", "div", "x"])
def test_types_that_a_file_records_wrongly(lies: str, tmp_path: Path) -> None:
    """Passes believe them: what is recorded as a cast to the same type would go, and what it guards be run."""

    class Divides(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.div(y, rounding_mode="trunc") + 1

    rows = {0: Dim.DYNAMIC}
    x, y = torch.tensor([-(2**63), 7]), torch.tensor([-1, 2])
    exported = torch.export.export(Divides(), (x, y), dynamic_shapes={"x": rows, "y": rows})
    torch.export.save(exported, tmp_path / "honest.pt2")
    with zipfile.ZipFile(tmp_path / "honest.pt2") as honest, zipfile.ZipFile(tmp_path / "lies.pt2", "w") as written:
        for name in honest.namelist():
            content = honest.read(name)
            if name.endswith("models/model.json"):
                program = json.loads(content)
                values = program["graph_module"]["graph"]["tensor_values"]
                for value in [values[key] for key in values if lies and key == lies]:
                    value["dtype"] = _FLOAT32
                content = json.dumps(program).encode()
            written.writestr(name, content)
    if lies:
        with pytest.raises(
            CaptureError, match=r"records its value `(x|add)` as torch\.\w+, and it is torch\.\w+\. Export it again"
        ):
            load(tmp_path / "lies.pt2")
    else:
        assert load(tmp_path / "lies.pt2")(x, y).tolist() == [-(2**63) + 1, 4]


_FLOAT32 = 7  # torch._export.serde.schema.ScalarType

"""Data become the arguments of a module, however its forward takes them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt.capturing.example_inputs import example_inputs, random_examples
from graphopt.capturing.load import capture_on
from graphopt.data import parse_input_spec
from graphopt.errors import CaptureError, DataError, UsageError

A, B = torch.zeros(3, 4), torch.ones(3, 5)


class Keywords(nn.Module):
    def forward(self, *, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([a, b], 1)


class Optional(nn.Module):
    def forward(
        self, a: torch.Tensor, skipped: torch.Tensor | None = None, b: torch.Tensor | None = None
    ) -> torch.Tensor:
        return a if b is None else torch.cat([a, b], 1)


class Star(nn.Module):
    def forward(self, *inputs: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        return torch.cat([*inputs, *named.values()], 1)


@pytest.mark.parametrize(
    ("model", "given", "missing"),
    [
        (nn.Bilinear(4, 4, 2), ["input1=1x4"], "input2"),
        (nn.Bilinear(4, 4, 2), ["x=1x4"], "input2"),
        (nn.MultiheadAttention(4, 1), ["query=1x2x4", "value=1x2x4"], "key"),
        (Keywords(), ["b=1x4"], "a"),
    ],
)
def test_a_shape_that_is_missing(model: nn.Module, given: list[str], missing: str) -> None:
    with pytest.raises(CaptureError, match=rf"the shape of `{missing}` is not given\. Add --input {missing}=SHAPE"):
        random_examples(model, [parse_input_spec(text) for text in given], seed=0, source="m.pt")


def test_shapes_of_optional_inputs_may_be_missing() -> None:
    args, kwargs = random_examples(Optional(), [parse_input_spec("a=3x4")], seed=0, source="m.pt")
    assert Optional()(*args, **kwargs).shape == (3, 4)


@pytest.mark.parametrize("model", [Keywords(), Optional(), Star()])
def test_by_name(model: nn.Module) -> None:
    args, kwargs = example_inputs(model, {"a": A, "b": B})
    torch.testing.assert_close(model(*args, **kwargs), torch.cat([A, B], 1)[:2])


@pytest.mark.parametrize("model", [Keywords(), Star()])
def test_by_position(model: nn.Module) -> None:
    args, kwargs = example_inputs(model, (A, B))
    torch.testing.assert_close(model(*args, **kwargs), torch.cat([A, B], 1)[:2])


def test_nested_data_say_what_to_do() -> None:
    with pytest.raises(DataError, match=r"`a` of the data is a dict.*captured first \(graphopt.capture\)"):
        example_inputs(Optional(), {"a": {"x": A}})


def test_double_precision_of_numpy_becomes_single() -> None:
    assert capture_on(nn.Linear(4, 3), A.double().numpy()).inputs[0].dtype is torch.float32
    assert capture_on(nn.Linear(4, 3).double(), A.double().numpy()).inputs[0].dtype is torch.float64


class Counted(nn.Linear):
    """State of its own beside its tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_state_that_is_no_tensor() -> None:
    assert capture_on(Counted(4, 3), A.double().numpy()).inputs[0].dtype is torch.float32


def test_a_shape_for_an_input_that_there_is_not() -> None:
    with pytest.raises(UsageError, match=r"The model has no input \['c'\]; its inputs are \['a', 'b'\]"):
        random_examples(Keywords(), [parse_input_spec(f"{name}=1x4") for name in "abc"], seed=0, source="m.pt")


@pytest.mark.parametrize("data", [torch.zeros(3, 5), torch.zeros(3, 4, dtype=torch.uint8)])
def test_data_the_model_fails_on(data: torch.Tensor) -> None:
    with pytest.raises(DataError, match=r"The model fails on the first samples of the data \(\(2, \d\) .*RuntimeError"):
        capture_on(nn.Linear(4, 3), data)


class BatchOfFour(nn.Module):
    """Takes no other number of samples."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 2, 4).sum(1)


def test_a_model_of_one_batch_size_gets_the_batch_of_its_data() -> None:
    batches = [torch.randn(4, 4), torch.randn(4, 4)]
    assert capture_on(BatchOfFour(), batches).inputs[0].shape == (4, 4)
    assert capture_on(BatchOfFour(), batches[0]).inputs[0].shape == (4, 4)
    with pytest.raises(DataError, match="The model fails on the first samples of the data"):
        capture_on(BatchOfFour(), torch.randn(16, 4))

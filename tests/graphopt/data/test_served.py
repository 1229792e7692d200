"""Inputs as served: what users write, and what becomes of it there and back."""

from __future__ import annotations

import pytest
import torch

from graphopt.data.served import ServedInput, served_inputs
from graphopt.errors import UsageError

IMAGENET = "x:uint8:nhwc:scale=1/255:mean=0.485,0.456,0.406:std=0.229,0.224,0.225"


@pytest.mark.parametrize("text", [IMAGENET, "x", "x:int16:scale=-2e-3", "ids_0:float32:nwc:mean=-1/3"])
def test_what_is_said_is_written_as_it_is_read(text: str) -> None:
    served = ServedInput.parse(text)
    assert ServedInput.parse(str(served)) == served


def test_what_is_not_said_changes_nothing() -> None:
    assert ServedInput.parse("x") == ServedInput("x", torch.uint8, "", 1.0, (0.0,), (1.0,))
    assert ServedInput.parse("x:scale=1/255").scale == 1 / 255


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "does not name the input"),
        ("uint8=x", "does not name the input"),
        ("x:unit8", "has unit8. Did you mean `uint8`"),
        ("x:nchw", "has nchw. Did you mean `nhwc`"),
        ("x:means=1", "has means. Did you mean `mean`"),
        ("x:uint8:int8", "something said twice"),
        ("x:scale=1:scale=2", "something said twice"),
        ("x:scale=1,2", "the scale is one number"),
        ("x:scale=", "no list of numbers"),
        ("x:mean=1/0", "no list of numbers"),
        ("x:mean=1,,2", "no list of numbers"),
        ("x:mean=nan", "must be finite"),
        ("x:mean=1e999999999", "must be finite"),
        ("x:std=1,0", "a scale or std of 0"),
    ],
)
def test_another_form_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ServedInput.parse(text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": torch.bool}, "cannot be served as torch.bool"),
        ({"layout": "nchw"}, "no layout is called 'nchw'"),
        ({"mean": (float("nan"),)}, "must be finite"),
        ({"mean": ()}, "are at least one number"),
    ],
)
def test_another_description_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ServedInput("x", **options)  # type: ignore[arg-type]


def test_an_input_is_served_in_one_way() -> None:
    with pytest.raises(UsageError, match="said twice how input `x`"):
        served_inputs([IMAGENET, ServedInput("x")])


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        (IMAGENET, (4, 5, 6, 3)),
        ("x:nwc:scale=1/128:mean=1,2", (4, 5, 2)),
        ("x:ndhwc:int8:std=0.25", (4, 2, 3, 5, 2)),
        ("x:int16:mean=1,2,3:std=4,5,6", (4, 5, 3)),  # features along the last axis
        ("x:std=2", ()),
    ],
)
def test_there_and_back(text: str, shape: tuple[int, ...]) -> None:
    served = ServedInput.parse(text)
    values = torch.randint(0, 128, shape, generator=torch.Generator().manual_seed(0)).to(served.dtype)
    taken = served.taken(values, torch.float32)
    assert torch.equal(served.served(taken), values)
    assert served.served(taken).is_contiguous()


def test_taken_is_what_users_compute() -> None:
    served = ServedInput.parse(IMAGENET)
    values = torch.randint(0, 256, (2, 5, 6, 3), dtype=torch.uint8)
    mean, std = torch.tensor(served.mean).view(3, 1, 1), torch.tensor(served.std).view(3, 1, 1)
    torch.testing.assert_close(served.taken(values, torch.float32), (values.permute(0, 3, 1, 2) / 255 - mean) / std)


def test_what_no_type_holds_saturates() -> None:
    assert ServedInput("x", scale=1 / 255).served(torch.tensor([-1.0, 0.0, 2.0])).tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("text", "shape", "said"),
    [
        ("x:nhwc", (2, 3, 4), "has 3 axes, nhwc has 4. Use nwc"),
        ("x:nwc", (2, 3), "has 2 axes, nwc has 3. Leave the layout out"),
        ("x:mean=1,2", (2, 3, 4), "takes Nx3x4, which has no 2 channels"),
        ("x:mean=1,2:std=1,2,3", (2, 3, 4), "which has no 2 or 3 channels"),
        ("x:mean=1,2", (2,), "which has no 2 channels"),
    ],
)
def test_what_does_not_fit(text: str, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ServedInput.parse(text).taken(torch.zeros(shape, dtype=torch.uint8), torch.float32)

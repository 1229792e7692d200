"""Addresses of values: module path and operator, module path alone, globs, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.distillation.addresses import Tap, addresses, resolve
from graphopt.errors import UsageError
from graphopt.ir.program import Program
from tests.graphopt.distillation.models import ResidualNet


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(ResidualNet(), torch.randn(2, 3, 8, 8))


def found(program: Program, *wanted: str) -> list[str]:
    taps, refusals = resolve(program, wanted)
    assert refusals == []
    return [tap.address for tap in taps]


def test_every_call_has_one_address(program: Program) -> None:
    named = addresses(program)
    calls = [node.name for node in program.graph.nodes if node.op == "call_function"]
    assert list(named.values()) == calls
    assert named["layer1.conv2:conv2d"] == "conv2d_2"
    assert "layer1.relu:relu#0" in named


def test_module_and_operator(program: Program) -> None:
    assert found(program, "layer1.conv2:conv2d") == ["layer1.conv2:conv2d"]
    assert found(program, "layer1.relu:relu#1") == ["layer1.relu:relu#1"]


def test_a_module_path_is_the_value_that_leaves_it(program: Program) -> None:
    assert found(program, "layer1.bn2") == ["layer1.bn2:batch_norm"]
    assert found(program, "layer1") == ["layer1.relu:relu#1"]


def test_globs_match_many_in_graph_order_each_once(program: Program) -> None:
    convolutions = ["stem:conv2d", "layer1.conv1:conv2d", "layer1.conv2:conv2d", "down:conv2d"]
    assert found(program, "*:conv2d")[:4] == convolutions
    assert found(program, "layer?", "layer2", "layer?.relu:relu#1") == ["layer1.relu:relu#1", "layer2.relu:relu#1"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("layer1.conv9", "Nothing in the program is at `layer1.conv9`. Nearest: `layer1.conv2`, `layer1.conv1`"),
        ("layer1.conv2:linear", "Nothing in the program is at `layer1.conv2:linear`. Nearest: `layer1.conv2:conv2d`"),
        ("nowhere.*", "Nothing in the program is at `nowhere.*`."),
        (
            "layer1.relu:relu",
            "`layer1.relu:relu` names 2 values. Say which: `layer1.relu:relu#0`, `layer1.relu:relu#1`",
        ),
    ],
)
def test_an_address_that_names_nothing_or_several(program: Program, address: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        resolve(program, [address])
    assert str(error.value).startswith(message)


class Untappable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        left, right = x.chunk(2, -1)
        seen = left.unsqueeze(0)
        left.add_(1)
        return self.second(left) + right.sum() + seen.sum()


def test_what_cannot_be_an_output_is_refused_with_the_reason() -> None:
    program = capture(Untappable(), torch.randn(5, 4))
    taps, refusals = resolve(program, ["*:*"])
    reasons = {refusal.site: refusal.reason for refusal in refusals}
    assert reasons[":chunk"].startswith("it is several tensors")
    assert reasons["first:linear"] == "its memory is written to later: by `add_`"
    assert reasons[":unsqueeze"] == "its memory is written to later: by `add_`"
    assert "second:linear" in [tap.address for tap in taps]


class Sized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.new_ones(x.shape[0] * 2, 3) * x.mean()


def test_a_size_is_refused_and_a_tensor_of_dynamic_size_is_not() -> None:
    program = capture(Sized(), torch.randn(4, 3))
    taps, refusals = resolve(program, ["*:*"])
    assert {refusal.reason for refusal in refusals} == {"it is a size, not a tensor"}
    assert Tap(":new_ones", "new_ones") in taps

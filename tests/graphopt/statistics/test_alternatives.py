"""Running calls in other ways beside their own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.pipeline.knobs import Alternative
from graphopt.statistics.alternatives import compare, compare_on


def test_shares_of_noise_are_taken_sample_by_sample() -> None:
    program = capture(nn.Sequential(nn.ReLU(), nn.Hardtanh(-100, 100)), torch.ones(2, 4))
    first, second = program.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default) + (
        program.graph.find_nodes(op="call_function", target=torch.ops.aten.hardtanh.default)
    )
    batch = torch.tensor([[1.0] * 4, [100.0] * 4])  # the same difference is 1 % of one sample, 100 % of the other

    def off_by_one(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return torch.relu(args[0]) + 1

    def the_same(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return args[0]

    found = compare(
        program,
        [(batch,), (batch,)],
        {first: {"off": Alternative(off_by_one)}, second: {"same": Alternative(the_same)}},
    )
    assert found[first]["off"] == pytest.approx(-10 * math.log10((1 + 1e-4) / 2))
    assert found[second]["same"] == math.inf  # the program goes on from its own results


def test_noise_without_signal_has_no_bound() -> None:
    program = capture(nn.ReLU(), torch.ones(2, 4))
    node = program.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)[0]
    found = compare(program, [(-torch.ones(2, 4),)], {node: {"off": Alternative(lambda args, kwargs: args[0])}})
    assert found[node]["off"] == -math.inf


def test_what_calls_read_is_enough_to_compare_them() -> None:
    program = capture(nn.Sequential(nn.ReLU(), nn.Linear(4, 3), nn.Tanh()), torch.ones(2, 4))
    relu, linear, tanh = (node for node in program.graph.nodes if node.op == "call_function")
    batches = [(torch.randn(5, 4),), (torch.randn(2, 4),)]
    tanh_of = Alternative(lambda args, _: args[0].tanh())
    ways = {
        linear: {"half": Alternative(lambda args, _: nn.functional.linear(args[0] / 2, *args[1:]))},
        tanh: {"off": Alternative(lambda args, _: args[0].tanh() + 1), "same": tanh_of},
    }
    read = [batch[0].relu() for batch in batches]
    weight, bias = (program.state_dict()[name] for name in ("1.weight", "1.bias"))
    values = {relu: read, linear: [nn.functional.linear(x, weight, bias) for x in read]}
    found = compare_on(program.graph_module, values, ways)
    assert found == compare(program, batches, ways)
    assert found[tanh]["same"] == math.inf > found[linear]["half"]

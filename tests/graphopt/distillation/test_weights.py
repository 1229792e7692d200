"""Which tensors training changes, and in which precision."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from graphopt.distillation.weights import held_in_single_precision
from graphopt.ir.program import Program

aten = torch.ops.aten


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_stored_in_single_and_computes_what_it_did(dtype: torch.dtype) -> None:
    graph, root = fx.Graph(), nn.Module()
    weight = nn.Parameter(torch.randn(4, 4, dtype=dtype))
    root.register_parameter("weight", weight)
    root.register_parameter("tied", weight)
    root.register_parameter("frozen", nn.Parameter(torch.randn(4, dtype=dtype), requires_grad=False))
    x = graph.placeholder("x")
    for name in ("weight", "tied", "weight"):
        x = graph.call_function(aten.linear.default, (x, graph.get_attr(name), graph.get_attr("frozen")))
    graph.output(x)
    program = Program(fx.GraphModule(root, graph), (), (), ())
    data = torch.randn(3, 4, dtype=dtype)
    wanted = program.graph_module(data)
    held_in_single_precision(program)
    found = program.graph_module(data)
    assert torch.equal(found, wanted)
    assert found.dtype is dtype
    stored = dict(program.graph_module.named_parameters(remove_duplicate=False))
    assert {name: tensor.dtype for name, tensor in stored.items()} == {
        "weight": torch.float32,
        "tied": torch.float32,
        "frozen": dtype,
    }
    assert stored["weight"] is stored["tied"]
    found.float().sum().backward()
    assert stored["weight"].grad is not None
    assert stored["weight"].grad.dtype is torch.float32

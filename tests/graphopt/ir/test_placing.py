"""A program moves to another device whole: tensors, what its graph says of devices, and what is recorded of values."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from graphopt.capturing.capture import capture
from graphopt.errors import UsageError
from graphopt.ir.placing import place
from graphopt.ir.program import Program
from graphopt.ir.torch_internals import pytree

META = torch.device("meta")


class Places(nn.Module):
    """Names its device in every way there is, inside regions too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("scale", torch.tensor(2.0))
        self.shift = torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        def then(x: Tensor) -> Tensor:
            return x + torch.arange(4, device="cpu")

        x = torch.cond(x.sum() > 0, then, lambda x: x.to(torch.device("cpu"), torch.float32) * 1.0, (x,))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.layer(x)
        y: Tensor = x.float().to("cpu").mul(self.scale) + self.shift + torch.zeros(4, device=x.device)
        return y + torch.tensor([1.0, 2.0, 3.0, 4.0])


def devices(program: Program) -> set[str]:
    """Everything in a program that is a device."""
    gm = program.graph_module
    found: list[Any] = [*gm.parameters(), *gm.buffers(), *program.flat_examples()]
    named = []
    for module in [module for module in gm.modules() if isinstance(module, fx.GraphModule)]:
        for node in module.graph.nodes:
            found += pytree.tree_leaves(node.meta.get("val"))
            named += [
                value for value in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(value, torch.device)
            ]
            named += [torch.device(value) for value in node.args if value in ("cpu", "meta")]
    return {str(value.device) for value in found if isinstance(value, Tensor)} | set(map(str, named))


def test_everything_moves_and_the_program_stays() -> None:
    program = capture(Places(), torch.randn(2, 4))
    assert program.devices == {torch.device("cpu")}
    assert program.to("cpu") is program
    code = program.graph_module.code
    moved = program.to(META)
    assert moved.devices == {META}
    assert devices(moved) == {"meta"}
    assert devices(program) == {"cpu"}
    assert program.graph_module.code == code
    assert (moved.inputs, moved.outputs) == (program.inputs, program.outputs)


def test_a_moved_program_runs_where_it_is() -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to("cpu") + torch.ones(4, device="cpu")

    moved = capture(nn.Sequential(nn.Linear(4, 4), Sums()), torch.randn(2, 4)).to("meta")
    result = moved(torch.empty(7, 4, device="meta"))
    assert (result.device, tuple(result.shape)) == (META, (7, 4))


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("gpu", "`gpu` is no name of a device. Here there is cpu"),
        (torch.float16, "`torch.float16` is no name of a device. Here there is cpu"),
        ("hpu", "There is no device `hpu:0` that torch"),
    ],
)
def test_a_device_that_is_not_there(device: Any, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        capture(nn.Linear(4, 4), torch.randn(2, 4)).to(device)


def test_tied_tensors_stay_tied() -> None:
    root = nn.Module()
    root.one = root.two = nn.Parameter(torch.ones(3))
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (graph.get_attr("one"), graph.get_attr("two"))))
    gm = fx.GraphModule(root, graph)
    place(gm, META)
    assert gm.one is gm.two
    assert gm.one.device == META

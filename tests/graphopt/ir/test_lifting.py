"""Lifting: the exported program a trace would give, without the trace; where only a trace can tell, nothing."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import graphopt
from graphopt import Program, capture, load
from graphopt.ir.exporting import export_again, exported
from graphopt.ir.graph import copy_graph_module
from graphopt.ir.lifting import lifted
from graphopt.ir.provenance import origin


class Net(nn.Module):
    """Weights, statistics, a size of the input, a constant, a frozen weight, two results."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(64, 5)
        self.head.bias.requires_grad_(False)

    def forward(self, input: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        y = self.norm(self.conv(input)).relu() * torch.tensor(0.5)
        return {"logits": self.head(y.view(y.size(0), -1)), "scaled": y * scale}


@pytest.fixture(scope="module")
def program() -> Program:
    """A captured network."""
    torch.manual_seed(0)
    return capture(Net().eval(), (torch.randn(2, 3, 6, 6),), {"scale": torch.tensor(1.5)})


def lift(program: Program) -> ExportedProgram | None:
    gm = copy_graph_module(program.graph_module)
    return lifted(gm, program.inputs, program.example_args, program.example_kwargs)


def calls(found: ExportedProgram) -> list[tuple[Any, Any]]:
    """List the calls with their origins; a trace forgets those of sizes."""
    return [
        (node.target, node.meta["custom"] if isinstance(node.meta["val"], Tensor) else None)
        for node in found.graph.nodes
        if node.op == "call_function"
    ]


def test_it_is_what_a_trace_gives(program: Program) -> None:
    found, traced = lift(program), export_again(program).program
    assert found is not None
    assert calls(found) == calls(traced)
    assert found.range_constraints == traced.range_constraints
    for one, other in zip(found.graph_signature.input_specs, traced.graph_signature.input_specs, strict=True):
        assert (one.kind, one.target, one.persistent) == (other.kind, other.target, other.persistent)
    assert found.state_dict.keys() >= traced.state_dict.keys()
    assert all(found.state_dict[name] is tensor for name, tensor in program.graph_module.named_parameters())
    assert exported(program).sources == {n.name: n.name for n in program.graph.nodes if n.op == "call_function"}
    for rows in (1, 5):
        x, scale = torch.randn(rows, 3, 6, 6), torch.tensor(1.5)
        torch.testing.assert_close(found.module(check_guards=False)(x, scale=scale), program(x, scale=scale))


def test_plain_torch_and_graphopt_load_it(program: Program, tmp_path: Path) -> None:
    found, stream = lift(program), io.BytesIO()
    assert found is not None
    torch.export.save(found, stream)
    stream.seek(0)
    x, scale = torch.randn(4, 3, 6, 6), torch.tensor(1.5)
    plain = torch.export.load(stream)
    torch.testing.assert_close(plain.module()(x, scale=scale), program(x, scale=scale))
    again = load(program.save(tmp_path / "net.pt2"))
    torch.testing.assert_close(again(x, scale=scale), program(x, scale=scale), rtol=0, atol=0)
    assert (again.inputs, again.outputs) == (program.inputs, program.outputs)
    trained = [{name: p.requires_grad for name, p in one.graph_module.named_parameters()} for one in (again, program)]
    assert trained[0] == trained[1]
    assert trained[0]["head.bias"] is False
    own, theirs = ([origin(n) for n in one.graph.nodes if n.op == "call_function"] for one in (again, program))
    assert own == theirs


def test_what_passes_ask_of_a_batch_does_not_limit_it() -> None:
    program = capture(nn.ReLU(), torch.randn(2, 3))
    size = program.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0]
    (symbol,) = size.node.expr.free_symbols
    before = exported(program).program.range_constraints[symbol]
    assert size < 16  # as torch's convolution asks, and the environment of the symbol remembers
    assert size.node.shape_env.var_to_range[symbol].upper == 15
    found = lift(program)
    assert found is not None
    assert found.range_constraints[symbol] == before
    assert before.upper > 15
    torch.export.save(found, file := io.BytesIO())
    file.seek(0)
    for own in (found, torch.export.load(file)):
        assert own.module()(torch.randn(20, 3)).shape == (20, 3)  # which asserts what it knows of sizes


def test_a_size_that_capture_asked_about_is_left_to_a_trace() -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._check(x.shape[0] + x.shape[1] != 100)
            return x.relu()

    both = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    assert lift(capture(Asks(), (torch.randn(2, 3),), dynamic_shapes=(both,))) is None


class Cases:
    """Models of which a trace tells more than the graph records."""

    class Region(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.cond(x.sum() > 0, torch.sin, torch.tanh, (x,))
            return y

    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            y[:, 0] = 0
            return y

    class Size(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x.relu(), x.shape[0]

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x.relu()
            return y, y

    class Returned(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.relu(), x

    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x > 0].relu()

    class Flag(nn.Module):
        def forward(self, x: Tensor, scale: int = 2) -> Tensor:
            return x.relu() * scale


@pytest.mark.parametrize("case", [case for name, case in vars(Cases).items() if name[0].isupper()])
def test_what_only_a_trace_can_tell(case: type[nn.Module]) -> None:
    args = (torch.randn(2, 4), 3) if case is Cases.Flag else (torch.randn(2, 4),)
    program = capture(case().eval(), args)
    assert lift(program) is None
    assert exported(program).program is not None


def test_a_tensor_under_two_names_is_left_to_a_trace(program: Program) -> None:
    gm = copy_graph_module(program.graph_module)
    norm = gm.get_submodule("norm")
    norm.bias = norm.weight
    assert lift(program.with_graph(gm)) is None


def test_a_file_is_not_believed(program: Program, tmp_path: Path) -> None:
    assert lift(load(program.save(tmp_path / "net.pt2"))) is None


def test_an_axis_that_was_fixed_is_not_passed_over(program: Program) -> None:
    first, *others = program.inputs
    claimed = dataclasses.replace(first, shape=(*first.shape[:2], "height", "width"))
    assert lift(dataclasses.replace(program, inputs=(claimed, *others))) is None


def test_a_file_keeps_the_names_of_inputs(tmp_path: Path) -> None:
    """Plans know a program by its code: a copy of a graph calls `input` `input_1`, its file must not."""
    program = capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU()).eval(), (torch.randn(2, 4),)).copy()
    program.save(tmp_path / "a.pt2")
    assert load(tmp_path / "a.pt2").graph_module.code == program.graph_module.code


def test_modules_may_be_called_what_python_cannot_say(tmp_path: Path) -> None:
    model = nn.Sequential()
    for name in ("block-0", "block_0", "2 layers", "größe²"):
        model.add_module(name, nn.Linear(4, 4))
    x = torch.randn(3, 4)
    result = graphopt.optimize(model.eval(), x, "fold", bench=False)
    assert lift(result.program) is not None
    torch.testing.assert_close(torch.from_numpy(result.artifact.session()(x.numpy())[0]), model(x).detach())
    torch.testing.assert_close(load(result.program.save(tmp_path / "program.pt2"))(x), model(x))

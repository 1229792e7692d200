"""Exporting again: once a program, never stale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.export import ExportedProgram

from graphopt import Program, capture, load
from graphopt.ir.exporting import exported
from graphopt.ir.provenance import user_line
from graphopt.ir.regions import every_graph_module


class Block(nn.Module):
    """A convolution whose normalisation depends on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor, scale: int = 2) -> tuple[torch.Tensor, int, torch.Tensor]:
        """Return tensors beside a dynamic size."""
        y = self.norm(self.conv(x)) * scale
        return y, x.shape[0], y.relu()


@pytest.fixture
def program() -> Program:
    """A captured block."""
    torch.manual_seed(0)
    return capture(Block().eval(), (torch.randn(2, 3, 6, 6),))


def test_a_program_is_exported_once_and_its_calls_are_known_by_its_own_names(program: Program) -> None:
    found = exported(program)
    assert exported(program) is found
    calls = [node for node in found.program.graph.nodes if node.op == "call_function" and node.name in found.sources]
    own = {node.name: node.target for node in program.graph.nodes}
    assert {own[found.sources[node.name]] for node in calls} >= {torch.ops.aten.conv2d.default}
    assert all(own[found.sources[node.name]] is node.target for node in calls)
    assert not any("graphopt.source" in node.meta.get("custom", {}) for node in found.program.graph.nodes)


def test_what_is_written_is_in_evaluation_mode(program: Program) -> None:
    def flags(found: ExportedProgram) -> list[object]:
        return [node.args[5] for node in found.graph.nodes if node.target is torch.ops.aten.batch_norm.default]

    assert flags(exported(program).program) == [False]
    assert flags(exported(program.train()).program) == [False]
    # in training the exporter may write the normalisation as another operator
    assert flags(program.export()) in ([True], [])


def test_an_edit_in_place_exports_anew(program: Program) -> None:
    def targets() -> set[object]:
        return {node.target for node in exported(program).program.graph.nodes}

    assert torch.ops.aten.relu.default in targets()
    (relu,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    relu.target = torch.ops.aten.tanh.default
    program.graph_module.recompile()
    assert torch.ops.aten.relu.default not in targets()
    before = exported(program)
    conv = program.graph_module.get_submodule("conv")
    conv.weight = nn.Parameter(conv.get_parameter("weight") + 1)
    assert exported(program) is not before


def test_what_is_trained_after_an_export_is_what_is_saved(program: Program, tmp_path: Path) -> None:
    own = program.copy(share_tensors=False)
    exported(own)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(1)
    x = own.flat_examples()
    torch.testing.assert_close(load(own.save(tmp_path / "own.pt2")).call_flat(x), own.call_flat(x))


def test_an_edit_in_a_branch_exports_anew() -> None:
    class Either(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = torch.cond(x.sum() > 0, torch.sin, torch.tanh, (x,))
            return y

    program = capture(Either(), torch.randn(3, 4))
    before = exported(program)
    branches = [m for m in program.graph_module.modules() if isinstance(m, fx.GraphModule)][1:]
    (sin,) = [node for branch in branches for node in branch.graph.nodes if node.target is torch.ops.aten.sin.default]
    sin.target = torch.ops.aten.cos.default
    assert exported(program) is not before


def test_bodies_of_regions_hold_nothing_of_the_process_that_exported_them(tmp_path: Path) -> None:
    """Neither addresses nor how many graphs it had generated code of: the same model gives the same bytes."""

    class Regions(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.conv(x).relu()
            taken: torch.Tensor = torch.cond(x.sum() > 0, lambda y: y.relu() * 2, torch.tanh, (y.float(),))
            return taken

    torch.manual_seed(0)
    model = Regions().eval()
    one, two = (capture(model, torch.ones(2, 3, 6, 6)) for _ in range(2))
    saved = [program.save(tmp_path / name) for program, name in ((one, "one.pt2"), (two, "two.pt2"))]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    again = load(saved[0])
    for program in (one, again):
        graphs = every_graph_module(program.graph_module)
        assert len(graphs) == 4
        assert user_line(next(node for node in graphs[-1].graph.nodes if node.op == "call_function")).startswith(
            __file__
        )
        for node in (node for graph in graphs for node in graph.graph.nodes):
            assert "eval_with_key" not in node.meta.get("stack_trace", "")
            assert not {"from_node", "graphopt.source"} & {*node.meta, *(node.meta.get("custom") or {})}
    assert again.save(tmp_path / "again.pt2").read_bytes() == saved[0].read_bytes()

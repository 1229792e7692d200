"""Programs that write to their own memory."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

import graphopt


class Remembers(nn.Module):
    """Keeps the mean of what it saw last, and how often it was called; returns neither, and one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("last", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.add_(1)
        self.last.copy_(x.mean(0))
        return self.layer(x), self.last


def state(program: graphopt.Program) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in program.state_dict().items()}


def unmoved(program: graphopt.Program, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict().items())


def test_running_a_program_leaves_what_it_writes_as_it_was() -> None:
    x = torch.randn(8, 4)
    program = graphopt.capture(Remembers(), (x,))
    before = state(program)
    for found, last in (program(x), program.call_flat((x,))):
        torch.testing.assert_close(last, x.mean(0))
        assert found.requires_grad
    assert unmoved(program, before)


def test_nothing_of_the_data_stays_in_a_result_that_replays(tmp_path: Path) -> None:
    data = torch.randn(40, 4) + 7
    labels = torch.arange(40) % 2
    result = graphopt.optimize(Remembers(), data, "fold", eval=(data, labels), bench=False)
    result.artifact.session()(data.numpy())
    for program in (result.original, result.program):
        assert program is not None
        assert float(program.state_dict()["last"].abs().max()) == 0
        program(data)
    result.save(tmp_path / "one")
    result.program(data)
    result.save(tmp_path / "two")
    pickle.dumps(result)
    assert result.original is not None
    replayed = graphopt.replay(result.original, tmp_path / "one" / "manifest.json")
    assert len(replayed) == 1


def test_training_still_moves_statistics() -> None:
    program = graphopt.capture(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), (torch.randn(8, 4),)).train()
    before = state(program)
    program(torch.randn(8, 4) + 3)
    assert not unmoved(program, before)


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.offset, x.mean(0))


def test_a_rewritten_graph_is_looked_at_again() -> None:
    program = graphopt.capture(Adds(), (torch.randn(8, 4),))
    program(torch.randn(8, 4))
    (add,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    add.target = torch.ops.aten.add_.Tensor
    program.graph_module.recompile()
    before = state(program)
    program(torch.randn(8, 4))
    assert unmoved(program, before)

"""Program: a value whose copies share tensors, that trains, saves and comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from graphopt.capturing.capture import capture
from graphopt.capturing.load import load
from graphopt.errors import UsageError
from graphopt.ir.program import Program


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 5)
    )


@pytest.fixture
def program() -> Program:
    return capture(_net(), torch.randn(2, 3, 8, 8))


def test_a_copy_shares_tensors_but_not_the_graph(program: Program) -> None:
    twin = program.copy()
    assert twin.graph is not program.graph
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in program.parameters()]
    assert twin.graph_module.code == program.graph_module.code


def test_whoever_trains_copies_first(program: Program) -> None:
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    student = program.copy(share_tensors=False).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    student(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    for name, tensor in program.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert any(not torch.equal(t, before[name]) for name, t in student.state_dict().items())


def test_tied_weights_stay_tied_in_a_copy() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4, bias=False)
            self.two = nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.two(self.one(x))
            return y

    twin = capture(Tied(), torch.randn(2, 4)).copy(share_tensors=False)
    assert len(list(twin.parameters())) == 1


def test_training_mode_moves_statistics_and_drops_values(program: Program) -> None:
    student = program.copy(share_tensors=False).train()
    x = torch.randn(8, 3, 8, 8)
    mean = student.state_dict()["1.running_mean"].clone()
    assert not torch.equal(student(x), student(x))
    assert not torch.equal(student.state_dict()["1.running_mean"], mean)
    student.eval()
    torch.testing.assert_close(student(x), student(x), rtol=0, atol=0)


def test_save_and_load_keep_names_axes_and_outputs(program: Program, tmp_path: Path) -> None:
    path = program.save(tmp_path / "program.pt2")
    found = load(path)
    assert found.inputs == program.inputs
    assert found.outputs == program.outputs
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(found(x), program(x), rtol=0, atol=0)


def test_saving_twice_gives_the_same_bytes(program: Program, tmp_path: Path) -> None:
    one = program.save(tmp_path / "one.pt2").read_bytes()
    assert program.copy().save(tmp_path / "two.pt2").read_bytes() == one


def test_an_interrupted_save_leaves_nothing(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(UsageError, match=r"No space left on device\. Nothing was left half-written"):
        program.save(tmp_path / "program.pt2")
    assert list(tmp_path.iterdir()) == []


def test_flat_calls_name_the_missing_input(program: Program) -> None:
    with pytest.raises(UsageError, match=r"takes 1 inputs \(input\), 0 were given"):
        program.call_flat(())

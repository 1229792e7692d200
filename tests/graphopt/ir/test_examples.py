"""Example inputs that are made up."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import CaptureError
from graphopt.ir.finite import all_finite
from graphopt.ir.training import is_training


class Rooted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt().log1p()


class Averaged(nn.Module):
    """Token ids in a row, where each text starts, and how long it says it is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, ids: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        return (self.table(ids) * mask[..., None]).sum(1) / lengths[:, None]


class Large(nn.Module):
    def forward(self, count: Tensor) -> Tensor:
        return (count - 4).float().sqrt()


class FromThousand(nn.Module):
    """Token ids that start at 1,000."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(500, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids - 1000)


def test_two_rows_of_other_values() -> None:
    x = torch.randn(64, 3, 5)
    program = graphopt.capture(nn.Sequential(nn.Flatten(), nn.Linear(15, 2)), (x,))
    (found,) = program.made_up_examples()
    assert found.shape == (2, 3, 5)
    assert not torch.equal(found, x[:2])
    (again,) = program.made_up_examples()
    assert torch.equal(found, again)


def test_a_fixed_batch_keeps_its_size() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(4, 6) + torch.ones(4, 6)

    (found,) = graphopt.capture(Fixed(), (torch.ones(4, 6),)).made_up_examples()
    assert found.shape == (4, 6)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Rooted(), (torch.rand(8, 4),)),
        (Averaged(), (torch.randint(0, 7, (8, 5)), torch.full((8,), 5), torch.ones(8, 5, dtype=torch.bool))),
        (Large(), (torch.full((8,), 9),)),
        (FromThousand(), (torch.randint(1000, 1500, (8, 5)),)),
    ],
)
def test_values_that_the_program_computes_numbers_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    program = graphopt.capture(model, inputs)
    made = program.made_up_examples()
    assert [tensor.dtype for tensor in made] == [tensor.dtype for tensor in inputs]
    assert all(all_finite(output) for output in program.call_flat(made))


def test_many_inputs_are_made_up_at_once() -> None:
    class Sum(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return torch.stack(tensors).sum(0)

    inputs = tuple(torch.ones(2, 3, dtype=torch.int64) for _ in range(40))
    assert len(graphopt.capture(Sum(), inputs).made_up_examples()) == 40


def test_a_program_that_takes_nothing_made_up_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    program = graphopt.capture(nn.Linear(2, 2), (torch.ones(2, 2),))

    def refuse(_: Any) -> Any:
        raise RuntimeError("not these")

    monkeypatch.setattr(type(program), "call_flat", lambda self, tensors: refuse(tensors))
    with pytest.raises(CaptureError, match=r"runs on no example inputs that are made up \(not these\)"):
        program.made_up_examples()


@pytest.mark.parametrize("integers", [False, True])
def test_nothing_that_is_written_holds_the_data(
    integers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    data: Any = torch.randn(40, 16)
    if integers:
        model, data = (
            nn.Sequential(nn.Embedding(5000, 8), nn.Flatten(), nn.Linear(128, 4)),
            torch.randint(0, 5000, (40, 16)),
        )
    model(data).sum().backward()
    result = graphopt.optimize(model, data, passes="prune,svd", eval=(data, torch.arange(40) % 4), bench=False)
    result.save(tmp_path / "out")
    (tmp_path / "result.pickle").write_bytes(pickle.dumps(result))
    graphopt.capture(model, (data,)).save(tmp_path / "captured.pt2")
    graphopt.open(tmp_path / "out").program.save(tmp_path / "again.pt2")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 6
    assert len([path for path in files if path.parent.name == "cache"]) > 2
    rows = [row.numpy().tobytes()[:24] for row in data]
    found = {path.name for path in files for content in [path.read_bytes()] if any(row in content for row in rows)}
    assert found == set()


def test_a_captured_program_does_not_keep_its_data_alive() -> None:
    data = torch.randn(500, 4)
    result = graphopt.optimize(nn.Linear(4, 2), data, passes="", target=None)
    assert sum(tensor.untyped_storage().nbytes() for tensor in result.original.flat_examples()) == 2 * 4 * 4  # type: ignore[union-attr]


def test_making_them_up_leaves_statistics_and_mode_alone() -> None:
    program = graphopt.capture(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), (torch.randn(8, 4),)).train()
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    program.made_up_examples()
    assert is_training(program.graph_module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict().items())

"""Running a graph node by node: same results, nothing kept longer than it is read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.data.batches import Batch
from graphopt.ir.program import Program
from graphopt.statistics.stepping import Stepper, peak_bytes_per_sample
from tests.models import Residual, example


def finished(program: Program, *batches: Batch) -> Stepper:
    stepper = Stepper(program, batches)
    for _ in program.graph.nodes:
        stepper.step()
    with pytest.raises(StopIteration):
        stepper.step()
    return stepper


def test_every_batch_gives_what_the_program_gives() -> None:
    program = capture(Residual().double(), (example(Residual),))
    batches = [(example(Residual, 3),), (example(Residual, 5),)]
    stepper = Stepper(program, batches)
    output = next(node for node in program.graph.nodes if node.op == "output")
    stepper.run_until(output)
    for (x,), found in zip(batches, stepper.values[output], strict=True):
        assert torch.equal(found[0], program(x))


def test_a_value_is_forgotten_after_its_last_reader() -> None:
    program = capture(Residual().double(), (example(Residual),))
    stepper = finished(program, (example(Residual),))
    assert [node.op for node in stepper.values] == ["output"]


def test_a_replaced_tensor_is_seen_by_later_nodes_and_the_program_keeps_its_own() -> None:
    program = capture(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), (torch.randn(2, 3),))
    first, second = [node for node in program.graph.nodes if "linear" in node.name]
    stepper = Stepper(program, [(torch.ones(2, 3),)])
    stepper.run_until(first)
    stepper.replace("1.weight", torch.zeros(2, 3))
    stepper.run_until(second)
    assert torch.equal(stepper.values[second][0], program.state_dict()["1.bias"].expand(2, -1))
    assert program.state_dict()["1.weight"].any()


def test_a_program_that_writes_to_a_buffer_does_not_change_its_own() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(x.sum(0))
            return x * 2

    x = torch.ones(2, 3)
    program = capture(Counts(), (x,))
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    finished(program, (x,), (x,))
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict().items())


def test_the_peak_counts_what_is_alive_at_once() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.repeat(1, 10).relu().sum(1, keepdim=True)

    found = peak_bytes_per_sample(capture(Wide(), (torch.randn(100, 4)[:2],)))
    assert found == 4 * 40  # bytes of a repeated row; what a node has read for the last time is gone behind it

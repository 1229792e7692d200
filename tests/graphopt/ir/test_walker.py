"""Running a graph node by node: same results, nothing kept longer than it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, fx, nn
from torch._higher_order_ops.map import map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from graphopt.capturing.capture import capture
from graphopt.data.batches import Batch
from graphopt.ir.program import Program
from graphopt.ir.walker import Walker
from tests.models import Residual, example


def finished(program: Program, *batches: Batch) -> Walker:
    walker = Walker(program).start(batches)
    for _ in program.graph.nodes:
        walker.step()
    with pytest.raises(StopIteration):
        walker.step()
    return walker


def test_every_batch_gives_what_the_program_gives() -> None:
    program = capture(Residual().double(), (example(Residual),))
    batches = [(example(Residual, 3),), (example(Residual, 5),)]
    walker = Walker(program).start(batches)
    output = next(node for node in program.graph.nodes if node.op == "output")
    walker.run_until(output)
    for (x,), found in zip(batches, walker.values[output], strict=True):
        assert torch.equal(found[0], program(x))


def test_a_value_is_forgotten_after_its_last_reader() -> None:
    program = capture(Residual().double(), (example(Residual),))
    walker = finished(program, (example(Residual),))
    assert [node.op for node in walker.values] == ["output"]


def test_what_one_batch_has_used_is_forgotten_before_the_next_is_run() -> None:
    left: list[int] = []

    class Counting(Walker):
        def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            left.extend(sum(value is not None for value in self.values[used]) for used in node.all_input_nodes)
            return super().call(node, args, kwargs)

    x = torch.ones(2, 3)
    program = capture(nn.Sequential(nn.ReLU(), nn.Sigmoid()), (x,))
    walker = Counting(program).start([(x,), (x,), (x,)])
    walker.run_until(list(program.graph.nodes)[-1])
    assert left == [3, 2, 1, 3, 2, 1]


def test_a_value_that_nobody_reads_is_forgotten_at_once() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor, unread: Tensor) -> Tensor:
            y = x * 2
            y[0].add_(1)
            return y + 1

    x = torch.ones(2, 3)
    program = capture(Writes(), (x, x))
    walker = finished(program, (x, x))
    assert [node.op for node in walker.values] == ["output"]
    assert torch.equal(finished_values(walker, (x, x))[0][0], program(x, x))


def test_a_replaced_tensor_is_seen_by_later_nodes_and_the_program_keeps_its_own() -> None:
    program = capture(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), (torch.randn(2, 3),))
    first, second = [node for node in program.graph.nodes if "linear" in node.name]
    walker = Walker(program).start([(torch.ones(2, 3),)])
    walker.run_until(first)
    walker.replace("1.weight", torch.zeros(2, 3))
    walker.run_until(second)
    assert torch.equal(walker.values[second][0], program.state_dict()["1.bias"].expand(2, -1))
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


class _Writing(nn.Module):
    """Writes to a buffer, reads it again, and writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.copy_(x.sum(0))
        return self.fc(x.mul_(2)) + self.seen


def _reading_twice(program: Program) -> Program:
    """Let the last sum read the buffer for itself, as it may after a rewrite."""
    program = program.copy()
    total = next(node for node in program.graph.nodes if node.name == "add")
    (read,) = [node for node in program.graph.nodes if node.op == "get_attr" and node.target == "seen"]
    with program.graph.inserting_before(total):
        again = program.graph.get_attr("seen")
    again.meta = dict(read.meta)
    total.update_arg(1, again)
    program.graph_module.recompile()
    return program


def test_what_is_written_is_seen_by_every_read_of_one_batch_alone() -> None:
    torch.manual_seed(0)
    x = torch.ones(2, 3)
    program = _reading_twice(capture(_Writing(), (x,)))
    fc = nn.Linear(3, 3)
    fc.load_state_dict({name.removeprefix("fc."): t for name, t in program.state_dict().items() if "fc" in name})
    walker = Walker(program)
    for _ in range(2):  # of two walks, neither sees the other's writes
        output = finished_values(walker, (x,), (x,))
        for found in output:
            torch.testing.assert_close(found[0], fc(2 * torch.ones(2, 3)) + 2)
    assert torch.equal(x, torch.ones(2, 3))
    assert torch.equal(program.state_dict()["seen"], torch.zeros(3))


def finished_values(walker: Walker, *batches: Batch) -> list[tuple[Tensor, ...]]:
    output = next(node for node in walker.program.graph.nodes if node.op == "output")
    walker.start(batches).run_until(output)
    return walker.values[output]


def test_how_a_call_is_run_and_what_is_read_can_be_overridden() -> None:
    class Doubling(Walker):
        def read(self, node: fx.Node) -> Any:
            return super().read(node) * 2

        def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return super().call(node, args, kwargs).relu()

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    program = capture(nn.Linear(3, 2), (x,))
    (found,) = Doubling(program).run((x,))
    torch.testing.assert_close(found, (program(x) * 2).relu())


@pytest.mark.parametrize("kind", ["cond", "while_loop", "scan", "map_impl"])
def test_regions_run_at_any_size_and_torch_compiles_none_of_them(kind: str) -> None:
    """Else whether a program runs would hang on how often it did, and on what ran before it."""
    program = capture(_REGIONS[kind].eval(), (torch.randn(2, 5, 4),))
    assert [node for node in program.graph.nodes if getattr(node.target, "__name__", "") == kind]
    torch._dynamo.reset()  # what was compiled before would not be counted again
    torch._dynamo.utils.counters.clear()
    for samples in range(3, 9):
        x = torch.randn(samples, 5, 4)
        torch.testing.assert_close(program(x), program.call_flat((x,))[0])  # with gradients
        with torch.no_grad():
            assert torch.equal(Walker(program).run((x,))[0], program(x))
    assert not torch._dynamo.utils.counters["stats"]
    torch.cond(torch.tensor(True), lambda x: x.relu(), lambda x: x.tanh(), (torch.ones(2),))
    assert torch._dynamo.utils.counters["stats"]  # what is compiled is counted


class _Region(nn.Module):
    def __init__(self, kind: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self._kind = nn.Linear(4, 4), kind

    def forward(self, x: Tensor) -> Tensor:
        return self._kind(self.fc, x)


def _loop(fc: nn.Module, x: Tensor) -> Tensor:
    return while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, fc(x).tanh()), (torch.tensor(0), x))[1]  # type: ignore[no-any-return]


_REGIONS = {
    "cond": _Region(lambda fc, x: torch.cond(x.sum() > 0, lambda x: fc(x).relu(), lambda x: fc(x), (x,))),
    "while_loop": _Region(_loop),
    "scan": _Region(lambda fc, x: scan(lambda c, x: (fc(c) + x, c.relu()), x[:, 0] * 0, x.transpose(0, 1))[1]),
    "map_impl": _Region(lambda fc, x: map(lambda row: fc(row).relu(), x)),
}

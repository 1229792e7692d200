"""Running a program node by node: what everyone who looks at the values inside it is built on.

A walk goes through the graph once, for several batches at once, and forgets each value after its last use; what nobody
uses at once. Two programs can so be walked side by side, and a tensor of one replaced by what the values so far say it
should be. How a call is run, and what a read of a tensor gives, is for a subclass to change. A region is one call.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, fx

from graphopt.ir.aliasing import Storages
from graphopt.ir.program import Program


class Walker:
    """Walks through one program, as often as it is started; neither the program nor its inputs are written to.

    Attributes:
        program: what is run.
        values: what each node that is still needed gave, one entry per batch.
        batches: how many batches there are.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.values: dict[fx.Node, list[Any]] = {}
        self.batches = 0
        self._nodes: list[fx.Node] = list(program.graph.nodes)
        self._last_user = {used: node for node in self._nodes for used in node.all_input_nodes}
        sources = [node for node in self._nodes if node.op in ("placeholder", "get_attr")]
        storages = Storages(program.graph)
        self._written = {(node.op, node.target) for node in sources if storages.writes(node)}

    def start(self, batches: Sequence[Sequence[Tensor]]) -> Self:
        """Begin a walk over batches of flat inputs, each in the order of the program's."""
        self.batches = len(batches)
        self.values = {}
        self._replaced: dict[str, Tensor] = {}
        self._own: dict[str, list[Any]] = {}  # what a read gives of tensors that are written to
        self._pending = iter(self._nodes)
        self._inputs = iter(zip(*map(self.program.flat_arguments, batches), strict=True))
        return self

    def run(self, batch: Sequence[Tensor]) -> Any:
        """Walk through the whole program with one batch and return what its graph returns, flat."""
        self.start([batch])
        self.run_until(self._nodes[-1])
        return self.values.pop(self._nodes[-1])[0]

    def run_until(self, node: fx.Node) -> None:
        """Run everything up to and with `node`, which has not been run yet."""
        while self.step() is not node:
            pass

    @torch.no_grad()
    def step(self) -> fx.Node:
        """Run the next node for every batch and return it.

        Raises:
            StopIteration: the graph is at its end.
        """
        node = next(self._pending)
        self.values[node] = self._results(node)
        for argument in self._read_last(node):
            del self.values[argument]
        if not node.users and node.op != "output":
            del self.values[node]
        return node

    def replace(self, name: str, tensor: Tensor) -> None:
        """Let every later use of the parameter or buffer `name` see `tensor`. The program is not changed."""
        self._replaced[name] = tensor
        for node, held in self.values.items():
            if node.op == "get_attr" and node.target == name:
                held[:] = [tensor] * self.batches

    def read(self, node: fx.Node) -> Any:
        """Return the parameter, buffer or constant that a node reads, or the body of a region."""
        return operator.attrgetter(str(node.target))(self.program.graph_module)

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call for one batch."""
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _results(self, node: fx.Node) -> list[Any]:
        written = (node.op, node.target) in self._written
        if node.op == "placeholder":
            given = list(next(self._inputs))
            return [_copy(value) for value in given] if written else given
        if node.op == "get_attr":
            name = str(node.target)
            if name in self._replaced:
                return [self._replaced[name]] * self.batches
            if not written:
                return [self.read(node)] * self.batches
            if name not in self._own:
                self._own[name] = [_copy(self.read(node)) for _ in range(self.batches)]
            return list(self._own[name])
        results = []
        for index in range(self.batches):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: self.values[used][index])  # noqa: B023
            results.append(args[0] if node.op == "output" else self.call(node, args, kwargs))
            for argument in self._read_last(node):
                self.values[argument][index] = None  # at once, or operands and results of all batches would coexist
        return results

    def _read_last(self, node: fx.Node) -> list[fx.Node]:
        return [argument for argument in node.all_input_nodes if self._last_user[argument] is node]


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value

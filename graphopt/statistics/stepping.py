"""Run a graph one node at a time over several batches at once, forgetting each value after its last use.

Two graphs can so be run side by side, and a tensor of one replaced by what the values so far say it should be,
in one pass over the data instead of one per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.data.batches import Batch
from graphopt.ir.program import Program
from graphopt.ir.torch_internals import pytree, tree_flatten_spec


class Stepper:
    """One program halfway through its graph, for every batch.

    Attributes:
        values: what each node that is still needed gave, one entry per batch.
        batches: how many batches there are.
    """

    def __init__(self, program: Program, batches: Sequence[Batch]) -> None:
        self.values: dict[fx.Node, list[Any]] = {}
        self.batches = len(batches)
        self._gm = program.graph_module
        self._replaced: dict[str, torch.Tensor] = {}
        self._last_user = _last_users(program.graph)
        self._writes = any(_writes(node) for node in program.graph.nodes)
        nodes: list[fx.Node] = list(program.graph.nodes)
        self._pending = iter(nodes)
        self._inputs = [self._flat(program, batch) for batch in batches]
        self._placeholders = 0

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """Let every later use of the parameter or buffer `name` see `tensor`. The program is not changed."""
        self._replaced[name] = tensor
        for node, held in self.values.items():
            if node.op == "get_attr" and node.target == name:
                held[:] = [tensor] * self.batches

    def run_until(self, node: fx.Node) -> None:
        """Run everything up to and with `node`, which has not been run yet."""
        while self.step() is not node:
            pass

    def step(self) -> fx.Node:
        """Run the next node for every batch and return it.

        Raises:
            StopIteration: the graph is at its end.
        """
        node = next(self._pending)
        with torch.no_grad():
            self.values[node] = self._run(node)
        for argument in self._read_last(node):
            del self.values[argument]
        return node

    def live_bytes(self) -> int:
        """Return the bytes of all values that are held, each storage once; parameters are not counted."""
        held = (entry for node, entries in self.values.items() if node.op != "get_attr" for entry in entries)
        tensors = (leaf for entry in held for leaf in pytree.tree_leaves(entry) if isinstance(leaf, torch.Tensor))
        sizes: dict[int, int] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            # An input may be a small part of a large tensor of the user's, an expanded value less than it looks.
            used = min(storage.nbytes(), tensor.numel() * tensor.element_size())
            sizes[storage.data_ptr()] = max(used, sizes.get(storage.data_ptr(), 0))
        return sum(sizes.values())

    def _run(self, node: fx.Node) -> list[Any]:
        if node.op == "placeholder":
            self._placeholders += 1
            return [flat[self._placeholders - 1] for flat in self._inputs]
        if node.op == "get_attr":
            return [self._attribute(str(node.target)) for _ in range(self.batches)]
        results = []
        for index in range(self.batches):
            args, kwargs = self._arguments(node, index)
            results.append(args[0] if node.op == "output" else node.target(*args, **kwargs))  # type: ignore[operator]
            for argument in self._read_last(node):
                self.values[argument][index] = None  # at once, or operands and results of all batches would coexist
        return results

    def _read_last(self, node: fx.Node) -> list[fx.Node]:
        return [argument for argument in node.all_input_nodes if self._last_user[argument] is node]

    def _arguments(self, node: fx.Node, index: int) -> Any:
        return fx.map_arg((node.args, node.kwargs), lambda used: self.values[used][index])

    def _attribute(self, name: str) -> Any:
        if name in self._replaced:
            return self._replaced[name]
        value: Any = self._gm
        for part in name.split("."):
            value = getattr(value, part)
        return value.detach().clone() if self._writes and isinstance(value, torch.Tensor) else value

    def _flat(self, program: Program, batch: Batch) -> list[Any]:
        args, kwargs = program.unflatten(batch)
        leaves = tree_flatten_spec((args, kwargs), program.graph_module._in_spec)
        return [leaf.clone() if self._writes and isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def peak_bytes_per_sample(program: Program) -> int:
    """Return the most bytes of values that one sample keeps alive between two nodes, measured on the examples."""
    examples = program.flat_examples()
    stepper = Stepper(program, [examples])
    peak = 0
    for _ in program.graph.nodes:
        stepper.step()
        peak = max(peak, stepper.live_bytes())
    return peak // (program.batch_size or len(examples[0]))


def _last_users(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for argument in node.all_input_nodes:
            found[argument] = node
    return found


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)

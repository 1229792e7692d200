"""Finds residual branches: sums one side of which is computed from the other.

    x + f(x)                 identity shortcut           f may go
    x + a(x) + b(x)          parallel branches           a may go, b may go
    p(x) + f(x)              projected shortcut          f may go: it has more layers than p, which has at most one
    norm(x + f(x))           post-norm                   f may go
    x + f(x, memory, mask)   side inputs                 f may go, what it is given stays

A branch is what would be dead if the sum did not read it: the calls every path from which leads through its result.
What a branch computes for others as well (a position bias, keys and values that are returned) stays. Two branches are
therefore disjoint, or one lies inside the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from graphopt.ir.aliasing import Storages, written_inputs
from graphopt.ir.graph import arguments, constant
from graphopt.ir.names import Names
from graphopt.ir.operators import SCALED_DROPOUTS, SUBTRACTIONS, SUMS
from graphopt.ir.provenance import module_path
from graphopt.ir.torch_internals import statically_known_true
from graphopt.passes.layers.recognition import Layers
from graphopt.passes.residuals.kind import BranchKind, describe
from graphopt.pipeline.plan import Refusal

aten = torch.ops.aten
_INPUTS = "inputs"  # root of the dominator tree


@dataclass(frozen=True, eq=False)
class Branch:
    """One residual branch that can be taken out.

    Attributes:
        name: unique in the program: the module that all its layers belong to, else the last one's, and the kind:
            "layer1.0:convolution".
        kind: what it mainly computes.
        result: what it gives to the sum.
        sum: the addition (or subtraction) that reads it.
        stays: the sum's other operand, which takes the place of the sum.
        nodes: the calls that go with it, in graph order.
    """

    name: str
    kind: BranchKind
    result: fx.Node
    sum: fx.Node
    stays: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def key(self) -> str:
        """Name of what the result is, dropouts left out: the same when others of its sum have gone."""
        return _through_dropouts(self.result).name

    def holds(self, other: Branch) -> bool:
        """Whether `other` lies inside this branch."""
        return other is not self and other.sum in self.nodes


def find_branches(gm: fx.GraphModule) -> tuple[list[Branch], list[Refusal]]:
    """List the residual branches of a graph in the order of their sums, and why others cannot go."""
    graph = _Graph(gm)
    found: list[Branch] = []
    refusals: list[Refusal] = []
    names = Names(mark="#")
    for total in gm.graph.nodes:
        if total in graph.idle:
            continue
        for result, stays in _operands(total):
            nodes = graph.only_for(result, total)
            inside = graph.residual(total, result, stays, nodes)
            if not inside:
                continue
            kind, path = describe(nodes if nodes else inside, graph.layers)
            name = names.new(f"{path or module_path(result) or result.name}:{kind}")
            branch = Branch(name, kind, result, total, stays, tuple(nodes))
            reason, counted_as = _why_not(branch, graph)
            if reason:
                refusals.append(Refusal(name, reason, counted_as))
            else:
                found.append(branch)
    results = {branch.result for branch in found}
    return [branch for branch in found if not _is_sum_of(branch.result, results)], refusals


class _Graph:
    """What the search asks about a graph."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.layers = Layers(gm)
        self.order: Mapping[fx.Node, int] = {node: index for index, node in enumerate(gm.graph.nodes)}
        self.storages = Storages(gm.graph)
        self.outputs = next(node for node in gm.graph.nodes if node.op == "output").all_input_nodes
        self.idle = idle(gm.graph)
        self._dominators: Mapping[fx.Node, fx.Node] = _dominators(gm.graph)
        self._terms: dict[fx.Node, Mapping[fx.Node, None]] = {}

    def only_for(self, result: fx.Node, total: fx.Node) -> list[fx.Node]:
        """List the calls that `total` alone needs, through its operand `result`, in graph order."""
        return sorted(only_for(result, total, self.idle), key=self.order.__getitem__)

    def residual(self, total: fx.Node, result: fx.Node, stays: fx.Node, nodes: list[fx.Node]) -> list[fx.Node]:
        """List the calls between a shortcut of the sum and `result`; empty where they are no block with weights."""
        read = self._read_by(nodes) if nodes else [result]
        above = self._above(read, self._terms_of(_whole_sum(total)))
        own = _terms(result, top=False)
        for shortcut in above:
            if shortcut in own:
                continue
            between = self._between(shortcut, result)
            if between and any(node in self.layers for node in between):
                return between
        # an identity among its own terms is the shortcut; what else is added to it is a branch like others
        return [] if any(term in own for term in above) else self._projected(total, stays, nodes)

    def _projected(self, total: fx.Node, stays: fx.Node, nodes: list[fx.Node]) -> list[fx.Node]:
        other = self.only_for(stays, total)
        sources = self._read_by(other)
        if len(sources) != 1 or sources[0] not in self._read_by(nodes):
            return []
        layers, kept = (sum(node in self.layers for node in side) for side in (nodes, other))
        return nodes if kept <= 1 and kept < layers else []

    def _above(self, values: Iterable[fx.Node], terms: Mapping[fx.Node, None]) -> list[fx.Node]:
        """List the terms of a sum through which everything comes, from the inputs, that reaches one of `values`.

        A term that is no such value is a mask, or a bias of attention scores: no branch's input comes through it.
        """
        first = min((self.order[term] for term in terms), default=0)
        seen: set[fx.Node] = set()
        for value in values:
            current: fx.Node | None = value
            while current is not None and current not in seen and self.order[current] >= first:
                seen.add(current)
                current = self._dominators.get(current)
        return [term for term in terms if term in seen and term.op != "get_attr"]

    def _terms_of(self, total: fx.Node) -> Mapping[fx.Node, None]:
        if total not in self._terms:
            self._terms[total] = _terms(total)
        return self._terms[total]

    def _between(self, start: fx.Node, end: fx.Node) -> list[fx.Node]:
        """List the calls on the ways from `start` to `end`, `end` included; empty if there is none."""
        if start is end:
            return []
        first = self.order[start]
        behind = {end}
        pending = [end]
        while pending:
            for source in pending.pop().all_input_nodes:
                if source not in behind and self.order[source] > first:
                    behind.add(source)
                    pending.append(source)
        reached = {start}
        for node in sorted(behind, key=self.order.__getitem__):
            if not reached.isdisjoint(node.all_input_nodes):
                reached.add(node)
        return sorted(reached - {start}, key=self.order.__getitem__) if end in reached else []

    def _read_by(self, nodes: list[fx.Node]) -> list[fx.Node]:
        """List what is computed outside `nodes` and read inside, sizes left out."""
        inside = set(nodes)
        read = (source for node in nodes for source in node.all_input_nodes if source not in inside)
        return list(dict.fromkeys(n for n in read if n.op != "get_attr" and not _is_number(n)))


def idle(graph: fx.Graph) -> set[fx.Node]:
    """Return the calls that nothing depends on: assertions, and what is computed for them alone."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "call_function" and found.issuperset(node.users) and not written_inputs(node):
            found.add(node)
    return found


def only_for(result: fx.Node, total: fx.Node, idle_calls: set[fx.Node]) -> set[fx.Node]:
    """Return the calls that `total` alone needs, through its operand `result`."""
    inside: set[fx.Node] = set()
    unread: dict[fx.Node, int] = {}  # how many readers of a value are not known to be inside
    pending = [result] if {total}.issuperset(user for user in result.users if user not in idle_calls) else []
    while pending:
        node = pending.pop()
        if node.op != "call_function":
            continue
        inside.add(node)
        for source in node.all_input_nodes:
            if source not in unread:
                unread[source] = sum(user not in idle_calls for user in source.users)
            unread[source] -= 1
            if not unread[source]:
                pending.append(source)
    return inside


def _dominators(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Return the immediate dominator of each value that depends on an input, inputs themselves left out."""
    data: nx.DiGraph[fx.Node | str] = nx.DiGraph()
    data.add_node(_INPUTS)
    for node in graph.nodes:
        if node.op == "placeholder":
            data.add_edge(_INPUTS, node)
        data.add_edges_from((source, node) for source in node.all_input_nodes if not _is_number(source))
    found = nx.immediate_dominators(data, _INPUTS)
    return {n: by for n, by in found.items() if isinstance(n, fx.Node) and isinstance(by, fx.Node)}


def _operands(total: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield (what may go, what stays) of a sum of two computed tensors."""
    if total not in SUMS or len(total.args) < 2:
        return
    one, other = total.args[:2]
    if not (isinstance(one, fx.Node) and isinstance(other, fx.Node)) or one is other:
        return
    if "get_attr" in (one.op, other.op) or not (_is_tensor(one) and _is_tensor(other)):
        return
    yield one, other
    yield other, one


def _whole_sum(total: fx.Node) -> fx.Node:
    """Return the sum that `total` is a term of, through sums and dropouts that alone read it."""
    current = whole = total
    while len(current.users) == 1:
        current = next(iter(current.users))
        if current in SUMS:
            whole = current
        elif current not in SCALED_DROPOUTS:
            break
    return whole


def _terms(value: fx.Node, *, top: bool = True) -> dict[fx.Node, None]:
    """Return what is added up to `value`, in order; sums in between that nobody else reads are taken apart."""
    found: dict[fx.Node, None] = {}
    pending = [value]
    while pending:
        term = pending.pop()
        summed = _through_dropouts(term)
        if summed in SUMS and ((top and summed is value) or _alone_leads_to(summed, term)):
            pending += [operand for operand in reversed(summed.args[:2]) if isinstance(operand, fx.Node)]
        else:
            found[term] = None
    return found


def _through_dropouts(value: fx.Node) -> fx.Node:
    """Return what a dropout, or several, drop elements of."""
    while value in SCALED_DROPOUTS:
        source = value.args[0]
        assert isinstance(source, fx.Node)  # by its schema
        value = source
    return value


def _alone_leads_to(value: fx.Node, end: fx.Node) -> bool:
    """Whether nobody reads `value`, the dropouts behind it or their `end` but for the next, and one reads the end."""
    while len(value.users) == 1 and value is not end:
        value = next(iter(value.users))
    return value is end and len(end.users) == 1


def _is_sum_of(value: fx.Node, results: set[fx.Node]) -> bool:
    """Whether `value` is a sum of nothing but branches that can go one by one."""
    return _through_dropouts(value) in SUMS and results.issuperset(_terms(value))


def _why_not(branch: Branch, graph: _Graph) -> tuple[str, str]:
    """Return why a branch cannot go, and what that is counted as; ("", "") if it can."""
    total, stays, inside = branch.sum, branch.stays, {*branch.nodes, branch.sum}
    if not any(node in graph.layers for node in branch.nodes):
        readers = [user for user in branch.result.users if user is not total and user not in graph.idle]
        by = f" (`{readers[0].name}`)" if readers else ""
        return f"what it computes is also read elsewhere{by}", "what it computes is also read elsewhere"
    if not same_form(stays, total):
        return f"the shortcut changes the shape: {_form(stays)} where the sum is {_form(total)}", (
            "the shortcut changes the shape"
        )
    if stays is total.args[1]:
        if total in SUBTRACTIONS:
            return "the shortcut is subtracted", ""
        if arguments(total, ("alpha",))["alpha"] != 1:
            return f"the shortcut is scaled by alpha={arguments(total, ('alpha',))['alpha']}", "the shortcut is scaled"
    writer = _foreign_write(branch, graph.storages, inside)
    if writer is not None:
        return f"`{writer.name}` writes in place to memory that others read", "memory is written in place"
    if stays.op == "placeholder" and total in graph.outputs:
        return "the program would return its input", ""
    return "", ""


def same_form(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values have one dtype and are known to have one shape."""
    first, second = one.meta["val"], other.meta["val"]
    if first.dtype != second.dtype or first.dim() != second.dim():
        return False
    return all(statically_known_true(a == b) for a, b in zip(first.shape, second.shape, strict=True))


def same_layout(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values of one form are known to lie in memory in the same way."""
    strides = zip(one.meta["val"].stride(), other.meta["val"].stride(), strict=True)
    return all(statically_known_true(a == b) for a, b in strides)


def _foreign_write(branch: Branch, storages: Storages, inside: Iterable[fx.Node]) -> fx.Node | None:
    """Return a call that makes the branch, its sum or its shortcut more than values, None if there is none."""
    for value in (branch.stays, branch.sum):
        if storages.writes(value):
            return storages.writes(value)[0]
    members = set(inside)
    for node in branch.nodes:
        for written in written_inputs(node):
            if not members.issuperset(storages.members(written)):
                return node
    return None


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat)


def _form(node: fx.Node) -> str:
    value = node.meta["val"]
    return f"{'x'.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')}"


def stored_parameters(nodes: Iterable[fx.Node], gm: fx.GraphModule) -> int:
    """Return how many numbers are stored for `nodes` alone."""
    inside = set(nodes)
    reads: dict[int, torch.Tensor] = {}
    kept: set[int] = set()
    for node in gm.graph.nodes:
        tensor = constant(node, gm)
        if tensor is None:
            continue
        reads[id(tensor)] = tensor
        if not inside.issuperset(node.users):
            kept.add(id(tensor))
    used = {id(constant(n, gm)) for node in nodes for n in node.all_input_nodes if n.op == "get_attr"}
    return sum(tensor.numel() for key, tensor in reads.items() if key in used and key not in kept)

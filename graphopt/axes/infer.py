"""Axis inference: find a layout for every dimension of a graph, as a type checker finds types.

Each operator's rule contributes equations between the layouts of its inputs, parameters and results; solving
them is unification. What must stay whole is frozen with a reason: graph inputs and outputs, what an unknown
operator touches, what has no common refinement, dimensions whose order matters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from graphopt.axes.call import Call
from graphopt.axes.groups import Group, Unremovable, collect
from graphopt.axes.layout import Dims, Layout, leaves, shape_of, size, to_size
from graphopt.axes.layouts import Annotated, Layouts
from graphopt.axes.registry import Result, Rule, Rules, built_in_rules, find
from graphopt.axes.roles import Roles
from graphopt.axes.sharing import Sharing
from graphopt.axes.solver import Solver, equal
from graphopt.errors import PassError
from graphopt.ir.graph import constant
from graphopt.ir.operators import schema_name
from graphopt.ir.provenance import user_line
from graphopt.ir.regions import Region, inputs, inside, region, results
from graphopt.ir.torch_internals import HigherOrderOperator

logger = logging.getLogger(__name__)


class Axes(Layouts):
    """The layouts of one graph, and what follows from them.

    Attributes:
        parameters: the layouts of each parameter and buffer the graph reads, by qualified name.
        frozen: the reason of each axis that must stay whole, by axis id.
        unknown: the nodes of each operator that no rule covers, by operator name.
        rules: the rule of each call that has one.
    """

    def __init__(self, gm: fx.GraphModule, inference: _Inference) -> None:
        annotated = Annotated(inference.solver)
        super().__init__(gm, inference.known, inference.notes, annotated)
        self.parameters: dict[str, Dims] = {
            str(node.target): dims
            for node, dims in self.layouts.items()
            if node.op == "get_attr" and node.graph is gm.graph
        }
        self.rules = inference.rules_of
        self.unknown = inference.unknown
        self.frozen: dict[int, str] = {}
        for dims in self.layouts.values():
            for layout in dims:
                for axis in leaves(layout):
                    if axis.frozen is not None:
                        self.frozen[axis.id] = axis.frozen
        self._groups, self._refusals = collect(gm, self.parameters, inference.roles, inference.solver)

    def groups(self) -> list[Group]:
        """Return every axis that may lose indices, in order of its first producing weight."""
        return list(self._groups)

    def refusals(self) -> list[Unremovable]:
        """Return every axis that some weight produces and that must stay whole, with the reason."""
        return list(self._refusals)


def infer(gm: fx.GraphModule, rules: Mapping[str, Rule] | None = None) -> Axes:
    """Infer the layout of every dimension of an exported graph.

    Args:
        gm: a graph of ATen operators as `torch.export` gives it, every node with `meta["val"]`.
        rules: rules by operator name; all registered ones by default.

    Raises:
        PassError: a node lacks `meta["val"]`.
    """
    return Axes(gm, _Inference(gm, built_in_rules() if rules is None else rules))


class _Inference:
    """One walk over the graph, stating equations."""

    def __init__(self, gm: fx.GraphModule, rules: Rules) -> None:
        self.solver = Solver()
        self.roles = Roles()
        self.known: dict[fx.Node, Any] = {}
        self.notes: dict[fx.Node, dict[str, Layout]] = {}
        self.rules_of: dict[fx.Node, Rule] = {}
        self.unknown: dict[str, list[fx.Node]] = {}
        self._rules = rules
        self._sharing = Sharing(gm, self.solver)
        self._entered: dict[fx.GraphModule, None] = {}
        for node in gm.graph.nodes:
            if node.op == "output":
                for value in node.all_input_nodes:
                    self._freeze([value], f"reaches graph output `{value.name}`")
            elif node.op == "placeholder":
                reason = f"reaches graph input `{node.name}`"
                self.known[node] = self._fresh(node.meta.get("val"), reason)
            elif node.op == "get_attr":
                self.known[node] = self._sharing.dims(node)
                self.roles.read(node, str(node.target))
            else:
                self._visit(node, gm)
        self._freeze_size_arithmetic(gm.graph)

    def _visit(self, node: fx.Node, gm: fx.GraphModule) -> None:
        """State the equations of a call in the graph of `gm`."""
        self.roles.call(node)
        found = region(node, gm)
        if found is None:
            self.known[node] = self._call(node)
        elif self._entered.keys() & set(found.bodies):
            shared = "inside a region whose body another shares,"
            self._freeze(inside(found), self._why(node, shared))  # what the first region found holds for both
            self.known[node] = self._refuse(node, shared)
        else:
            self.known[node] = self._region(found)

    def _region(self, found: Region) -> Result:
        """State the equations of a region: those of its bodies, and that what flows in and out is the same."""
        returned = [self._body(found, body) for body in found.bodies]
        if found.form == "branches":
            for then, other in zip(*returned, strict=True):
                self._equate(found, then, other)
        flowing = returned[found.bodies.index(found.main)]
        for operand, after in zip(found.operands[: found.state], flowing, strict=False):
            self._equate(found, self._dims(operand), after)
        sequences = (self._dims(operand) for position, operand in enumerate(found.operands) if found.sliced(position))
        rounds = [dims[:1] for dims in sequences if dims is not None][:1]
        made = [
            (*rounds[0], *dims) if rounds and dims is not None and found.stacked(position) else dims
            for position, dims in enumerate(flowing)
        ]
        if _fits(found.node.meta["val"], made):
            return made
        returned_by_bodies = [value for body in found.bodies for value in results(body) if isinstance(value, fx.Node)]
        self._freeze(returned_by_bodies, self._why(found.node, "ill-fitting region"))
        return self._refuse(found.node, "ill-fitting region")

    def _body(self, found: Region, body: fx.GraphModule) -> list[Dims | None]:
        """Walk the graph of a body; return the layouts of what it returns."""
        self._entered[body] = None
        for position, (node, operand) in enumerate(zip(inputs(body), found.operands, strict=True)):
            dims = self._dims(operand)
            sliced = found.sliced(position)
            if sliced and dims is not None:
                self.solver.freeze(dims[0], self._why(found.node, "gone through step by step in"))
                dims = dims[1:]
            self.known[node] = dims
            if isinstance(operand, fx.Node) and position >= found.state:
                self.roles.hand(node, operand, whole=not sliced)
        for node in body.graph.nodes:
            if node.op == "get_attr":  # a constant of the body's own
                self.known[node] = self._fresh(constant(node, body), self._why(found.node, "held by"))
            elif node.op == "call_function":
                self._visit(node, body)
        self._freeze_size_arithmetic(body.graph)
        return [self._dims(value) for value in results(body)]

    def _dims(self, value: Any) -> Dims | None:
        known = self.known.get(value) if isinstance(value, fx.Node) else None
        return known if isinstance(known, tuple) else None

    def _equate(self, found: Region, one: Dims | None, other: Dims | None) -> None:
        """State that two values that flow to the same place are alike."""
        if one is not None and other is not None and len(one) == len(other):
            for a, b in zip(one, other, strict=True):
                self.solver.unify(a, b, f"{schema_name(found.node.target)} (`{found.node.name}`)")

    def _call(self, node: fx.Node) -> Result:
        if "val" not in node.meta:
            raise PassError(
                f"`{node.format_node()}` has no meta['val']; axis inference needs the shape of every node. "
                "Propagate fake tensors through the graph first."
            )
        if getattr(node.target, "__name__", "") == "getitem":
            source, position = node.args
            results = self.known.get(source) if isinstance(source, fx.Node) else None
            return results[position] if isinstance(results, list) and isinstance(position, int) else None
        rule = find(self._rules, node.target)
        if rule is None:
            region = isinstance(node.target, HigherOrderOperator)
            return self._refuse(node, "inside a region that is not looked into," if region else "unknown operator")
        call = Call(node, self.solver, self.roles, self.known)
        try:
            result = rule.infer(call)
        except Exception as err:  # a rule is a plugin; whatever it raises is about this call alone
            logger.warning("The axis rule of %s failed at `%s`: %s", schema_name(node.target), node.name, err)
            return self._refuse(node, f"failing rule ({type(err).__name__}: {err}) of operator")
        if not _fits(node.meta["val"], result):
            logger.warning("The axis rule of %s does not fit `%s`", schema_name(node.target), node.name)
            return self._refuse(node, "ill-fitting rule of operator")
        self.rules_of[node] = rule
        if call.notes:
            self.notes[node] = call.notes
        return result

    def _refuse(self, node: fx.Node, why: str) -> Result:
        """Freeze everything an operator touches that cannot be reasoned about."""
        value = node.meta["val"]
        tensors = [argument for argument in node.all_input_nodes if self.known.get(argument) is not None]
        if not tensors and not _has_tensor(value):
            return None  # arithmetic on sizes
        self.unknown.setdefault(schema_name(node.target), []).append(node)
        reason = self._why(node, why)
        self._freeze(tensors, reason)
        return self._fresh(value, reason)

    def _why(self, node: fx.Node, why: str) -> str:
        """Return a freezing reason that names a call and where it stands in the user's code."""
        line = user_line(node)
        return f"{why} {schema_name(node.target)} at `{node.name}`" + (f" ({line})" if line else "")

    def _freeze(self, nodes: Iterable[fx.Node], reason: str) -> None:
        for node in nodes:
            known = self.known.get(node)
            shapes = [known] if isinstance(known, tuple) else known or []
            for dims in shapes:
                for layout in dims or ():
                    self.solver.freeze(layout, reason)

    def _fresh(self, value: Any, reason: str) -> Result:
        if isinstance(value, torch.Tensor):
            return tuple(self.solver.axis(length, reason) for length in shape_of(value))
        if isinstance(value, list | tuple):
            results = [self._fresh(item, reason) for item in value]
            return [item if isinstance(item, tuple) else None for item in results]
        return None

    def _freeze_size_arithmetic(self, graph: fx.Graph) -> None:
        """Freeze a dimension whose size the graph reads and uses as a number, not as a shape.

        Example: (batch * heads) read by sym_size and multiplied into the activations.
        """
        factors: dict[fx.Node, list[Layout]] = {}
        for node in graph.nodes:
            if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.SymInt | int):
                inherited = [layout for a in node.all_input_nodes for layout in factors.get(a, [])]
                rule = self.rules_of.get(node)
                if inherited and not (rule is not None and rule.resizes):
                    for layout in inherited:
                        self.solver.freeze(layout, f"its size is used as a number at `{node.name}`")
                continue
            factors[node] = [layout for a in node.all_input_nodes for layout in factors.get(a, [])]
            source = node.args[0] if node.args else None
            if isinstance(source, fx.Node) and isinstance(self.known.get(source), tuple):
                dims: Dims = self.known[source]
                if schema_name(node.target) == "aten::sym_size":
                    dims = (dims[int(str(node.args[1]))],)
                factors[node].extend(layout for layout in dims if _can_shrink(self.solver.resolve(layout)))


def _can_shrink(layout: Layout) -> bool:
    return any(isinstance(axis.size, int) for axis in leaves(layout))


def _has_tensor(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_has_tensor(item) for item in value)
    return isinstance(value, torch.Tensor)


def _fits(value: Any, result: Result) -> bool:
    """Tell whether layouts have the sizes of the value they describe."""
    if isinstance(value, torch.Tensor):
        if not isinstance(result, tuple) or len(result) != value.dim():
            return False
        return all(equal(size(layout), to_size(n)) for layout, n in zip(result, value.shape, strict=True))
    if isinstance(value, list | tuple):
        if not _has_tensor(value):
            return True
        if not isinstance(result, list) or len(result) != len(value):
            return False
        return all(_fits(item, dims) for item, dims in zip(value, result, strict=True))
    return True

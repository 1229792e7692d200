"""Decompose the few calls that have no ONNX form, and leave the rest of the graph as it is.

`torch.onnx.export` traces every program again to decompose it, which takes as long as translating it. A folded
program has a handful of such calls (`flatten`, adaptive pooling): only those are traced.
"""

from __future__ import annotations

import copy
import operator
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.decomp_utils import PRESERVED_ATEN_CIA_OPS
from torch.export.graph_signature import TensorArgument
from torch.func import functionalize

from graphopt.errors import LoweringError
from graphopt.ir.graph import copy_graph_module, fake_mode_of
from graphopt.ir.operators import short_name
from graphopt.ir.provenance import at_line
from graphopt.ir.torch_internals import OpOverload, ShapeEnv, enable_python_dispatcher, is_composite, make_fx

aten = torch.ops.aten
# A Resize each, which torch takes apart into reads of single elements where a whole program is traced.
_RESIZES = {aten.upsample_nearest1d.vec, aten.upsample_nearest3d.vec, aten.upsample_trilinear3d.vec}
_FEW = 16  # calls; of ResNet-50 two took 0.2 s to trace, the whole program 2 s


class Decomposed(ExportedProgram):
    """An exported program that decomposes call by call where there are few to decompose."""

    @classmethod
    def on_demand(cls, exported: ExportedProgram) -> Self:
        """Return such a program of `exported`; its graph is its own, tensors are shared."""
        gm = exported.graph_module
        own = copy_graph_module(gm)
        for node, twin in zip(gm.graph.nodes, own.graph.nodes, strict=True):
            if node.op == "placeholder":
                twin.name = node.name  # a copy calls `input` `input_1`, which the signature does not know
        return cls(
            root=own,
            graph=own.graph,
            graph_signature=copy.deepcopy(exported.graph_signature),
            state_dict=exported.state_dict,
            range_constraints=exported.range_constraints,
            module_call_graph=exported.module_call_graph,
            example_inputs=exported.example_inputs,
            constants=exported.constants,
            verifiers=exported.verifiers,
        )

    def run_decompositions(self, decomp_table: Mapping[Any, Any] | None = None, **options: Any) -> ExportedProgram:
        """Decompose what `decomp_table` holds and what torch always takes apart."""
        default = torch.export.default_decompositions()
        table = dict(default if decomp_table is None else decomp_table)
        calls = [node for node in self.graph.nodes if node.op == "call_function"]
        found = [node for node in calls if node.target in table or _always_decomposes(node.target, default)]
        decisions = Decisions(self.graph_module)
        simple = not _has_regions(self.graph_module) and not any(_writes(node.target) for node in calls)
        if simple and len(found) <= _FEW:
            in_place = all(_expand(self.graph_module, node, table, decisions) for node in found)
            self._name_results()
            self.graph_module.recompile()
            if in_place:
                return self
        decomposed: ExportedProgram = super().run_decompositions(table, **options)
        decisions.refuse(None)
        return decomposed

    def _name_results(self) -> None:
        """Bring the signature up to date with what is returned now."""
        returned = next(node for node in self.graph.nodes if node.op == "output").args[0]
        specs = self.graph_signature.output_specs
        for spec, result in zip(specs, returned, strict=True):
            if isinstance(result, fx.Node):
                spec.arg = TensorArgument(result.name)


def has_decided(gm: fx.GraphModule) -> bool:
    """Whether what is recorded of sizes holds at those of the example, and maybe at no other."""
    env = fake_mode_of(gm).shape_env
    return env is not None and bool(env.guards)


class Decisions:
    """What torch decides by the sizes of the example while it takes operators apart."""

    _refused: ClassVar[weakref.WeakKeyDictionary[ShapeEnv, str]] = weakref.WeakKeyDictionary()  # it decides once

    def __init__(self, gm: fx.GraphModule) -> None:
        """Begin to look."""
        self._env = fake_mode_of(gm).shape_env or ShapeEnv()
        self._before = len(self._env.guards)

    def refuse(self, node: fx.Node | None) -> None:
        """Refuse what holds at one size of a dynamic axis; what excludes a few is found when the artifact is run.

        Raises:
            LoweringError: torch has decided so for this call, or for some call if None.
        """
        decided = any(
            guard.expr.is_Relational and guard.expr.rel_op == "==" for guard in self._env.guards[self._before :]
        )
        if decided:
            what = f"The operator {short_name(node)}{at_line(node)}" if node is not None else "An operator"
            self._refused[self._env] = (
                f"{what} would be lowered for the sizes of the example alone, and has a dynamic one. Write that line "
                "with other operators, or give every axis but the batch one size."
            )
        if said := self._refused.get(self._env):
            raise LoweringError(said)


def _has_regions(gm: fx.GraphModule) -> bool:
    return any(isinstance(module, fx.GraphModule) for module in gm.modules() if module is not gm)


def _writes(target: Any) -> bool:
    return isinstance(target, OpOverload) and target._schema.is_mutable


def _always_decomposes(target: Any, default: Mapping[Any, Any]) -> bool:
    """Whether torch takes the operator apart whatever the table says (batch_norm, flatten: torch 2.13)."""
    kept = target in PRESERVED_ATEN_CIA_OPS or target in _RESIZES
    return isinstance(target, OpOverload) and not kept and is_composite(target) and target not in default  # slow


def _expand(gm: fx.GraphModule, node: fx.Node, table: dict[Any, Any], decisions: Decisions) -> bool:
    """Replace one call by what it decomposes to; return False, and change nothing, where only a whole trace can."""
    inputs = node.all_input_nodes

    def call(*values: Any) -> Any:
        value_of = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), value_of.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    with torch.no_grad(), fake_mode_of(gm), enable_python_dispatcher():
        traced = make_fx(functionalize(call, remove="mutations"), decomposition_table=table)(
            *(source.meta["val"] for source in inputs)
        )
    decisions.refuse(node)
    calls = [inner for inner in traced.graph.nodes if inner.op == "call_function"]
    result = next(inner for inner in traced.graph.nodes if inner.op == "output").args[0]
    if any(inner.op == "get_attr" for inner in traced.graph.nodes) or any(_writes(inner.target) for inner in calls):
        return False
    if any("val" not in inner.meta for inner in calls):  # it asserts something, as one_hot does
        return False
    if not isinstance(result, fx.Node) and any(user.target is not operator.getitem for user in node.users):
        return False
    with gm.graph.inserting_before(node):
        placeholders = traced.graph.find_nodes(op="placeholder")
        copied: dict[fx.Node, fx.Node] = dict(zip(placeholders, inputs, strict=True))
        gm.graph.graph_copy(traced.graph, copied)
    for inner in calls:
        copied[inner].meta = {**node.meta, "val": inner.meta["val"]}
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(copied[result])
    else:
        for user in list(node.users):
            user.replace_all_uses_with(copied[result[user.args[1]]])
            gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    return True

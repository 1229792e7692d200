"""Decompose the few calls that have no ONNX form, and leave the rest of the graph as it is.

`torch.onnx.export` traces every program again to decompose it, which takes as long as translating it. A folded
program has a handful of such calls (`flatten`, adaptive pooling): only those are traced.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument
from torch.func import functionalize

from graphopt.ir.graph import copy_graph_module, fake_mode_of
from graphopt.ir.torch_internals import OpOverload, enable_python_dispatcher, is_composite, make_fx

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
        simple = not _has_regions(self.graph_module) and not any(_writes(node.target) for node in calls)
        if simple and len(found) <= _FEW:
            in_place = all(_expand(self.graph_module, node, table) for node in found)
            self._name_results()
            self.graph_module.recompile()
            if in_place:
                return self
        decomposed: ExportedProgram = super().run_decompositions(table, **options)
        return decomposed

    def _name_results(self) -> None:
        """Bring the signature up to date with what is returned now."""
        returned = next(node for node in self.graph.nodes if node.op == "output").args[0]
        specs = self.graph_signature.output_specs
        for spec, result in zip(specs, returned, strict=True):
            if isinstance(result, fx.Node):
                spec.arg = TensorArgument(result.name)


def _has_regions(gm: fx.GraphModule) -> bool:
    return any(isinstance(module, fx.GraphModule) for module in gm.modules() if module is not gm)


def _writes(target: Any) -> bool:
    return isinstance(target, OpOverload) and target._schema.is_mutable


def _always_decomposes(target: Any, default: Mapping[Any, Any]) -> bool:
    """Whether torch takes the operator apart whatever the table says (batch_norm, flatten: torch 2.13)."""
    return isinstance(target, OpOverload) and is_composite(target) and target not in default  # the slow question last


def _expand(gm: fx.GraphModule, node: fx.Node, table: dict[Any, Any]) -> bool:
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
    calls = [inner for inner in traced.graph.nodes if inner.op == "call_function"]
    result = next(inner for inner in traced.graph.nodes if inner.op == "output").args[0]
    if any(inner.op == "get_attr" for inner in traced.graph.nodes) or any(_writes(inner.target) for inner in calls):
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

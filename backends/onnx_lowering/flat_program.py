"""Flatten a program's signature: tensors in, tensors out, nothing else.

def forward(self, x, *, mask=None) -> {"logits": a, "hidden": (b, c)}
def forward(self, x, mask) -> (a, b, c)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from graphopt.graph import copy_graph_module
from graphopt.program import Program

SOURCE = "graphopt.source"  # key of meta["custom"]: the program's own name of a node


def flatten(program: Program) -> Program:
    """Return the program with flat positional inputs and a flat tuple of tensor outputs; tensors are shared.

    Every call carries the name it has in `program`, because exporting again renames nodes.
    """
    gm = copy_graph_module(program.graph_module)
    _bind_plain_inputs(gm.graph, program)
    _flatten_output(gm.graph)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.meta["custom"] = {**node.meta.get("custom", {}), SOURCE: node.name}
    gm.graph.set_codegen(CodeGen())
    flat = fx.GraphModule(gm, gm.graph)
    for name in ("_in_spec", "_out_spec"):
        flat.__dict__.pop(name, None)
    return dataclasses.replace(program, graph_module=flat, example_args=program.flat_examples(), example_kwargs={})


def _bind_plain_inputs(graph: fx.Graph, program: Program) -> None:
    """Replace inputs that are no tensors by the values the program was captured with."""
    leaves = pytree.tree_leaves((program.example_args, dict(program.example_kwargs)))
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, leaf in zip(placeholders, leaves, strict=True):
        if isinstance(leaf, torch.Tensor):
            continue
        for user in list(node.users):
            user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), _binding(node, leaf))
        graph.erase_node(node)


def _binding(node: fx.Node, leaf: Any) -> Any:
    return lambda used: leaf if used is node else used


def _flatten_output(graph: fx.Graph) -> None:
    output = next(node for node in graph.nodes if node.op == "output")
    leaves = pytree.tree_leaves(output.args[0])
    output.args = (
        tuple(leaf for leaf in leaves if isinstance(leaf, fx.Node) and isinstance(leaf.meta.get("val"), torch.Tensor)),
    )

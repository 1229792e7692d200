"""Leave out results that are no tensors: ONNX returns nothing else.

def forward(self, x) -> {"logits": a, "length": 3, "cache": None}
def forward(self, x) -> (a,)
"""

from __future__ import annotations

import torch
from torch import fx

from graphopt.ir.graph import copy_graph_module, restructure
from graphopt.ir.program import Program
from graphopt.ir.torch_internals import pytree


def only_tensors(program: Program) -> Program:
    """Return the program with a flat tuple of its tensor results; itself if it returns nothing else."""
    results = next(node for node in program.graph.nodes if node.op == "output").args[0]
    tensors = tuple(leaf for leaf in pytree.tree_leaves(results) if _is_tensor(leaf))
    if len(tensors) == len(pytree.tree_leaves(results)):
        return program
    gm = copy_graph_module(program.graph_module)
    output = next(node for node in gm.graph.nodes if node.op == "output")
    output.args = (tuple(leaf for leaf in pytree.tree_leaves(output.args[0]) if _is_tensor(leaf)),)
    output.meta.pop("val", None)  # recorded by a load from `.pt2`
    return program.with_graph(restructure(gm, pytree.tree_structure(tensors)))


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, fx.Node) and isinstance(leaf.meta.get("val"), torch.Tensor)

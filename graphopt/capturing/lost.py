"""What training does not bring back after capture in eval mode.

Randomness without a node, statistics that stay, rows of tables that are scaled when they are read, and what a module
does in a `train()` of its own, such as keeping parts in evaluation mode. What code does under `if self.training`, at a
rate that no attribute states, is not seen.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from graphopt.ir.provenance import module_path
from graphopt.ir.signature import Note
from graphopt.ir.training import switchable

# Attributes by which stock and common third-party modules state a rate of training-time dropping.
_RATES = ("p", "dropout", "dropout_p", "dropout_prob", "attention_dropout", "attn_dropout", "drop_prob")
_RATE_CLASSES = ("Dropout", "DropPath", "StochasticDepth")


def lost_in_eval(model: nn.Module, gm: fx.GraphModule) -> list[Note]:
    """List modules that drop values or move statistics in training otherwise than where their program is trained."""
    switched = {module_path(node) for node in switchable(gm)}
    read = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    renormed = any(node.target is torch.ops.aten.embedding_renorm_.default for node in gm.graph.nodes)
    lost: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        kind, place, rate = type(module).__name__, path or "the model itself", _rate(module)
        if rate and not any(owner == path or owner.startswith(f"{path}.") for owner in switched):
            lost.setdefault(f"{kind} stays off", []).append(f"{place} ({rate:.2g})")
        # an average over all batches (a momentum of None) counts them, and the count is no part of the graph
        moves = path in switched and getattr(module, "momentum", 0.0) is not None
        if f"{path}.running_mean".removeprefix(".") in read and not moves:
            lost.setdefault(f"{kind} keeps its statistics", []).append(place)
        norm = getattr(module, "max_norm", None)
        if norm is not None and not renormed:  # rows are scaled once, when it is captured
            lost.setdefault(f"{kind} does not scale its rows", []).append(f"{place} (max_norm={norm:g})")
        inside = any(f"{owner}.".startswith(f"{path}.".removeprefix(".")) for owner in switched)
        if inside and not isinstance(module, fx.GraphModule) and _trains_its_own_way(module):
            lost.setdefault(f"{kind}.train() is not asked", []).append(place)
    return [Note("training", f"{what} when the program is trained: {_listed(at)}") for what, at in lost.items()]


def _trains_its_own_way(module: nn.Module) -> bool:
    return getattr(module.train, "__func__", None) is not nn.Module.train


def _rate(module: nn.Module) -> float:
    """Return the rate a module drops at in training, 0 if it states none."""
    name = type(module).__name__
    for attribute in _RATES:
        value = module.__dict__.get(attribute)
        if not isinstance(value, float) or not 0.0 < value < 1.0:
            continue
        if attribute != "p" or any(part in name for part in _RATE_CLASSES):
            return value
    return 0.0


def _listed(paths: list[str]) -> str:
    shown = ", ".join(paths[:3])
    return shown if len(paths) <= 3 else f"{shown} and {len(paths) - 3} more"

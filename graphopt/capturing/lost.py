"""What capture in eval mode cannot keep: randomness that a module applies in training without a graph node."""

from __future__ import annotations

from torch import nn
from torch.export import ExportedProgram

from graphopt.ir.provenance import module_path
from graphopt.ir.signature import Note
from graphopt.ir.training import training_flag

# Attributes by which stock and common third-party modules state a rate of training-time dropping.
_RATES = ("p", "dropout", "dropout_p", "dropout_prob", "attention_dropout", "attn_dropout", "drop_prob")
_RATE_CLASSES = ("Dropout", "DropPath", "StochasticDepth")


def lost_in_eval(model: nn.Module, exported: ExportedProgram) -> list[Note]:
    """List modules that drop values in training and left no switchable node in the graph."""
    kept = {module_path(node) for node in exported.graph.nodes if training_flag(node) is not None}
    lost: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        rate = _rate(module)
        if not rate or any(owner == path or owner.startswith(f"{path}.") for owner in kept):
            continue
        lost.setdefault(type(module).__name__, []).append(f"{path or 'the model itself'} ({rate:.2g})")
    return [
        Note(
            "training",
            f"{kind} is not in the captured graph and stays off when it is trained: {_listed(paths)}",
        )
        for kind, paths in lost.items()
    ]


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

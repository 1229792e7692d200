"""Operators that multiply every channel by a stored factor and add a stored number, as one description.

    batch_norm(x), eval     scale = weight / sqrt(running_var + eps), shift = bias - running_mean * scale
    instance_norm(x)        likewise, where it takes stored statistics and not those of its input
    x * c, x / c            scale = c or 1 / c
    x + c, x - c            shift = c or -c

with c a literal or a stored tensor that varies along one axis of x at most. Everything is computed in float64.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import arguments, constant
from graphopt.ir.operators import ADDITIONS, DIVISIONS, MULTIPLICATIONS, SUBTRACTIONS, writes_in_place

aten = torch.ops.aten
_BATCH_NORMS = (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)


@dataclass(frozen=True, eq=False)
class Affine:
    """`result = source * scale + shift`, channel by channel.

    Attributes:
        node: the call.
        result: the node that holds the value; another than `node` where the operator returns several.
        source: x.
        axis: the axis of x that scale and shift run along; None if they are one number for all of x.
        scale: float64 (channels,), or (1,) with axis None; None for 1.
        shift: likewise; None for 0.
        key: equal for two affines of equal parameters.
    """

    node: fx.Node
    result: fx.Node
    source: fx.Node
    axis: int | None
    scale: torch.Tensor | None
    shift: torch.Tensor | None
    key: tuple[str, ...]


def is_batch_norm(node: fx.Node) -> bool:
    """Whether `node` calls a BatchNorm operator, or one of InstanceNorm that computes the same."""
    if node.op == "call_function" and node.target is aten.instance_norm.default:
        return not arguments(node, ("use_input_stats",))["use_input_stats"]
    return node.op == "call_function" and node.target in _BATCH_NORMS


def affine(node: fx.Node, gm: fx.GraphModule) -> Affine | str | None:
    """Describe `node` as an affine map of its input.

    Returns:
        The description; why a BatchNorm is none; None for any other node that is none.
    """
    if node.op != "call_function":
        return None
    if is_batch_norm(node):
        return _batch_norm(node, gm)
    return _arithmetic(node, gm)


def _batch_norm(node: fx.Node, gm: fx.GraphModule) -> Affine | str:
    given = arguments(node, ())
    if given["running_mean"] is None:
        return "it keeps no running statistics, so that it normalises by the batch in evaluation too"
    if given.get("training"):
        return "it is in training mode and normalises by the batch; call `program.eval()` first"
    names = ("weight", "bias", "running_mean", "running_var")
    stored = {name: constant(given[name], gm) for name in names}
    if stored["running_mean"] is None or stored["running_var"] is None:
        return "it has no stored statistics and normalises by the batch"
    if any(given[name] is not None and stored[name] is None for name in names):
        return "its parameters are computed, not stored"
    result = _only_result(node)
    if result is None:
        return "its saved statistics are used"
    mean, variance = stored["running_mean"].double(), stored["running_var"].double()
    scale = 1 / torch.sqrt(variance + given["eps"])
    if stored["weight"] is not None:
        scale = stored["weight"].double() * scale
    shift = -mean * scale
    if stored["bias"] is not None:
        shift = stored["bias"].double() + shift
    sources = (getattr(given[name], "target", None) for name in names)
    key = ("batch_norm", *map(str, sources), repr(given["eps"]))
    return Affine(node, result, given["input"], 1, scale.detach(), shift.detach(), key)


def _only_result(node: fx.Node) -> fx.Node | None:
    """Return the node with the normalised value: the call itself, or item 0 of one that also returns statistics."""
    if node.target in (aten.batch_norm.default, aten.instance_norm.default):
        return node
    items = list(node.users)
    first = [item for item in items if item.target is operator.getitem and item.args[1] == 0]
    return first[0] if len(items) == len(first) == 1 else None


def _arithmetic(node: fx.Node, gm: fx.GraphModule) -> Affine | None:
    sign = 1.0 if node in ADDITIONS else -1.0 if node in SUBTRACTIONS else None
    product, quotient = node in MULTIPLICATIONS, node in DIVISIONS
    if writes_in_place(node) or (sign is None and not product and not quotient):
        return None
    given = arguments(node, ())
    source, operand = given["self"], given["other"]
    if _is_stored(source, gm) and (product or sign == 1.0) and given.get("alpha", 1) == 1:
        source, operand = operand, source
    if not isinstance(source, fx.Node) or _is_stored(source, gm) or not _same_value(source, node):
        return None
    found = _along_one_axis(operand, source, gm)
    if found is None:
        return None
    axis, values, name = found
    key = (str(node.target), name, repr(given.get("alpha", 1)))
    if product or quotient:
        if quotient and bool((values == 0).any()):
            return None
        return Affine(node, node, source, axis, 1 / values if quotient else values, None, key)
    return Affine(node, node, source, axis, None, float(sign or 0.0) * float(given.get("alpha", 1)) * values, key)


def _along_one_axis(operand: Any, source: fx.Node, gm: fx.GraphModule) -> tuple[int | None, torch.Tensor, str] | None:
    """Return the axis of `source` that `operand` varies along, its values, and its name."""
    if isinstance(operand, int | float) and not isinstance(operand, bool):
        return None, torch.tensor([operand], dtype=torch.float64, device=source.meta["val"].device), repr(operand)
    tensor = constant(operand, gm)
    if tensor is None or not tensor.is_floating_point():
        return None
    rank = source.meta["val"].dim()
    varying = [axis for axis, size in enumerate(tensor.shape) if size != 1]
    if len(varying) > 1 or tensor.dim() > rank:
        return None
    axis = varying[0] + rank - tensor.dim() if varying else None
    return axis, tensor.detach().double().reshape(-1), str(operand.target)


def _is_stored(value: Any, gm: fx.GraphModule) -> bool:
    return constant(value, gm) is not None


def _same_value(source: fx.Node, node: fx.Node) -> bool:
    """Whether `node` has the shape and dtype of `source`, so that nothing broadcast or was promoted."""
    one, other = source.meta.get("val"), node.meta.get("val")
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    same_shape = one.dim() == other.dim() and all(str(a) == str(b) for a, b in zip(one.shape, other.shape, strict=True))
    return same_shape and one.dtype == other.dtype and one.is_floating_point()

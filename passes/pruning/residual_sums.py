"""Find the sum a layer's output ends in, and what stands between.

layer -> [batch_norm | * scale | dropout]* -> add <- other
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphopt.ir.graph import arguments, constant
from graphopt.ir.operators import ADDITIONS, COPIES, DROPOUTS, MULTIPLICATIONS
from graphopt.passes.layers.weighted_call import WeightedCall, uses

aten = torch.ops.aten
_COPIES = COPIES | DROPOUTS
# A feature whose gain is a thousandth of the largest hardly reaches the sum: it would take huge weights to mend it.
_LEAST_GAIN = 1e-3


@dataclass(frozen=True, eq=False)
class Addend:
    """A layer that ends in a sum.

    Attributes:
        other: the other operand of the sum.
        factor: by how much the layer's output must change for the sum to change by one, (features,); 0 where it hardly
            reaches the sum.
    """

    other: fx.Node
    factor: torch.Tensor


def addend_of(call: WeightedCall, gm: fx.GraphModule) -> Addend | None:
    """Describe the sum that `call` ends in, None if its output is read by anything else on the way."""
    gain = torch.ones(call.out_features, dtype=torch.float64, device=call.node.meta["val"].device)
    node = call.node
    while len(node.users) == 1:
        reader = next(iter(node.users))
        if reader in ADDITIONS:
            return _branch(node, reader, gain)
        step = _gain(node, reader, call, gm)
        if step is None:
            return None
        gain = gain * step
        node = reader
    return None


def running_mean(call: WeightedCall, gm: fx.GraphModule) -> str | None:
    """Return the running mean a layer's bias can be put into: that of a BatchNorm alone to read the layer's output."""
    reader = next(iter(call.node.users), None)
    if reader is None or len(call.node.users) > 1 or reader.target is not aten.batch_norm.default:
        return None
    given = arguments(reader, ())
    mean = given["running_mean"]
    if given["input"] is not call.node or given["training"] or constant(mean, gm) is None:
        return None
    return str(mean.target) if len(uses(gm, str(mean.target))) == 1 else None


def _branch(node: fx.Node, reader: fx.Node, gain: torch.Tensor) -> Addend | None:
    given = arguments(reader, ())
    one, two = given["self"], given["other"]
    other = two if one is node else one
    if one is two or not isinstance(other, fx.Node) or given["alpha"] != 1 or other.op == "get_attr":
        return None
    if [str(size) for size in other.meta["val"].shape] != [str(size) for size in node.meta["val"].shape]:
        return None
    reaches = gain.abs() > _LEAST_GAIN * gain.abs().max()
    return Addend(other, torch.where(reaches, 1 / gain, torch.zeros_like(gain)))


def _gain(node: fx.Node, reader: fx.Node, call: WeightedCall, gm: fx.GraphModule) -> torch.Tensor | None:
    """Return what each feature is multiplied with on the way from `node` to `reader`, None if it is no such step."""
    ones = torch.ones(call.out_features, dtype=torch.float64, device=call.node.meta["val"].device)
    given = arguments(reader, ()) if reader.op == "call_function" and hasattr(reader.target, "_schema") else {}
    if reader in _COPIES:
        return None if given.get("train") else ones
    if reader.target is aten.batch_norm.default and given["input"] is node and not given["training"]:
        variance, weight = constant(given["running_var"], gm), constant(given["weight"], gm)
        if variance is None or (weight is None and given["weight"] is not None):
            return None
        scale: torch.Tensor = (variance.detach().double() + given["eps"]).rsqrt()
        return scale if weight is None else scale * weight.detach().double()
    if reader in MULTIPLICATIONS and given["self"] is node:
        factor = constant(given["other"], gm)
        from_end = node.meta["val"].dim() - call.output_axis
        if factor is None or factor.dim() < from_end or factor.numel() != factor.shape[-from_end]:
            return None
        return ones * factor.detach().double().flatten()
    return None

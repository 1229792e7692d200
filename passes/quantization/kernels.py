"""Reads operator calls as kernels: a name that target descriptions use, operands, weight and bias.

conv2d(x, w, b)          -> conv2d: operands (x,), weight w, bias b
linear(x, w, b), x 2-D   -> gemm
linear(x, w), x 3-D      -> matmul
mean(x, all spatial)     -> global_average_pool
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import arguments
from graphopt.ir.operators import (
    ACTIVATIONS,
    ALL_CONVOLUTIONS,
    ATTENTION,
    AVERAGE_POOLS,
    MAX_POOLS,
    MOVES,
    PRODUCTS,
    RECURRENT,
    SOFTMAXES,
    UPSAMPLES,
    plain_name,
)
from graphopt.ir.torch_internals import OpOverload
from graphopt.passes.layers.weighted_call import WeightedCall, layer_call
from graphopt.passes.quantization.recurrent import lstm_call

# Work that would pay for integers: reported when a target has no kernel for it.
HEAVY = PRODUCTS | ALL_CONVOLUTIONS | ATTENTION | RECURRENT

# The first argument is what they compute on, or move.
_ONE_OPERAND = MOVES | ACTIVATIONS | SOFTMAXES | AVERAGE_POOLS | MAX_POOLS | UPSAMPLES


@dataclass(frozen=True, eq=False)
class Kernel:
    """One operator call, read as a kernel.

    Attributes:
        name: as target descriptions name it.
        operands: the tensors it computes on, weight and bias excluded; attribute reads among them are constants.
        layer: what is known of it as a layer, None if it has no weight.
        parameters: what it learned, by role.
        problem: why it cannot run on integers on any target, "" if it can.
    """

    name: str
    operands: tuple[fx.Node, ...]
    layer: WeightedCall | None = None
    parameters: Mapping[str, fx.Node] = field(default_factory=dict)
    problem: str = ""


def kernel_of(node: fx.Node, gm: fx.GraphModule) -> Kernel | None:
    """Read one node, None if it is no call or computes on no floating tensor."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        source = node.args[0]
        return Kernel("getitem", (source,)) if isinstance(source, fx.Node) else None
    if not isinstance(node.target, OpOverload):
        return None
    name = plain_name(node)
    layer = layer_call(node, gm)
    if layer is not None:
        return _convolution(layer) if "conv" in layer.kind else _product(layer)
    if name == "lstm":
        return _recurrent(node)
    if name in ("mm", "matmul"):
        return Kernel("batched_matmul", tuple(node.all_input_nodes))
    if name in ("add", "mul", "cat"):
        return _elementwise(node, name)
    if name == "pad":
        return _pad(node)
    if name == "mean" or name.startswith("adaptive_avg_pool"):
        return _mean(node, name)
    return Kernel(name, _nodes(node.args[:1]) if node in _ONE_OPERAND else tuple(node.all_input_nodes))


def clamp_range(node: fx.Node) -> tuple[float, float] | None:
    """Return the range an activation clamps to, None if it is not a plain clamp to constants."""
    if node.op != "call_function":
        return None
    name = plain_name(node)
    if name == "relu":
        return 0.0, math.inf
    if name == "relu6":
        return 0.0, 6.0
    if name in ("hardtanh", "clamp", "clamp_min", "clamp_max"):
        given = arguments(node, ())
        low = given.get("min_val", given.get("min"))
        high = given.get("max_val", given.get("max"))
        if any(isinstance(bound, fx.Node) for bound in (low, high)):
            return None
        return (-math.inf if low is None else float(low)), (math.inf if high is None else float(high))
    return None


def rank(node: fx.Node) -> int:
    """Return the number of dimensions of a tensor value, -1 for anything else."""
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else -1


def _convolution(layer: WeightedCall) -> Kernel:
    spatial = len(layer.kernel)
    name = f"conv{spatial}d" if layer.kind == "conv" else f"conv_transpose{spatial}d"
    problem = "" if rank(layer.input) == spatial + 2 else "its input has no batch axis"
    return Kernel(name, (layer.input,), layer, _parameters(layer), problem)


def _product(layer: WeightedCall) -> Kernel:
    problem = ""
    if layer.scaled or (layer.bias is not None and rank(layer.bias) != 1):
        problem = "its bias is not a plain vector"
    if rank(layer.input) < 2 or rank(layer.weight) != 2:
        problem = "its input has no batch axis"
    flat = layer.bias is not None and (rank(layer.input) == 2 or _static(layer.input))
    return Kernel("gemm" if flat else "matmul", (layer.input,), layer, _parameters(layer), problem)


def _parameters(layer: WeightedCall) -> Mapping[str, fx.Node]:
    return {"weight": layer.weight, **({} if layer.bias is None else {"bias": layer.bias})}


def _recurrent(node: fx.Node) -> Kernel:
    call = lstm_call(node)
    if call is None:
        return Kernel("lstm", tuple(node.all_input_nodes), problem="it has projections or packed sequences")
    names = (f"parameter `{parameter.target}`" for parameter in call.parameters)
    return Kernel("lstm", (call.x, *call.states), parameters=dict(zip(names, call.parameters, strict=True)))


def _elementwise(node: fx.Node, name: str) -> Kernel:
    if name == "cat":
        tensors = node.args[0]
        return Kernel("cat", _nodes(tensors if isinstance(tensors, list | tuple) else ()))
    operands = _nodes(node.args[:2])
    problem = "" if len(operands) == 2 else "one operand is a number"
    if name == "add" and arguments(node, ())["alpha"] != 1:
        problem = "its second operand is scaled (alpha)"
    return Kernel(name, operands, problem=problem)


def _pad(node: fx.Node) -> Kernel:
    given = arguments(node, ())
    plain = given["mode"] == "constant" and given["value"] in (None, 0, 0.0)
    return Kernel("pad" if plain else f"pad_{given['mode']}", _nodes(node.args[:1]))


def _mean(node: fx.Node, name: str) -> Kernel:
    operands = _nodes(node.args[:1])
    given = arguments(node, ())
    if name == "mean":
        return Kernel("global_average_pool" if spatial_mean(node) else "mean", operands)
    sizes = given["output_size"]
    whole = all(size == 1 for size in sizes) and rank(operands[0]) == len(sizes) + 2
    return Kernel("global_average_pool" if whole else name, operands)


def spatial_mean(node: fx.Node) -> bool:
    """Whether a `mean` is taken over exactly the axes behind batch and channels."""
    given = arguments(node, ())
    axes, size = given.get("dim"), rank(node.args[0]) if isinstance(node.args[0], fx.Node) else -1
    if not isinstance(axes, list | tuple) or given.get("dtype") is not None or not 3 <= size <= 5:
        return False
    return sorted(axis % size for axis in axes) == list(range(2, size))


def _static(node: fx.Node) -> bool:
    return all(isinstance(size, int) for size in node.meta["val"].shape)


def _nodes(values: Any) -> tuple[fx.Node, ...]:
    return tuple(value for value in values if isinstance(value, fx.Node))

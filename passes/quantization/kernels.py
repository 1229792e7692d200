"""Reads operator calls as kernels: a name that target descriptions use, operands, weight and bias.

conv2d(x, w, b)          -> conv2d: operands (x,), weight w, bias b
linear(x, w, b), x 2-D   -> gemm
linear(x, w), x 3-D      -> matmul
mean(x, all spatial)     -> global_average_pool
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import arguments, constant
from graphopt.ir.provenance import op_name
from graphopt.ir.torch_internals import OpOverload

_CONVOLUTIONS = {f"conv{rank}d": rank for rank in (1, 2, 3)}
_TRANSPOSED = {f"conv_transpose{rank}d": rank for rank in (1, 2, 3)}

# Work that would pay for integers: reported when a target has no kernel for it.
HEAVY = frozenset(
    {*_CONVOLUTIONS, *_TRANSPOSED, "gemm", "matmul", "batched_matmul", "scaled_dot_product_attention", "einsum"}
    | {"bmm", "baddbmm", "bilinear", "lstm", "gru", "rnn_tanh", "rnn_relu", "multi_head_attention_forward"}
)

# Operators that only move values around; the first argument is what they move.
_MOVES = frozenset(
    {"slice", "view", "reshape", "flatten", "unflatten", "permute", "transpose", "unsqueeze", "squeeze", "expand"}
    | {"select", "narrow", "chunk", "split", "split_with_sizes", "unbind", "contiguous", "t", "roll", "flip"}
    | {"pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "repeat", "movedim", "swapaxes"}
)

_ONE_OPERAND = frozenset(
    {"sigmoid", "leaky_relu", "softmax", "tanh"}
    | {f"{kind}_pool{rank}d" for kind in ("avg", "max") for rank in (1, 2, 3)}
    | {f"upsample_nearest{rank}d" for rank in (1, 2, 3)}
)


@dataclass(frozen=True, eq=False)
class Kernel:
    """One operator call, read as a kernel.

    Attributes:
        name: as target descriptions name it.
        operands: the tensors it computes on, weight and bias excluded; attribute reads among them are constants.
        weight: the weight, an attribute read unless it is computed.
        bias: the bias likewise.
        out_axis: axis of the weight that runs over output channels.
        in_axis: axis of the operand that runs over input channels.
        problem: why it cannot run on integers on any target, "" if it can.
    """

    name: str
    operands: tuple[fx.Node, ...]
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    out_axis: int = 0
    in_axis: int = 1
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
    name = op_name(node)
    if name in _CONVOLUTIONS or name in _TRANSPOSED:
        return _convolution(node, name)
    if name in ("linear", "addmm", "mm", "matmul"):
        return _product(node, name, gm)
    if name in ("add", "mul", "cat"):
        return _elementwise(node, name)
    if name in _MOVES:
        return Kernel(name, _nodes(node.args[:1]))
    if name == "pad":
        return _pad(node)
    if name == "mean" or name.startswith("adaptive_avg_pool"):
        return _mean(node, name)
    return Kernel(name, _nodes(node.args[:1]) if name in _ONE_OPERAND else tuple(node.all_input_nodes))


def clamp_range(node: fx.Node) -> tuple[float, float] | None:
    """Return the range an activation clamps to, None if it is not a plain clamp to constants."""
    if node.op != "call_function":
        return None
    name = op_name(node)
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


def _convolution(node: fx.Node, name: str) -> Kernel:
    given = arguments(node, ())
    spatial = _CONVOLUTIONS.get(name) or _TRANSPOSED[name]
    problem = "" if rank(given["input"]) == spatial + 2 else "its input has no batch axis"
    out_axis = 1 if name in _TRANSPOSED else 0
    return Kernel(name, (given["input"],), given["weight"], given["bias"], out_axis, 1, problem)


def _product(node: fx.Node, name: str, gm: fx.GraphModule) -> Kernel:
    given = arguments(node, ())
    if name == "linear":
        x, weight, bias, out_axis = given["input"], given["weight"], given["bias"], 0
    elif name == "addmm":
        x, weight, bias, out_axis = given["mat1"], given["mat2"], given["self"], 1
    else:
        x, bias, out_axis = given["self"], None, 1
        weight = given["mat2"] if "mat2" in given else given["other"]
        if constant(weight, gm) is None or rank(weight) != 2:
            return Kernel("batched_matmul", (x, weight))
    problem = ""
    if name == "addmm" and (given["alpha"] != 1 or given["beta"] != 1 or rank(bias) != 1):
        problem = "its bias is not a plain vector"
    if rank(x) < 2 or rank(weight) != 2:
        problem = "its input has no batch axis"
    kind = "gemm" if bias is not None and (rank(x) == 2 or _static(x)) else "matmul"
    return Kernel(kind, (x,), weight, bias, out_axis, -1, problem)


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

"""Random parameters and statistics that make a mistake visible: no zeros, no ones, no vanishing branch.

At initialisation a BatchNorm is the identity, a layer scale is 1e-6 and biases are zero, so a program with permuted
or dropped ones computes the same. Here every tensor is drawn anew, by what it is used for:

    weights of sums      normal, variance 1 / fan-in, so that depth neither amplifies nor damps
    norm weights, gains  uniform in [0.5, 1.5], so that no branch is hidden
    biases, means        normal, deviation 0.3
    running variances    uniform in [0.5, 1.5]
    embeddings           normal
    other buffers        their own values, each element times a factor in [0.5, 1.5]; zeros and infinities stay
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.graph import arguments, copy_graph_module
from graphopt.ir.program import Program
from graphopt.ir.regions import inputs, region
from graphopt.ir.torch_internals import OpOverload

_BIAS_DEVIATION = 0.3
_LOW, _HIGH = 0.5, 1.5

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_PRODUCTS = ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "mv", "addmv", "bilinear", "tensordot", "dot")
_ADDS = ("add", "add_", "sub", "cat")
_GAINS = ("mul", "mul_", "div", "multiply", "_weight_norm", "prelu")
# What a parameter goes through on its way to the operator that says what it is for.
_THROUGH = (
    "alias", "clone", "contiguous", "detach", "expand", "flatten", "permute", "reshape", "select", "slice", "squeeze",
    "t", "to", "transpose", "type_as", "unsqueeze", "view", "view_as", "_to_copy",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Use:
    """The operator that uses a tensor, and as which argument."""

    operator: str
    argument: str
    node: fx.Node


def randomise(program: Program | fx.GraphModule, generator: torch.Generator) -> fx.GraphModule:
    """Return a copy in float64 with every parameter and statistic drawn at random.

    Args:
        program: a program or its graph module; it is not changed.
        generator: where the numbers come from. Equal seeds give equal tensors.
    """
    gm = copy_graph_module(program.graph_module if isinstance(program, Program) else program)
    drawn: dict[tuple[Any, ...], Tensor] = {}  # memory under two names stays one tensor
    names: dict[str, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            names.setdefault(str(node.target), node)
    for name, node in names.items():
        owner, leaf = _owner(gm, name)
        tensor = getattr(owner, leaf)
        if not isinstance(tensor, Tensor):
            continue
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if key not in drawn:
            drawn[key] = _draw(tensor, _use(node, gm), generator)
        _store(owner, leaf, drawn[key])
    return gm


def _draw(tensor: Tensor, use: _Use | None, generator: torch.Generator) -> Tensor:
    """Draw the float64 twin of one tensor; integers and booleans are kept."""
    if not tensor.is_floating_point():
        return _as_double(tensor)
    shape = tuple(tensor.shape)
    statistic = use is not None and use.argument in ("running_mean", "running_var")
    if not isinstance(tensor, torch.nn.Parameter) and not statistic:
        return _as_double(tensor) * (_uniform(shape, generator) if tensor.numel() > 1 else 1.0)
    if use is None:
        return _normal(shape, _BIAS_DEVIATION, generator) if len(shape) > 1 else _uniform(shape, generator)
    if use.operator == "embedding":
        return _normal(shape, 1.0, generator)
    if use.argument == "bias" or use.argument == "running_mean" or _is_added(use):
        return _normal(shape, _BIAS_DEVIATION, generator)
    fan_in = _fan_in(shape, use)
    return _normal(shape, fan_in**-0.5, generator) if fan_in else _uniform(shape, generator)


def _as_double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64 if tensor.is_floating_point() else tensor.dtype)


def _fan_in(shape: tuple[int, ...], use: _Use) -> float | None:
    """Return how many products a weight sums, None if it scales rather than sums."""
    if len(shape) < 2:
        return float(shape[0]) if use.operator in _PRODUCTS and shape else None
    if use.operator == "linear" or use.operator in _CONVOLUTIONS:
        return float(math.prod(shape[1:]))
    if use.operator in _TRANSPOSED:
        options = arguments(use.node, ("groups", "stride"))
        overlap = math.prod(shape[2:]) / math.prod(options["stride"])
        return float(max(1.0, shape[0] / int(options["groups"]) * overlap))
    if use.operator in _PRODUCTS:
        return float(shape[-2] if use.argument in ("mat2", "other") else shape[-1])
    return None if use.operator in _GAINS or use.argument == "weight" else 1 / _BIAS_DEVIATION**2


def _is_added(use: _Use) -> bool:
    return use.operator in _ADDS or (use.operator.startswith("addm") and use.argument == "self")


def _use(node: fx.Node, gm: fx.GraphModule) -> _Use | None:
    """Find what a parameter is used for, looking through views and copies of it and into regions."""
    for user in node.users:
        inside = region(user, gm)
        if inside is not None:
            places = [position for position, operand in enumerate(inside.operands) if operand is node]
            within = [(body, inputs(body)[position]) for body in inside.bodies for position in places]
            found = next((use for body, entry in within if (use := _use(entry, body)) is not None), None)
            if found is not None:
                return found
        if not isinstance(user.target, OpOverload):
            continue
        operator = user.target._schema.name.split("::")[-1]
        if operator in _THROUGH:
            found = _use(user, gm)
            if found is not None:
                return found
            continue
        bound = arguments(user, ())
        argument = next((name for name, value in bound.items() if value is node), "")
        return _Use(operator, argument, user)
    return None


def _normal(shape: tuple[int, ...], deviation: float, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64) * deviation


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return _LOW + (_HIGH - _LOW) * torch.rand(shape, generator=generator, dtype=torch.float64)


def _owner(gm: fx.GraphModule, name: str) -> tuple[torch.nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return gm.get_submodule(path), leaf


def _store(owner: torch.nn.Module, leaf: str, tensor: Tensor) -> None:
    """Put a tensor in the place of another in the copy's own module tree."""
    owner._parameters.pop(leaf, None)
    owner._buffers.pop(leaf, None)
    owner.__dict__.pop(leaf, None)
    owner.register_buffer(leaf, tensor)

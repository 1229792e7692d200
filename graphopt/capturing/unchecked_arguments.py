"""What some operators need of their arguments and do not check themselves, checked before a stranger's graph is run.

to(x, dtype)                                a dtype, of numbers torch takes any and reads its table of dtypes there
_weight_norm(v, g, dim)                     an element of g for each index of v along dim
lstm(x, state, weights, ..), gru, rnn       weights of the shapes that the first one and the options ask for
grid_sampler(x, grid, mode, padding, ..)    a mode and a padding that there are

With others torch 2.13 reads or writes memory beyond the tensors, or divides by zero, which ends the process. Shapes
must be those of values that no input changes, so that what holds once holds for every call. `tools/fuzz_operators.py`
finds operators that belong here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from graphopt.capturing.fixed_shapes import fixed_shapes
from graphopt.errors import CaptureError, cut
from graphopt.ir.graph import arguments
from graphopt.ir.operators import schema_name, short_name
from graphopt.ir.torch_internals import OpOverload

Given = Mapping[str, Any]  # the arguments of a call by name: numbers, nodes, lists of them
Shape = Callable[[Any], "tuple[int, ...] | None"]  # that a node always has, None where inputs may change it

_LITERALS: dict[str, tuple[type, ...]] = {
    "ScalarType": (torch.dtype,),
    "Layout": (torch.layout,),
    "MemoryFormat": (torch.memory_format,),
    "Device": (torch.device, str),
    "Generator": (),
}


def check_arguments(gm: fx.GraphModule) -> None:
    """Check the calls of a graph and of the bodies in it.

    Raises:
        CaptureError: one lacks an argument, or torch would use memory with it that is not the model's.
    """
    for fixed in fixed_shapes(gm):
        for node in fixed.gm.graph.nodes:
            if isinstance(node.target, OpOverload) and (missing := _missing(node)):
                raise CaptureError(f"The model calls `{node.target}` without its `{missing}`. Export it again.")
            wrong = _wrong(node, fixed.of)
            if wrong:
                raise CaptureError(
                    f"The model calls `{short_name(node)}` with {wrong}. torch does not check that and would use "
                    "memory that is not the model's. Export it again from its source."
                )


def _missing(node: fx.Node) -> str:
    given, schema = arguments(node, ()), node.target._schema  # type: ignore[union-attr]
    return next((argument.name for argument in schema.arguments if argument.name not in given), "")


def _wrong(node: fx.Node, shape: Shape) -> str:
    """Say which argument of a call is not what the operator needs, "" if all are."""
    for handed in node.args:  # out_dtype calls an operator that it is given
        if isinstance(handed, OpOverload) and (_literals(handed) or schema_name(handed) in _CHECKS):
            return f"`{handed}` as what it is to call"
    if not isinstance(node.target, OpOverload):
        return ""
    given = arguments(node, ())
    for argument, kinds in _literals(node.target):
        value = given.get(argument.name)
        named = isinstance(value, kinds) and (not isinstance(value, torch.layout) or value is torch.strided)
        if value is not None and value != argument.default_value and not named:
            return f"{_shown(value)} as `{argument.name}`"
    check = _CHECKS.get(schema_name(node.target))
    return check(given, shape) if check else ""


@functools.cache
def _literals(operator: OpOverload) -> list[tuple[Any, tuple[type, ...]]]:
    """Return the arguments that name dtypes, layouts and devices, and what they are in Python."""
    kinds = [
        (argument, re.sub(r"Optional\[(.*)\]", r"\1", str(argument.real_type)))
        for argument in operator._schema.arguments
    ]
    return [(argument, _LITERALS[kind]) for argument, kind in kinds if kind in _LITERALS]


def _weight_norm(given: Given, shape: Shape) -> str:
    v, g, dim = shape(given["v"]), shape(given["g"]), given["dim"]
    if v is None or g is None or type(dim) is not int:
        return _changing("weights")
    if dim in (0, len(v) - 1):
        fits = 0 not in v and len(v) > 0 and torch.Size(g).numel() == v[dim]
    else:  # made of operators that check, and of the shape of `v` if `g` stretches nothing
        fits = len(g) <= len(v) and all(size in (1, own) for size, own in zip(reversed(g), reversed(v), strict=False))
    return "" if fits else f"weights `v` and `g` of the shapes {v} and {g} along dimension {dim}"


def _recurrent(given: Given, shape: Shape, *, gates: int) -> str:
    layers, biases, bidirectional = given["num_layers"], given["has_biases"], given["bidirectional"]
    flags = [biases, bidirectional, given["batch_first"]]
    weights, states = given["params"], given["hx"]
    two = isinstance(states, list | tuple) and [type(state) for state in states] == [fx.Node] * 2
    if gates == 4 and not (two and isinstance(given["input"], fx.Node)):
        return "something other than an input and two states"
    shapes = [shape(weight) for weight in weights] if isinstance(weights, list | tuple) else [None]
    if None in shapes or type(layers) is not int or any(type(flag) is not bool for flag in flags):
        return _changing("weights")
    wrong = f"weights of the shapes {cut(str(shapes))} for {layers} layers"
    directions = 2 if bidirectional else 1
    each = len(shapes) // (layers * directions) if layers > 0 else 0
    if each < 2 or any(len(matrix or ()) != 2 for matrix in shapes[:2]):
        return wrong
    (rows, width), (_, out) = shapes[:2]  # type: ignore[misc]
    hidden = rows // gates
    one = [(rows, width), (rows, out), *([(rows,)] * 2 if biases else [])]
    one += [(out, hidden)] if gates == 4 and each > len(one) else []  # of a projected state
    further = [(rows, out * directions), *one[1:]]
    expected = one * directions + further * directions * (layers - 1)
    projected = len(one) % 2 == 1
    fits = shapes == expected and rows == gates * hidden and (projected or out == hidden) and min(rows, width, out) > 0
    return "" if fits else wrong


def _bags(given: Given, _: Shape) -> str:
    return "" if isinstance(given["offsets"], fx.Node) else "something other than a tensor as `offsets`"


def _grid_sampler(given: Given, _: Shape) -> str:
    modes = given["interpolation_mode"], given["padding_mode"]
    wrong = [mode for mode in modes if mode not in (0, 1, 2)]
    return f"{_shown(wrong[0])} as a mode" if wrong else ""


_CHECKS: dict[str, Callable[[Given, Shape], str]] = {
    "aten::_weight_norm": _weight_norm,
    "aten::lstm": functools.partial(_recurrent, gates=4),
    "aten::gru": functools.partial(_recurrent, gates=3),
    "aten::rnn_tanh": functools.partial(_recurrent, gates=1),
    "aten::rnn_relu": functools.partial(_recurrent, gates=1),
    **{f"aten::{name}": _bags for name in ("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")},
    **{f"aten::{name}": _grid_sampler for name in ("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")},
}


def _changing(what: str) -> str:
    return f"{what} that its inputs may change"


def _shown(value: object) -> str:
    return cut(str(value), 80)

"""What some operators need of their arguments and do not check themselves, checked before a stranger's graph is run.

to(x, dtype)                                a dtype, of numbers torch takes any and reads its table of dtypes there
_weight_norm(v, g, dim)                     an element of g for each index of v along dim
lstm(x, state, weights, ..), gru, rnn       weights of the shapes that the first one and the options ask for
avg_pool2d(x, .., divisor_override)          a divisor above 0
grid_sampler(x, grid, mode, padding, ..)    a mode and a padding that there are
col2im(x, size, kernel, ..), all others     sizes and steps whose products do not wrap

With others torch 2.13 reads or writes memory beyond the tensors, or divides by zero, which ends the process. Shapes
must be those of values that no input changes, so that what holds once holds for every call. `tools/fuzz_operators.py`
finds operators that belong here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from graphopt.capturing.fixed_shapes import fixed_shapes
from graphopt.errors import CaptureError, cut
from graphopt.ir.graph import arguments
from graphopt.ir.operators import kinds_of_arguments, schema_name, short_name
from graphopt.ir.torch_internals import OpOverload, pytree
from graphopt.loading.recurrent_weights import recurrent_weights
from graphopt.loading.stock_modules import MOST, MOST_OF_WINDOWS

Given = Mapping[str, Any]  # the arguments of a call by name: numbers, nodes, lists of them
Shape = Callable[[Any], "tuple[int, ...] | None"]  # that a node always has, None where inputs may change it

_CHANGING = "weights whose shapes may change from call to call"

_LITERALS: dict[str, tuple[type, ...]] = {
    "ScalarType": (torch.dtype,),
    "Layout": (torch.layout,),
    "MemoryFormat": (torch.memory_format,),
    "Device": (torch.device, str),
    "Generator": (),
}


# Sizes, steps and axes, whose products wrap in 64 bits, or in 32; numbers that are values are of another kind.
_NUMBERS = ("int", "List[int]")
_ANYWHERE = ("start", "end", "low", "high")  # the end of a slice is often the largest integer
_WINDOWS = ("aten::col2im", "aten::im2col")  # which multiply sizes in 32 bits
_KNOWN = (*_WINDOWS, *(f"aten::replication_pad{rank}d" for rank in (1, 2, 3)))  # no computed sizes: they may wrap


def check_arguments(gm: fx.GraphModule) -> None:
    """Check the calls of a graph and of the bodies in it.

    Raises:
        CaptureError: with one of them torch would use memory that is not the model's.
    """
    for fixed in fixed_shapes(gm):
        for node in fixed.gm.graph.nodes:
            if isinstance(node.target, OpOverload) and (wrong := _wrong(node, fixed.of)):
                raise CaptureError(
                    f"The model calls `{short_name(node)}` with {wrong}. torch does not check that and would use "
                    "memory that is not the model's. Export it again from its source."
                )


def _wrong(node: fx.Node, shape: Shape) -> str:
    """Say which argument of a call is not what the operator needs, "" if all are."""
    operator: Any = node.target
    given = arguments(node, ())
    for argument in operator._schema.arguments:
        value, kind = given[argument.name], kinds_of_arguments(operator)[argument.name]
        if kind in _NUMBERS and argument.name not in _ANYWHERE and (far := _beyond(operator, value)):
            return f"{far} in its `{argument.name}`"
        literal = _LITERALS.get(kind)
        if literal is None or value is None or value == argument.default_value:
            continue
        if not isinstance(value, literal) or (isinstance(value, torch.layout) and value is not torch.strided):
            return f"{_shown(value)} as `{argument.name}`"
    check = _CHECKS.get(schema_name(operator))
    return check(given, shape) if check else ""


def _beyond(operator: OpOverload, value: Any) -> str:
    """Say which size or step is too large, "" if none is; windows must have numbers that are known."""
    windows = schema_name(operator) in _WINDOWS
    most = MOST_OF_WINDOWS if windows else MOST
    for number in pytree.tree_leaves(value):
        if type(number) is int and abs(number) > most:
            return str(number)
        if schema_name(operator) in _KNOWN and isinstance(number, fx.Node):
            return f"the computed `{number}`"
    return ""


def _weight_norm(given: Given, shape: Shape) -> str:
    v, g, dim = shape(given["v"]), shape(given["g"]), given["dim"]
    if type(dim) is not int:
        return f"{_shown(dim)} as `dim`"
    if v is None or g is None:
        return _CHANGING
    if dim in (0, len(v) - 1):
        fits = 0 not in v and len(v) > 0 and torch.Size(g).numel() == v[dim]
    else:  # made of operators that check, and of the shape of `v` if `g` stretches nothing
        fits = len(g) <= len(v) and all(size in (1, own) for size, own in zip(reversed(g), reversed(v), strict=False))
    return "" if fits else f"weights `v` and `g` of the shapes {v} and {g} along dimension {dim}"


def _recurrent(given: Given, shape: Shape, *, mode: str, gates: int) -> str:
    layers, weights, states = given["num_layers"], given["params"], given["hx"]
    flags = ("has_biases", "bidirectional", "batch_first")
    if wrong := next((name for name in flags if type(given[name]) is not bool), ""):
        return f"{_shown(given[wrong])} as `{wrong}`"
    two = isinstance(states, list | tuple) and [type(state) for state in states] == [fx.Node] * 2
    if mode == "LSTM" and not (two and isinstance(given["input"], fx.Node)):
        return "something other than an input and two states"
    shapes = [shape(weight) for weight in weights] if isinstance(weights, list | tuple) else [None]
    if None in shapes:
        return _CHANGING
    wrong = f"weights of the shapes {cut(str(shapes))} for {_shown(layers)} layers"
    if len(shapes) < 2 or any(len(matrix or ()) != 2 for matrix in shapes[:2]):
        return wrong
    (rows, width), (_, out) = shapes[:2]  # type: ignore[misc]
    hidden = rows // gates
    options = {"input_size": width, "hidden_size": hidden, "proj_size": 0 if out == hidden else out}
    options |= {"num_layers": layers, "bias": given["has_biases"], "bidirectional": given["bidirectional"]}
    expected = recurrent_weights(mode, options, most=len(shapes))
    return "" if expected and min(width, out) > 0 and list(expected.values()) == shapes else wrong


def _bags(given: Given, _: Shape) -> str:
    return "" if isinstance(given["offsets"], fx.Node) else "something other than a tensor as `offsets`"


def _pool(given: Given, _: Shape) -> str:
    divisor = given["divisor_override"]
    fits = divisor is None or (type(divisor) is int and divisor > 0)
    return "" if fits else f"{_shown(divisor)} as `divisor_override`"


def _pad(given: Given, _: Shape) -> str:
    computed = (
        [number for number in given["pad"] if isinstance(number, fx.Node)] if given["mode"] == "replicate" else []
    )
    return f"the computed `{computed[0]}` in its `pad`" if computed else ""


def _grid_sampler(given: Given, _: Shape) -> str:
    modes = given["interpolation_mode"], given["padding_mode"]
    wrong = [mode for mode in modes if mode not in (0, 1, 2)]
    return f"{_shown(wrong[0])} as a mode" if wrong else ""


_CHECKS: dict[str, Callable[[Given, Shape], str]] = {
    "aten::_weight_norm": _weight_norm,
    "aten::lstm": functools.partial(_recurrent, mode="LSTM", gates=4),
    "aten::gru": functools.partial(_recurrent, mode="GRU", gates=3),
    "aten::rnn_tanh": functools.partial(_recurrent, mode="RNN_TANH", gates=1),
    "aten::rnn_relu": functools.partial(_recurrent, mode="RNN_RELU", gates=1),
    **{f"aten::{name}": _bags for name in ("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")},
    "aten::pad": _pad,
    **{f"aten::avg_pool{rank}d": _pool for rank in (2, 3)},
    **{f"aten::{name}": _grid_sampler for name in ("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")},
}


def _shown(value: object) -> str:
    return cut(str(value), 80)

"""Numbers that 16 bits cannot hold, and the values that hang on them.

    scores + mask, mask of -3.4e38      would add -inf: a row that is masked whole gives NaN
    x / (norm(x) + 1e-12)               would divide by 0
    rsqrt(variance + 1e-12)             may give 1e6, beyond 65504
    positions.float() * frequencies     5001 would be 5000

1. Constants and numbers among the arguments are looked at, and what is computed of them is followed for as long as it
   may be as large or as small; softmax, say, ends it.
2. Whole numbers that become floating (positions, counts) need all their digits, and what is made of them alone does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from graphopt.ir.graph import arguments, constant
from graphopt.ir.operators import (
    CASTS,
    DIVISIONS,
    FILLED_LIKE,
    MOVES,
    MULTIPLICATIONS,
    PRODUCTS,
    SUMS,
    Family,
    kinds_of_arguments,
)
from graphopt.ir.torch_internals import OpOverload, pytree
from graphopt.passes.precision.operators import CLAMPS, PASSING

_COUNTED = Family("arange", "linspace")
_LARGE = PASSING | FILLED_LIKE | Family("full")  # what they give may be as large as what they are given
_SMALL = MOVES | CLAMPS | Family("sqrt")  # likewise as small
_SCALED = SUMS | MULTIPLICATIONS | DIVISIONS | CLAMPS
_RSQRT, _RECIPROCAL = Family("rsqrt"), Family("reciprocal")


@dataclass(frozen=True, slots=True)
class Danger:
    """Why a value must not be rounded to 16 bits.

    Attributes:
        kind: "large" numbers overflow, "small" ones vanish, "whole" ones lose digits.
        reason: a sentence fragment with the number: "-3.4e+38 is beyond 65504".
        number: the number.
    """

    kind: Literal["large", "small", "whole"]
    reason: str
    number: float = 0.0


def of_number(number: float, dtype: torch.dtype) -> Danger | None:
    """Return what a type cannot hold of a number; infinity, which masks, it can."""
    kind = torch.finfo(dtype)
    if math.isfinite(number) and abs(number) > kind.max:
        return Danger("large", f"{number:.3g} is beyond {kind.max:.5g}", number)
    if 0 < abs(number) < kind.tiny:
        return Danger("small", f"{number:.3g} is below {kind.tiny:.3g}", abs(number))
    return None


def of_tensor(tensor: Tensor, dtype: torch.dtype) -> Danger | None:
    """Return what a type cannot hold of a stored float32 tensor."""
    values = tensor.detach()
    finite = values[values.isfinite()]
    if not finite.numel():
        return None
    kind = torch.finfo(dtype)
    low, high = (float(bound) for bound in torch.aminmax(finite))
    beyond = of_number(low if -low > high else high, dtype)
    if finite.numel() == 1 or (beyond is not None and beyond.kind == "large"):
        return beyond
    rounded = finite.to(dtype).float()
    error = float((rounded - finite).square().sum(dtype=torch.float64))
    if error <= kind.eps**2 * float(finite.square().sum(dtype=torch.float64)):  # rounding gives a quarter at most
        return None
    gone = int(((rounded == 0) & (finite != 0)).sum())
    return Danger("small", f"{gone} of {finite.numel()} values become 0, the rest loses digits below {kind.tiny:.3g}")


def dangers(gm: fx.GraphModule, dtype: torch.dtype) -> dict[fx.Node, Danger]:
    """Return the values of a graph that must not be rounded to a type."""
    found: dict[fx.Node, Danger] = {}
    for node in gm.graph.nodes:
        tensor = constant(node, gm)
        if tensor is not None:
            danger = of_tensor(tensor, dtype) if tensor.dtype is torch.float32 else None
        else:
            danger = _of_result(node, found, dtype) if node.op == "call_function" and _floating(node) else None
        if danger is not None:
            found[node] = danger
    return found


def of_call(node: fx.Node, dtype: torch.dtype) -> Danger | None:
    """Return what is dangerous about a call by itself: its numbers, or the whole numbers that it turns floating."""
    if node in _COUNTED or (
        (node in CASTS or node in PASSING) and any(map(_whole, node.all_input_nodes)) and _floating(node)
    ):
        return Danger("whole", "whole numbers lose digits")
    found = (of_number(number, dtype) for number in _numbers(node))
    return next((danger for danger in found if danger is not None), None)


def _of_result(node: fx.Node, known: Mapping[fx.Node, Danger], dtype: torch.dtype) -> Danger | None:
    """Return what is dangerous about the result of a call."""
    own = of_call(node, dtype)
    if own is not None and own.kind == "whole":
        return own
    if own is not None and own.kind == "large" and node in _LARGE and node not in DIVISIONS:
        return own
    if own is not None and node in _SCALED and not (own.kind == "large" and node in CLAMPS):
        return Danger("small", own.reason, own.number if own.kind == "small" else 0.0)
    for source in node.all_input_nodes:
        danger = known.get(source)
        if danger is None:
            continue
        epsilon = source.op == "get_attr" and danger.number != 0 and node in _SCALED  # stored, of one element
        if danger.kind == "large" and node in _LARGE:
            return danger
        if danger.kind == "small" and (node in _SMALL or epsilon):
            return danger
        if danger.kind == "small" and (inverse := _inverse(node, danger.number)) > torch.finfo(dtype).max:
            return Danger("large", f"{danger.reason}, and {inverse:.3g} may follow", inverse)
        if danger.kind == "whole" and (node in PASSING or node in PRODUCTS) and _all_whole(node, known):
            return danger
    return None


def _inverse(node: fx.Node, smallest: float) -> float:
    if not smallest:
        return 0.0
    return smallest**-0.5 if node in _RSQRT else 1 / smallest if node in _RECIPROCAL else 0.0


def _numbers(node: fx.Node) -> Iterator[float]:
    if not isinstance(node.target, OpOverload):
        return
    kinds = kinds_of_arguments(node.target)
    for name, value in arguments(node, ()).items():
        if (
            kinds[name] in ("number", "float", "Tensor")
            and isinstance(value, int | float)
            and not isinstance(value, bool)
        ):
            yield float(value)


def _all_whole(node: fx.Node, known: Mapping[fx.Node, Danger]) -> bool:
    """Whether all that a call computes on is made of whole numbers and stored tensors."""
    tensors = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]
    return all(source.op == "get_attr" or (source in known and known[source].kind == "whole") for source in tensors)


def _tensors(node: fx.Node) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]


def _floating(node: fx.Node) -> bool:
    return any(tensor.is_floating_point() for tensor in _tensors(node))


def _whole(node: fx.Node) -> bool:
    """Whether a value holds integers, truth values left out."""
    kinds = [tensor.dtype for tensor in _tensors(node)]
    return any(not (kind.is_floating_point or kind.is_complex or kind is torch.bool) for kind in kinds)

"""Calls that the exporter leaves something of out, in other words (torch 2.13).

avg_pool2d(x, k, .., divisor_override=d)     avg_pool2d(x, k, ..) * (|k| / d)       it ignores the divisor
rrelu(x, lower, upper)                       leaky_relu(x, (lower + upper) / 2)     it knows neither
log_sigmoid(x)                               -softplus(-x)                          it takes a logarithm of 0
log(sigmoid(x))                              -softplus(-x) where that is below 0.5  runtimes do, of -18 and less
batch_norm(x, .., training=True)             (x - mean(x)) * rsqrt(var(x) + eps)    it takes the running statistics
div(x, y, rounding) of integers              floor_divide(x - fmod(x, y), y)        it does so in single precision
x / y, x % y of integers                     see `ir/divisions`                     runtimes end the process
amax(x), amin(x)                             amax(x, all axes)                      it asks for axes
attention(q, k, v) of rank 2 or 3            squeeze(attention(unsqueeze(q), ..))    it takes rank 4 alone
attention(.., mask)                          where(any(mask), attention(.., mask), 0)   a query without a key is not 0
copy(x, smaller)                             copy(x, expand_as(smaller, x))         the result has the smaller shape
item(x) // y, item(x) % y                    refused where y may be -1           runtimes end the process
lstm with projections                        refused: the LSTM of ONNX has none
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from graphopt.backends.onnx_lowering.promoted import promoted
from graphopt.errors import LoweringError
from graphopt.ir.divisions import divided_without_minus_one, divides_integers, integer_quotient
from graphopt.ir.editor import Editor
from graphopt.ir.graph import arguments, constant
from graphopt.ir.operators import Family
from graphopt.ir.provenance import at_line
from graphopt.ir.regions import graph_modules
from graphopt.ir.torch_internals import OpOverload

aten = torch.ops.aten
_NUMBERS_OF_TENSORS = Family("item", "_local_scalar_dense")
_ROUNDED = Family("div.Tensor_mode", "div.Scalar_mode")
_POOLS = {aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}  # with how many spatial axes


def restate(gm: fx.GraphModule) -> None:
    """Rewrite the calls in place; results keep their names, which the signature of an exported program holds.

    Raises:
        LoweringError: a call has no ONNX form.
    """
    for body in graph_modules(gm):
        editor = Editor(body, "lowering")
        for in_other_words in (_other_words, promoted, _spared):
            for node in list(body.graph.nodes):
                with body.graph.inserting_before(node):
                    other = in_other_words(node, editor)
                if other is not None:
                    name = node.name
                    editor.replace(node, other)
                    other.name = name


def _spared(node: fx.Node, editor: Editor) -> fx.Node | None:
    return divided_without_minus_one(node, editor) if divides_integers(node) else None


def _other_words(node: fx.Node, editor: Editor) -> fx.Node | None:
    if node.target in _POOLS:
        return _pool(node, editor)
    if node.target is aten.rrelu.default:
        given = arguments(node, ("self", "lower", "upper"))
        slope = (given["lower"] + given["upper"]) / 2
        return editor.call(aten.leaky_relu.default, given["self"], slope, like=node)
    if node.target is aten.log_sigmoid.default:
        return _log_sigmoid(node.args[0], node, editor)
    if _is_log_of_sigmoid(node):
        sigmoid = node.args[0]
        below = editor.call(aten.lt.Scalar, sigmoid, 0.5, like=node)
        as_written = editor.call(aten.log.default, sigmoid, like=node)
        return editor.call(aten.where.self, below, _log_sigmoid(sigmoid.args[0], node, editor), as_written, like=node)  # type: ignore[union-attr]
    if node.target is aten.batch_norm.default:
        return _normalised(node, editor)
    if node.target in (aten.amax.default, aten.amin.default) and not arguments(node, ("dim",))["dim"]:
        given = arguments(node, ("self", "keepdim"))
        axes = list(range(given["self"].meta["val"].dim()))
        return editor.call(node.target, given["self"], axes, given["keepdim"], like=node) if axes else None
    if node.target is aten.scaled_dot_product_attention.default:
        return _attention(node, editor)
    if node.target in (aten.copy.default, aten.copy_.default):
        target, source = node.args[:2]
        if source.meta["val"].shape != target.meta["val"].shape:  # type: ignore[union-attr]
            node.update_arg(1, editor.call(aten.expand_as.default, source, target, like=node))
    if node.target in (operator.floordiv, operator.mod) and _may_be_minus_one(node):
        raise LoweringError(
            f"A number that depends on the data is divided{at_line(node)}, by one that may be -1, which ends a process "
            "with ONNX Runtime where it is the smallest integer. Divide tensors instead of what `.item()` returns."
        )
    if node in _ROUNDED and divides_integers(node):
        return _quotient(node, editor)
    if node.target is aten.lstm.input and _projects(node):
        raise LoweringError(
            f"The LSTM{at_line(node)} projects its state (proj_size), which the LSTM of ONNX does not. Make it without "
            "proj_size, or keep it out of the model that is lowered."
        )
    return None


def _log_sigmoid(x: Any, node: fx.Node, editor: Editor) -> fx.Node:
    turned = editor.call(aten.neg.default, x, like=node)
    return editor.call(aten.neg.default, editor.call(aten.softplus.default, turned, like=node), like=node)


def _is_log_of_sigmoid(node: fx.Node) -> bool:
    source = node.args[0] if node.target is aten.log.default else None
    if not isinstance(source, fx.Node) or source.target is not aten.sigmoid.default:
        return False
    return bool(source.args[0].meta["val"].is_floating_point())  # type: ignore[union-attr]


def _pool(node: fx.Node, editor: Editor) -> fx.Node | None:
    """Multiply what is divided by the size of the window; padding counts as zeros whatever the divisor is."""
    given = arguments(node, ())
    divisor = given["divisor_override"]
    if divisor is None:
        return None
    if given["ceil_mode"]:
        raise LoweringError(
            f"The pooling{at_line(node)} divides by divisor_override in windows that reach beyond its input "
            "(ceil_mode), which has no ONNX form. Leave out one of the two."
        )
    kernel = given["kernel_size"]
    size = math.prod(kernel) if len(kernel) > 1 else kernel[0] ** _POOLS[node.target]  # type: ignore[index]
    without = {**given, "count_include_pad": True, "divisor_override": None}
    pooled = editor.call(node.target, *without.values(), like=node)  # type: ignore[arg-type]
    return editor.call(aten.mul.Tensor, pooled, size / divisor, like=node)


def _attention(node: fx.Node, editor: Editor) -> fx.Node | None:
    """Let attention have an axis of heads, and a query that its mask lets look at no key give 0."""
    headed = _with_heads(node, editor)
    mask = arguments(node, ("attn_mask",))["attn_mask"]
    if mask is None or _leaves_keys(constant(mask, editor.gm)):
        return headed
    if headed is None:
        headed = editor.call(node.target, *node.args, like=node, **node.kwargs)  # type: ignore[arg-type]
    weights = mask.meta["val"].dtype is not torch.bool
    numbers = mask if weights else editor.call(aten.to.dtype, mask, torch.float32, like=node)
    largest = editor.call(aten.amax.default, numbers, [-1], True, like=node)
    seen = editor.call(aten.gt.Scalar, largest, -math.inf if weights else 0.0, like=node)
    return editor.call(aten.where.ScalarOther, seen, headed, 0.0, like=node)


def _leaves_keys(mask: torch.Tensor | None) -> bool:
    """Whether a mask is known, and lets every query look at a key."""
    return mask is not None and bool((mask if mask.dtype is torch.bool else mask > -math.inf).any(-1).all())


def _with_heads(node: fx.Node, editor: Editor) -> fx.Node | None:
    """Let attention without an axis of heads have one of size 1; heads that share keys are the first of three axes."""
    given = arguments(node, ())
    rank = given["query"].meta["val"].dim()
    if rank not in (2, 3):
        return None
    axes = [0] * (4 - rank) if rank == 2 or given["enable_gqa"] else [1]
    for name in ("query", "key", "value", "attn_mask"):
        value = given[name]
        if value is None or value.meta["val"].dim() < rank:  # a mask of fewer axes broadcasts
            continue
        for axis in axes:
            value = editor.call(aten.unsqueeze.default, value, axis, like=node)
        given[name] = value
    scale, shared = given.pop("scale"), given.pop("enable_gqa")
    result = editor.call(node.target, *given.values(), scale=scale, enable_gqa=shared, like=node)  # type: ignore[arg-type]
    for axis in axes:
        result = editor.call(aten.squeeze.dim, result, axis, like=node)
    return result


def _normalised(node: fx.Node, editor: Editor) -> fx.Node | None:
    """Normalise by the statistics of the batch, where it is these that are asked for."""
    given = arguments(node, ("input", "weight", "bias", "training", "eps"))
    if not given["training"]:
        return None

    def call(target: OpOverload, *args: object) -> fx.Node:
        return editor.call(target, *args, like=node)

    rank = given["input"].meta["val"].dim()
    axes, along = [0, *range(2, rank)], [-1, *[1] * (rank - 2)]
    centred = call(aten.sub.Tensor, given["input"], call(aten.mean.dim, given["input"], axes, True))
    variance = call(aten.mean.dim, call(aten.mul.Tensor, centred, centred), axes, True)
    result = call(aten.mul.Tensor, centred, call(aten.rsqrt.default, call(aten.add.Scalar, variance, given["eps"])))
    for applied, parameter in ((aten.mul.Tensor, given["weight"]), (aten.add.Tensor, given["bias"])):
        if parameter is not None:
            result = call(applied, result, call(aten.reshape.default, parameter, along))
    return result


def _quotient(node: fx.Node, editor: Editor) -> fx.Node:
    """Divide integers as integers: single precision, which the exporter does it in, has 24 bits."""
    given = arguments(node, ("self", "other", "rounding_mode"))
    x, y = given["self"], given["other"]
    if given["rounding_mode"] == "trunc":
        return integer_quotient(x, y, editor, node)
    divide = aten.floor_divide.default if isinstance(y, fx.Node) else aten.floor_divide.Scalar
    return editor.call(divide, x, y, like=node)


def _may_be_minus_one(node: fx.Node) -> bool:
    """Whether the divisor of a division of numbers may be -1; sizes are not negative."""
    numbers = any(other in _NUMBERS_OF_TENSORS for other in node.graph.nodes)
    divisor = node.args[1]
    return numbers and (isinstance(divisor, fx.Node) or bool(divisor == -1))


def _projects(node: fx.Node) -> bool:
    """Whether the state that a recurrent weight takes is narrower than the cell."""
    recurrent = arguments(node, ("params",))["params"][1].meta["val"]
    return bool(recurrent.shape[0] != 4 * recurrent.shape[1])

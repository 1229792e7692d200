"""Spells operators the way a target's integer kernels want them, before anything is placed.

silu(x)            -> mul(x, sigmoid(x))                    where the target has kernels for the two
hardswish(x)       -> mul(x, hardsigmoid(x))                likewise
relu6(x + 3) / 6   -> hardsigmoid(x)                        likewise; 6 * hardsigmoid(x) where nothing takes a sixth
prelu(x, a)        -> leaky_relu(x, a)                      one slope in all
                      add(x, relu(mul(x, a - 1)))           no slope is larger than 1
                      add(x, mul(relu(mul(x, -1)), 1 - a))  otherwise
                      with conv(x, c, groups=channels)      for mul(x, c), where that is faster: no broadcast
batch_norm(x, ..)  -> conv(x, w, b, groups=channels)        1 x 1, of what integers are read of
mean(x, spatial)   -> [flatten](adaptive_avg_pool(x, 1))    where it has one for global pooling
lstm, n layers     -> n lstms of one layer                  where it has one for LSTMs

A spelling of `prelu` is exact for finite x, as integers are. What does not end up between integers keeps its own
spelling (`stays_respelled`): on floats none of these is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.editor import Editor
from graphopt.ir.finite import all_finite
from graphopt.ir.graph import arguments, constant
from graphopt.ir.operators import plain_name
from graphopt.ir.program import Program
from graphopt.passes.quantization.kernels import rank, spatial_mean
from graphopt.passes.quantization.placement import Placement, Site
from graphopt.passes.quantization.plan import stored_name
from graphopt.passes.quantization.recurrent import layer_by_layer, lstm_call
from graphopt.passes.quantization.written_out import hard_sigmoid_of, six_hard_sigmoids_of
from graphopt.targets.description import TargetDescription

aten = torch.ops.aten
_GLOBAL_POOL = {
    3: aten.adaptive_avg_pool1d.default,
    4: aten.adaptive_avg_pool2d.default,
    5: aten.adaptive_avg_pool3d.default,
}
# Operator: its spelling, and the kernels that a target must have for it.
_ACTIVATIONS = {"silu": ("mul_sigmoid", {"mul", "sigmoid"}), "hardswish": ("mul_hardsigmoid", {"mul", "hardsigmoid"})}


@dataclass(frozen=True, eq=False)
class Prepared:
    """A program with nodes respelled.

    Attributes:
        source: the program before.
        respelled: how nodes of it are spelled, by name.
        program: the program after, a copy.
        originals: the old name of each new node that computes what an old one did, "" for the other new nodes.
        units: for each new node the name of the node that it helps to spell.
    """

    source: Program
    respelled: Mapping[str, str]
    program: Program
    originals: Mapping[str, str]
    units: Mapping[str, str]

    @classmethod
    def of(cls, source: Program, respelled: Mapping[str, str]) -> Prepared:
        """Respell nodes in a copy."""
        program = source.copy()
        editor = Editor(program.graph_module, "int8")
        originals, units = respell(editor, respelled)
        return cls(source, respelled, program.with_graph(editor.finish()), originals, units)

    def unit(self, node: fx.Node) -> str:
        """Return the name in the source of a node, or of what it helps to spell."""
        return self.units.get(node.name, node.name)


def spellings(gm: fx.GraphModule, target: TargetDescription) -> dict[str, str]:
    """Return how each node is to be spelled, by name."""
    known = {rule.operator for rule in target.operators}
    found = {}
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        name = plain_name(node)
        if name == "lstm" and name in known and (call := lstm_call(node)) is not None and call.layers > 1:
            found[node.name] = "lstm_layers"
        elif "hardsigmoid" in known and hard_sigmoid_of(node) is not None:
            found[node.name] = "hardsigmoid"
        elif {"mul", "hardsigmoid"} <= known and six_hard_sigmoids_of(node) is not None:
            found[node.name] = "six_hardsigmoids"
        elif name in known:
            continue
        elif name in _ACTIVATIONS and _ACTIVATIONS[name][1] <= known:
            found[node.name] = _ACTIVATIONS[name][0]
        elif name == "mean" and "global_average_pool" in known and spatial_mean(node):
            found[node.name] = "global_average_pool"
        elif name == "batch_norm" and _as_convolution(node, target) and _is_fixed_norm(node, gm):
            found[node.name] = "convolution"
        elif name == "prelu" and (spelling := _of_prelu(node, gm, target)):
            found[node.name] = spelling
    return found


def respell(editor: Editor, wanted: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Respell nodes in place.

    Returns:
        The old name of each new node that computes what an old one did, "" for nodes that compute something else; and
        for each new node the name of the one that it helps to spell.
    """
    renamed, units = {}, {}
    for node in list(editor.graph.nodes):
        spelling = wanted.get(node.name)
        if spelling is None:
            continue
        if spelling == "lstm_layers":
            made = layer_by_layer(editor, node)
            renamed.update(made)
            units.update(dict.fromkeys(made, node.name))
            continue
        with editor.graph.inserting_before(node):
            made_nodes, same = _SPELL[spelling](editor, node)
        renamed.update({new.name: node.name if new in same else "" for new in made_nodes})
        units.update({new.name: node.name for new in made_nodes})
        editor.replace(node, made_nodes[-1])
    return renamed, units


def stays_respelled(respelled: Mapping[str, str], originals: Mapping[str, str], placement: Placement) -> dict[str, str]:
    """Return the spellings that end up on integers; to be worth a convolution, what is spelled must read integers.

    A norm must be read as such, too, and a gate be on integers where what it multiplies is.
    """
    sites = {site.node for site in placement.sites}

    def pays(site: Site) -> bool:
        spelling = respelled.get(originals.get(site.node.name, ""), "")
        if any(operand.target in _GATES and operand not in placement.integers for operand in site.kernel.operands):
            return not spelling
        if "convolution" not in spelling:
            return True
        reads_integers = site.kernel.operands[0] in placement.integers
        if spelling != "convolution":
            return reads_integers
        return reads_integers and site.end is not None and not sites.isdisjoint(site.end.users)

    placed = {originals.get(site.node.name) for site in placement.sites if pays(site)}
    return {name: spelling for name, spelling in respelled.items() if name in placed}


_GATES = (aten.sigmoid.default, aten.hardsigmoid.default)
_Made = tuple[Sequence[fx.Node], Sequence[fx.Node]]  # new calls in order, and those that compute what the old one did
_Scale = Callable[[Editor, fx.Node, Any, str, Tensor], fx.Node]  # scales each channel of a value by stored factors


def _gated(gate: Callable[..., object]) -> Callable[[Editor, fx.Node], _Made]:
    def spell(editor: Editor, node: fx.Node) -> _Made:
        x = node.args[0]
        factor = editor.call(gate, x, like=node)
        product = editor.call(aten.mul.Tensor, x, factor, like=node)
        return [factor, product], [product]

    return spell


def _hardsigmoid(editor: Editor, node: fx.Node) -> _Made:
    made = [editor.call(aten.hardsigmoid.default, hard_sigmoid_of(node), like=node)]
    return made, made


def _six_hardsigmoids(editor: Editor, node: fx.Node) -> _Made:
    sixth = editor.call(aten.hardsigmoid.default, six_hard_sigmoids_of(node), like=node)
    result = editor.call(aten.mul.Tensor, sixth, _constant(editor, node, "six", torch.tensor(6.0)), like=node)
    return [sixth, result], [result]


def _global_pool(editor: Editor, node: fx.Node) -> _Made:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    pool = editor.call(_GLOBAL_POOL[rank(x)], x, [1] * (rank(x) - 2), like=node)
    if arguments(node, ())["keepdim"]:
        return [pool], [pool]
    flat = editor.call(aten.flatten.using_ints, pool, 1, like=node)
    return [pool, flat], [pool, flat]


def _as_convolution(node: fx.Node, target: TargetDescription) -> bool:
    """Whether what scales each channel of a value is best written as a convolution."""
    return target.scales_as_convolutions and rank(node) in _CONV


def _is_fixed_norm(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether a norm of stored statistics, whatever is left out of its weight and bias."""
    given = arguments(node, ())
    stored = [given[name] for name in ("weight", "bias") if given[name] is not None]
    stored += [given["running_mean"], given["running_var"]]
    values = [constant(value, gm) for value in stored]
    return not given["training"] and all(value is not None and all_finite(value) for value in values)


def _convolution(editor: Editor, node: fx.Node) -> _Made:
    given = arguments(node, ())
    read = {name: constant(given[name], editor.gm) for name in ("weight", "bias", "running_mean", "running_var")}
    mean, variance = read["running_mean"], read["running_var"]
    assert mean is not None  # by `_is_fixed_norm`
    assert variance is not None
    scale = (variance.detach().double() + given["eps"]).rsqrt()
    scale = scale if read["weight"] is None else scale * read["weight"].detach().double()
    shift = -mean.detach().double() * scale
    shift = shift if read["bias"] is None else shift + read["bias"].detach().double()
    spatial = rank(node) - 2
    weight = _constant(editor, node, "weight", scale.float().reshape(-1, *[1] * (spatial + 1)))
    bias = _constant(editor, node, "shift", shift.float())
    ones, zeros = [1] * spatial, [0] * spatial
    made = [editor.call(_CONV[rank(node)], given["input"], weight, bias, ones, zeros, ones, len(scale), like=node)]
    return made, made


def _of_prelu(node: fx.Node, gm: fx.GraphModule, target: TargetDescription) -> str:
    """Return the spelling of a prelu, "" for none."""
    known = {rule.operator for rule in target.operators}
    slopes = constant(node.args[1], gm)
    if slopes is None or not all_finite(slopes):
        return ""
    if slopes.numel() == 1:
        return "leaky_relu" if "leaky_relu" in known else ""
    if not {"add", "mul"} <= known:
        return ""
    scaled = "_convolution" if _as_convolution(node, target) else ""
    return ("add_relu" if bool((slopes <= 1).all()) else "add_mul_relu") + scaled


def _leaky_relu(editor: Editor, node: fx.Node) -> _Made:
    slope = float(_slopes(editor, node))
    made = [editor.call(aten.leaky_relu.default, node.args[0], slope, like=node)]
    return made, made


def _add_relu(scale: _Scale) -> Callable[[Editor, fx.Node], _Made]:
    def spell(editor: Editor, node: fx.Node) -> _Made:
        x, slopes = node.args[0], _slopes(editor, node)
        below = scale(editor, node, x, "slopes", slopes - 1)
        below_zero = editor.call(aten.relu.default, below, like=node)
        result = editor.call(aten.add.Tensor, x, below_zero, like=node)
        return [below, below_zero, result], [result]

    return spell


def _add_mul_relu(scale: _Scale) -> Callable[[Editor, fx.Node], _Made]:
    def spell(editor: Editor, node: fx.Node) -> _Made:
        x, slopes = node.args[0], _slopes(editor, node)
        turned = scale(editor, node, x, "sign", torch.full_like(slopes, -1))
        below_zero = editor.call(aten.relu.default, turned, like=node)
        scaled = scale(editor, node, below_zero, "slopes", 1 - slopes)
        result = editor.call(aten.add.Tensor, x, scaled, like=node)
        return [turned, below_zero, scaled, result], [result]

    return spell


def _by_product(editor: Editor, node: fx.Node, x: Any, what: str, factors: Tensor) -> fx.Node:
    factors = factors.reshape(-1, *[1] * (rank(node) - 2)) if rank(node) > 1 else factors
    return editor.call(aten.mul.Tensor, x, _constant(editor, node, what, factors), like=node)


def _by_convolution(editor: Editor, node: fx.Node, x: Any, what: str, factors: Tensor) -> fx.Node:
    spatial = rank(node) - 2
    weight = _constant(editor, node, what, factors.reshape(-1, *[1] * (spatial + 1)))
    ones, zeros = [1] * spatial, [0] * spatial
    return editor.call(_CONV[rank(node)], x, weight, None, ones, zeros, ones, factors.numel(), like=node)


def _slopes(editor: Editor, node: fx.Node) -> Tensor:
    """Return the slopes of a prelu, one or one a channel."""
    slopes = constant(node.args[1], editor.gm)
    assert slopes is not None  # by `_of_prelu`
    return slopes.detach()


def _constant(editor: Editor, node: fx.Node, what: str, value: Tensor) -> fx.Node:
    return editor.read(editor.put(stored_name(node.name, what), value), like=node)


_CONV = {3: aten.conv1d.default, 4: aten.conv2d.default}
_SPELL: dict[str, Callable[[Editor, fx.Node], _Made]] = {
    "mul_sigmoid": _gated(aten.sigmoid.default),
    "mul_hardsigmoid": _gated(aten.hardsigmoid.default),
    "hardsigmoid": _hardsigmoid,
    "six_hardsigmoids": _six_hardsigmoids,
    "global_average_pool": _global_pool,
    "convolution": _convolution,
    "leaky_relu": _leaky_relu,
    "add_relu": _add_relu(_by_product),
    "add_relu_convolution": _add_relu(_by_convolution),
    "add_mul_relu": _add_mul_relu(_by_product),
    "add_mul_relu_convolution": _add_mul_relu(_by_convolution),
}

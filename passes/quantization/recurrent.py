"""LSTMs with integer weights, whose kernels choose the scales of what they read.

lstm(x, (h, c), weights, layers=n)    ->    n calls of one layer each, so that each may stay float
lstm(x, (h, c), weights)              ->    dynamic_lstm(x, h, c, w_int, w_scale, r_int, r_scale, b)

A scale for each gate of each unit. Refused, beside what every layer is: projections, packed sequences.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.editor import Editor
from graphopt.ir.graph import arguments, constant
from graphopt.passes.quantization.plan import RecurrentRecord, stored_name
from graphopt.quantization.formats import IntegerFormat
from graphopt.quantization.qparams import quantize_weight, weight_scales
from graphopt.quantization.recurrent import DYNAMIC_LSTM

aten = torch.ops.aten
PARTS = ("weight", "weight_scale", "recurrent", "recurrent_scale", "bias")
_GATES = (0, 3, 1, 2)  # of torch (input, forget, cell, output) in the kernel's order: input, output, forget, cell


@dataclass(frozen=True, eq=False)
class Lstm:
    """A call of an LSTM.

    Attributes:
        node: the call.
        x: its input.
        states: what the hidden and the cell states are at first.
        parameters: of each layer, of each of its directions in turn: both weights, and both biases where it has them.
        biases: whether it has.
        layers: how many there are.
        directions: 1 or 2.
        batch_first: whether samples are the first axis of the input, not the second.
    """

    node: fx.Node
    x: fx.Node
    states: tuple[fx.Node, fx.Node]
    parameters: tuple[fx.Node, ...]
    biases: bool
    layers: int
    directions: int
    batch_first: bool

    @property
    def per_layer(self) -> int:
        """Number of parameters of a layer."""
        return len(self.parameters) // self.layers


def lstm_call(node: fx.Node) -> Lstm | None:
    """Describe an LSTM over whole sequences; None for everything else."""
    if node.target is not aten.lstm.input:
        return None
    given = arguments(node, ())
    nodes = (given["input"], *given["hx"], *given["params"])
    if not all(isinstance(value, fx.Node) for value in nodes) or len(given["hx"]) != 2 or given["train"]:
        return None
    directions = 2 if given["bidirectional"] else 1
    expected = given["num_layers"] * directions * (4 if given["has_biases"] else 2)
    if len(given["params"]) != expected:  # projections have one more
        return None
    return Lstm(
        node,
        given["input"],
        tuple(given["hx"]),
        tuple(given["params"]),
        given["has_biases"],
        given["num_layers"],
        directions,
        given["batch_first"],
    )


def layer_by_layer(editor: Editor, node: fx.Node) -> dict[str, str]:
    """Replace an LSTM by one call for each of its layers.

    Returns:
        The old name of each new result; of each layer that of the whole.
    """
    whole = lstm_call(node)
    assert whole is not None  # the plan found it there
    sequence, ends = whole.x, []
    names = {}
    with editor.graph.inserting_before(node):
        for layer in range(whole.layers):
            rows = slice(layer * whole.directions, (layer + 1) * whole.directions)
            states = [
                editor.call(aten.slice.Tensor, state, 0, rows.start, rows.stop, like=node) for state in whole.states
            ]
            parameters = list(whole.parameters[layer * whole.per_layer : (layer + 1) * whole.per_layer])
            options = (whole.biases, 1, 0.0, False, whole.directions == 2, whole.batch_first)
            call = editor.call(aten.lstm.input, sequence, states, parameters, *options, like=node)
            sequence, *last = (editor.call(operator.getitem, call, item, like=node) for item in range(3))
            ends.append(last)
            names[call.name] = node.name
        joined = [editor.call(aten.cat.default, list(parts), like=node) for parts in zip(*ends, strict=True)]
    for user in list(node.users):
        result = [sequence, *joined][user.args[1]]  # type: ignore[index]
        names[result.name] = user.name
        editor.replace(user, result)
    editor.graph.erase_node(node)
    return names


def stored_lstm(call: Lstm, gm: fx.GraphModule, integers: IntegerFormat) -> dict[str, Tensor]:
    """Return the integers, scales and biases of a layer in the kernel's layout, by the names of its arguments."""
    values = [_read(parameter, gm) for parameter in call.parameters]
    width = len(values) // call.directions
    ways = [values[start : start + width] for start in range(0, len(values), width)]
    stored: dict[str, Tensor] = {}
    for index, name in enumerate(("weight", "recurrent")):
        matrices = [_in_order(way[index]) for way in ways]
        scales = [weight_scales(matrix, integers, 0) for matrix in matrices]
        rounded = [quantize_weight(*pair, integers, 0).t() for pair in zip(matrices, scales, strict=True)]
        stored |= {name: torch.stack(rounded).contiguous(), f"{name}_scale": torch.stack(scales)}
    without = values[0].new_zeros(2 * len(values[0]))
    biases = [torch.cat([_in_order(bias) for bias in way[2:]]) if call.biases else without for way in ways]
    return {**stored, "bias": torch.stack(biases)}


def record_lstms(
    calls: list[Lstm], gm: fx.GraphModule, integers: IntegerFormat
) -> tuple[list[RecurrentRecord], dict[str, Tensor]]:
    """Return a record for each layer, and the tensors that they name; what runs several times is stored once."""
    records: list[RecurrentRecord] = []
    tensors: dict[str, Tensor] = {}
    known: dict[tuple[Any, ...], str] = {}
    for call in calls:
        key = tuple(parameter.target for parameter in call.parameters)
        if key not in known:
            known[key] = call.node.name
            found = stored_lstm(call, gm, integers)
            tensors |= {stored_name(call.node.name, part): tensor for part, tensor in found.items()}
        records.append(RecurrentRecord(site=call.node.name, stored=known[key]))
    return records, tensors


def rewrite_lstms(editor: Editor, records: Iterable[RecurrentRecord], tensors: Mapping[str, Tensor]) -> None:
    """Let every layer that a record names run on its integers."""
    nodes = {node.name: node for node in editor.graph.nodes}
    for record in records:
        _rewrite(editor, nodes[record["site"]], record["stored"], tensors)


def _rewrite(editor: Editor, node: fx.Node, stored: str, tensors: Mapping[str, Tensor]) -> None:
    call = lstm_call(node)
    assert call is not None  # the plan found it there
    learned = constant(call.parameters[-1], editor.gm) if call.biases else None
    with editor.graph.inserting_before(node):
        reads = []
        for part in PARTS:
            name = stored_name(stored, part)
            editor.put(name, tensors[name], kind_of=learned if part == "bias" else None)
            reads.append(editor.read(name, like=node, site=node.name))

        def make(target: Any, *args: Any) -> fx.Node:
            return editor.call(target, *args, like=node, site=node.name)

        result = make(DYNAMIC_LSTM, _steps_first(call, make), *call.states, *reads)
        states, *ends = (make(operator.getitem, result, item) for item in range(3))
        if call.directions == 1:
            flat = make(aten.squeeze.dim, states, 1)
        else:
            flat = make(aten.flatten.using_ints, make(aten.transpose.int, states, 1, 2), 2)
        if call.batch_first:
            flat = make(aten.transpose.int, flat, 0, 1)
    for user in list(node.users):
        editor.replace(user, [flat, *ends][user.args[1]])  # type: ignore[index]
    editor.graph.erase_node(node)


def _steps_first(call: Lstm, make: Callable[..., fx.Node]) -> fx.Node:
    """Return the input as the kernel takes it; between layers, what was turned for the next is not turned back."""
    x = call.x
    if not call.batch_first:
        return x
    turned = x.target is aten.transpose.int and tuple(x.args[1:]) == (0, 1)
    return x.args[0] if turned else make(aten.transpose.int, x, 0, 1)  # type: ignore[return-value]


def _read(parameter: fx.Node, gm: fx.GraphModule) -> Tensor:
    value = constant(parameter, gm)
    assert value is not None  # it is placed
    return value.detach()


def _in_order(gates: Tensor) -> Tensor:
    parts = gates.chunk(4)
    return torch.cat([parts[gate] for gate in _GATES])

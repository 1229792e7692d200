"""What `int8` does to each layer, table and LSTM of a program by itself: how that computes, and what it saves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.graph import constant, tensor_attribute
from graphopt.ir.provenance import module_path
from graphopt.passes.layers.weighted_call import layer_call, uses
from graphopt.passes.quantization.kernels import kernel_of
from graphopt.passes.quantization.plan import Int8Plan, LayerRecord, ValueRecord, stored_name
from graphopt.passes.quantization.prepare import Prepared
from graphopt.passes.quantization.recurrent import PARTS, Lstm, lstm_call
from graphopt.pipeline.knobs import Alternative, Knob, on_changed
from graphopt.quantization.ops import dequantize, dynamic_quantize, fake_quantize
from graphopt.quantization.recurrent import dynamic_lstm


def knobs_of(placed: Prepared, plan: Int8Plan) -> list[Knob]:
    """List what a plan does, weight by weight, in graph order; layers that share one are one site.

    Args:
        placed: the program that the plan was made for, respelled as it says.
        plan: that quantizes all it can.
    """
    gm, prepared = placed.source.graph_module, placed.program
    nodes = {node.name: node for node in placed.source.graph.nodes}
    calls: dict[int, list[tuple[fx.Node, Alternative]]] = {}
    names: dict[int, str] = {}

    def add(weight: fx.Node, node: fx.Node, alternative: Alternative) -> None:
        tensor = tensor_attribute(gm, str(weight.target))
        names.setdefault(id(tensor), str(weight.target))
        calls.setdefault(id(tensor), []).append((node, alternative))

    values = {record["value"]: record for record in plan.values}
    anew = {node.name: node for node in prepared.graph.nodes}
    for table in plan.tables:
        node = nodes[table["site"]]
        add(node.args[0], node, _table(node, plan.tensors, table["weight"]))
    for record in plan.layers:
        found = nodes.get(record["site"])
        layer = None if found is None else layer_call(found, gm)
        if found is None or layer is None or constant(layer.weight, gm) is None:
            continue  # a norm that is written as a layer goes with those around it
        inner = kernel_of(anew[record["site"]], prepared.graph_module)
        assert inner is not None  # it is placed
        assert inner.layer is not None
        read = _reader(record, values.get(inner.layer.input.name))
        weight = _weight(record, plan)
        add(layer.weight, found, on_changed(found, {layer.input: read, layer.weight: lambda _, w=weight: w}))  # type: ignore[misc]
    knobs = [
        Knob(
            names[key], tuple(node.name for node, _ in made), dict(made), {"bytes": _saved(gm, names[key], dict(made))}
        )
        for key, made in calls.items()
    ]
    return knobs + _recurrent(nodes, placed.originals, plan, gm)


def _table(node: fx.Node, tensors: Mapping[str, Tensor], name: str) -> Alternative:
    weight: fx.Node = node.args[0]  # type: ignore[assignment]
    rows = tensors[name].float() * tensors[f"{name}_scale"].unsqueeze(1)
    return on_changed(node, {weight: lambda _: rows})


def _reader(record: LayerRecord, value: ValueRecord | None) -> Callable[[Tensor], Tensor]:
    """Return how a layer's kernel reads its input."""
    if record["scales"] == "dynamic" or value is None:
        return lambda x: dequantize(*dynamic_quantize(x), None)
    scale, zero = torch.tensor(value["scale"]), torch.tensor(value["zero_point"])
    low, high = value["low"], value["high"]
    return lambda x: fake_quantize(x, scale.to(x.device), zero.to(x.device), None, low, high)


def _weight(record: LayerRecord, plan: Int8Plan) -> Tensor:
    """Return the weight that a layer multiplies with, in the layer's own layout."""
    name = record["weight"]
    stored, scale = plan.tensors[name], plan.tensors[f"{name}_scale"]
    of_table = any(table["weight"] == name for table in plan.tables)  # which lies as the layer has it
    axis = 0 if of_table else record["axis"]
    weight: Tensor = dequantize(stored, scale, torch.zeros_like(scale, dtype=stored.dtype), axis)
    return weight.t() if record["transposed"] and not of_table else weight


def _recurrent(
    nodes: Mapping[str, fx.Node], originals: Mapping[str, str], plan: Int8Plan, gm: fx.GraphModule
) -> list[Knob]:
    """List the LSTMs; calls of one with the same weights are one site."""
    layers: dict[str, list[list[Tensor]]] = {}
    for record in plan.recurrent:
        name = originals.get(record["site"], record["site"])
        stored = [plan.tensors[stored_name(record["stored"], part)] for part in PARTS]
        layers.setdefault(name, []).append(stored)
    sharing: dict[tuple[int, ...], list[Lstm]] = {}
    for name in layers:
        call = lstm_call(nodes[name])
        assert call is not None  # it is placed
        sharing.setdefault(tuple(id(constant(parameter, gm)) for parameter in call.parameters), []).append(call)
    knobs = []
    for calls in sharing.values():
        rewritten = [call.node for call in calls]
        matrices = {str(read.target) for read in calls[0].parameters if read.meta["val"].dim() > 1}
        saved = sum(_saved(gm, matrix, rewritten) for matrix in matrices)
        skip = tuple(module_path(node) or node.name for node in rewritten)
        alternatives = {call.node: _lstm(call, layers[call.node.name]) for call in calls}
        knobs.append(Knob(rewritten[0].name, skip, alternatives, {"bytes": saved}))
    return knobs


def _lstm(call: Lstm, layers: list[list[Tensor]]) -> Alternative:
    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        x = args[0].transpose(0, 1) if call.batch_first else args[0]
        ends = []
        for index, stored in enumerate(layers):
            rows = slice(index * call.directions, (index + 1) * call.directions)
            states = [state[rows].contiguous() for state in args[1]]
            found, *last = dynamic_lstm(x, *states, *(tensor.to(x.device) for tensor in stored))
            x = found.transpose(1, 2).flatten(2)
            ends.append(last)
        hidden, cells = (torch.cat(parts) for parts in zip(*ends, strict=True))
        return x.transpose(0, 1) if call.batch_first else x, hidden, cells

    return Alternative(run, lambda result: result[0] if call.batch_first else result[0].transpose(0, 1))


def _saved(gm: fx.GraphModule, weight: str, rewritten: Collection[fx.Node]) -> float:
    """Return the bytes that 8-bit integers save of a weight; scales are a small share of them.

    Where not all that read it are rewritten, it stays beside its integers.
    """
    count = tensor_attribute(gm, weight).numel()
    return 3.0 * count if set(uses(gm, weight)) <= set(rewritten) else -1.0 * count

"""Chooses for each layer whether its activations have static scales, dynamic ones, or stay float.

A layer is run beside the float one with static scales, and where those leave too little with dynamic ones, on the float
network's own activations; how far its outputs are off decides, sample by sample: scales that fit the largest sample are
of no use to the small ones. Weights have as many scales as are stored, and the nearest integers, also where GPTQ rounds
them later.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.data.batches import Batch
from graphopt.ir.graph import constant
from graphopt.ir.operators import RECURRENT_LAYERS
from graphopt.ir.program import Program
from graphopt.passes.layers.weighted_call import WeightedCall
from graphopt.passes.quantization.layers import scale_axis
from graphopt.passes.quantization.placement import Choice, Placement, Site
from graphopt.passes.quantization.recurrent import lstm_call, stored_lstm
from graphopt.pipeline.knobs import Alternative, on_changed
from graphopt.pipeline.plan import Refusal
from graphopt.quantization.formats import IntegerFormat
from graphopt.quantization.ops import dequantize, dynamic_quantize, fake_quantize
from graphopt.quantization.qparams import QParams, quantize_weight, weight_scales
from graphopt.quantization.recurrent import dynamic_lstm
from graphopt.statistics.alternatives import compare, compare_on
from graphopt.targets.description import TargetDescription

_LEAST_GAIN = 3.0  # dB that dynamic scales must bring: their kernels are slower
_WANTED = 20.0  # dB at which nothing more is asked of static scales
_LEAST = 6.0  # dB below which a layer stays float
_MOST_KEPT = 1 << 22  # numbers


def choose_forms(
    placement: Placement,
    program: Program,
    scales: Mapping[fx.Node, QParams],
    target: TargetDescription,
    batches: Callable[[], Iterable[Batch]],
    seen: Mapping[fx.Node, Sequence[Tensor]],
) -> dict[fx.Node, Choice]:
    """Return the layers that are not to have the scales they were placed with.

    Args:
        placement: every layer with static scales where its kernels take them.
        program: the prepared program.
        scales: parameters of its values.
        target: what the runtime can do.
        batches: reads the samples to compare on.
        seen: values of the layers' inputs on these samples, see `inputs_to_keep`; where there are any, of all.
    """
    first: dict[fx.Node, dict[str, Alternative]] = {}
    second: dict[fx.Node, dict[str, Alternative]] = {}
    gm = program.graph_module

    @functools.lru_cache(maxsize=1)  # of the layer that is being compared: all together are as large as the program
    def rounded(layer: WeightedCall, axis: int | None) -> Tensor:
        return _rounded(layer, gm, target.weight, axis)

    for site in placement.sites:
        layer = site.kernel.layer
        if site.kernel.name == "lstm":
            first[site.node] = {"dynamic": _integer_lstm(site.node, gm, target.weight)}
        if layer is None or not _has_a_choice(site):
            continue
        weight = functools.partial(rounded, layer, scale_axis(site.rule, layer, target.weight))
        static = _static(scales[placement.root(layer.input)])
        first[site.node] = {"static": _with(layer, weight, static)}
        second[site.node] = {"dynamic": _with(layer, weight, _dynamic)}

    def compared(ways: Mapping[fx.Node, Mapping[str, Alternative]]) -> dict[fx.Node, dict[str, float]]:
        return compare_on(gm, seen, ways) if seen else compare(program, batches(), ways)

    found = compared(first)
    wanting = {node: other for node, other in second.items() if found[node]["static"] < _WANTED}
    for node, ratios in compared(wanting).items() if wanting else ():
        found[node].update(ratios)
    return {node: choice for node, ratios in found.items() if (choice := _choice(node, ratios)) is not None}


def inputs_to_keep(
    placement: Placement, program: Program, originals: Mapping[str, str], samples: int
) -> dict[fx.Node, str]:
    """Return what calibration is to keep the values of, and its name there, for layers to be compared by them.

    Nothing where that does not tell all or is much: the program is run again then. Of a network of convolutions only
    the last layer has a choice, and all of it would be run to see what that reads.

    Args:
        placement: see `choose_forms`.
        program: the prepared program.
        originals: names of its nodes in the one that is calibrated, where they differ; "" for what is not there.
        samples: how many are compared.
    """
    layers = [site.kernel.layer for site in placement.sites if _has_a_choice(site)]
    inputs = {layer.input: originals.get(layer.input.name, layer.input.name) for layer in layers if layer is not None}
    alone = all(_is_alone(layer, program.graph_module) for layer in layers if layer is not None)
    batches = {_samples(node) for node in program.graph.find_nodes(op="placeholder")}
    if any(site.kernel.name == "lstm" for site in placement.sites) or not alone:
        return {}
    numbers = 0
    for node, name in inputs.items():
        others = node.meta["val"].shape[1:]
        if not name or _samples(node) not in batches - {None} or not all(isinstance(size, int) for size in others):
            return {}
        numbers += samples * math.prod(others)
    return inputs if numbers <= _MOST_KEPT else {}


def _is_alone(layer: WeightedCall, gm: fx.GraphModule) -> bool:
    """Whether a layer reads constants but for its input."""
    return all(node is layer.input or constant(node, gm) is not None for node in layer.node.all_input_nodes)


def _samples(node: fx.Node) -> Any:
    """Return the symbol of a value's first axis, None where that has a fixed size."""
    value = node.meta.get("val")
    size = value.shape[0] if isinstance(value, Tensor) and value.dim() else None
    return size.node.expr if isinstance(size, torch.SymInt) else None


def _has_a_choice(site: Site) -> bool:
    return site.kernel.layer is not None and not site.dynamic and "dynamic" in site.rule.scales


def _choice(node: fx.Node, sqnr: Mapping[str, float]) -> Choice | None:
    best = max(sqnr.values())
    if best < _LEAST:
        said = f"8 bits leave its result {best:.0f} dB, {_LEAST:.0f} are wanted"
        remedy = "" if node in RECURRENT_LAYERS else "; `weights:bits=8` rounds its weight alone"
        return Refusal(node.name, said + remedy, "8 bits are too few")
    static = sqnr.get("static", math.inf)
    return "dynamic" if static < _WANTED and sqnr["dynamic"] > static + _LEAST_GAIN else None


def _with(layer: WeightedCall, rounded: Callable[[], Tensor], read: Callable[[Tensor], Tensor]) -> Alternative:
    """Return the layer's call with its weight rounded and an input that is read through `read`."""
    return on_changed(layer.node, {layer.input: read, layer.weight: lambda _: rounded()})


def _integer_lstm(node: fx.Node, gm: fx.GraphModule, integers: IntegerFormat) -> Alternative:
    """Return a layer of an LSTM on integers."""
    call = lstm_call(node)
    assert call is not None  # it is placed
    stored = [*stored_lstm(call, gm, integers).values()]

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor]:
        x, states = args[0], args[1]
        here = [part.to(x.device) for part in stored]
        found, _, _ = dynamic_lstm(x.transpose(0, 1) if call.batch_first else x, *states, *here)
        return (found.permute(2, 0, 1, 3).flatten(2) if call.batch_first else found.transpose(1, 2).flatten(2),)

    return Alternative(run, lambda result: result[0] if call.batch_first else result[0].transpose(0, 1))


def _rounded(layer: WeightedCall, gm: fx.GraphModule, integers: IntegerFormat, axis: int | None) -> Tensor:
    weight = constant(layer.weight, gm)
    assert weight is not None  # it is placed
    scale = weight_scales(weight.detach(), integers, axis)
    zero = torch.zeros_like(scale, dtype=torch.int8)
    rounded: Tensor = dequantize(quantize_weight(weight, scale, integers, axis), scale, zero, axis)
    return rounded


def _static(chosen: QParams) -> Callable[[Tensor], Tensor]:
    scale, zero_point = torch.tensor(chosen.scale), torch.tensor(chosen.zero_point)

    def read(x: Tensor) -> Tensor:
        result: Tensor = fake_quantize(x, scale, zero_point, None, chosen.low, chosen.high)
        return result

    return read


def _dynamic(x: Tensor) -> Tensor:
    result: Tensor = dequantize(*dynamic_quantize(x), None)
    return result

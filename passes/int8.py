"""int8: weights and activations as 8-bit integers, placed so that the target's integer kernels fuse.

    conv -> relu -> conv    becomes    quantize -> conv' -> quantize -> dequantize -> conv' -> ...

Scales come from calibration data; weights are stored as integers in the program; everything about where quantize
and dequantize stand is read from the target description.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from graphopt.ir.editor import Editor
from graphopt.ir.graph import constant
from graphopt.ir.program import Program
from graphopt.passes.layers.weighted_call import WeightedCall
from graphopt.passes.quantization.layers import LayerQuantizer
from graphopt.passes.quantization.placement import Placement, place
from graphopt.passes.quantization.plan import Form, Int8Plan, LayerRecord, ValueRecord, stored_name
from graphopt.passes.quantization.prepare import respell, spellings
from graphopt.passes.quantization.rewrite import Rewriter
from graphopt.passes.quantization.tables import quantize_tables, read_integers
from graphopt.pipeline.context import Context
from graphopt.pipeline.pass_base import Pass
from graphopt.quantization.formats import IntegerFormat
from graphopt.quantization.histogram import ChannelMean, Histogram
from graphopt.quantization.observers import choose
from graphopt.quantization.ops import quantize
from graphopt.quantization.qparams import QParams, from_range
from graphopt.statistics.calibration import Calibration
from graphopt.targets.description import TargetDescription


@dataclass(frozen=True, slots=True)
class Int8Options:
    """Options of int8."""

    observer: Literal["minmax", "percentile", "mse", "entropy"] = "mse"  # how ranges are chosen, see `observers`
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99  # percent of values kept in range by `percentile`
    samples: Annotated[int, Field(ge=1)] = 512  # calibration samples used
    batch_size: Annotated[int, Field(ge=1)] = 32  # samples per calibration step; does not change the result
    weights: Literal["channel", "tensor"] = "channel"  # one weight scale per output channel, or one in all
    bias_correction: bool = True  # correct biases for the mean error that rounding weights causes
    skip: tuple[str, ...] = ()  # glob patterns of module paths or nodes to leave float


class Int8(Pass[Int8Options, Int8Plan]):
    """Store weights and activations as 8-bit integers wherever the target has integer kernels.

    1. Layers (convolutions, products with constant matrices) whose target rule says "compute" become integer.
    2. Operators between them (add, mul, concatenation, pooling) follow where that keeps a chain in integers.
    3. Operators that only move values (reshape, slice, pad) run on the stored integers.
    4. Activations that the integer range clamps anyway (ReLU, ReLU6 in front of an unsigned quantization) are dropped.
    5. Embedding tables are stored as integers, a scale for each row; what is read of them is float again.

    Refused: operators without an integer kernel on the target, weights computed at run time, values that are not
    float32, have no elements or are written in place, what `skip` names.
    """

    name = "int8"
    options_type = Int8Options
    plan_type = Int8Plan
    cached = True
    needs = ("folded",)
    after = ("drop_blocks", "prune", "svd", "recover", "sparsity24")
    reads_target = True

    def plan(self, program: Program, ctx: Context) -> Int8Plan:
        """Place integers, calibrate, and choose scales and integer weights."""
        target = ctx.need_target(self.name)
        respelled = spellings(program.graph, target)
        prepared, originals = _prepared(program, respelled)
        gm = prepared.graph_module
        placement = place(gm, target, self.options.skip)
        tables, tensors, float_tables = quantize_tables(gm, target, self.options.skip)
        refusals = [*placement.refusals, *float_tables]
        if not placement.sites:
            sites = [table["site"] for table in tables]
            return self.new_plan(sites=sites, refusals=refusals, tensors=tensors, tables=tuple(tables))
        calibration = Calibration.of(
            ctx, program, self.name, limit=self.options.samples, batch_size=self.options.batch_size
        )
        scales = self._choose_scales(placement, gm, calibration, originals, target)
        values = _value_records(placement, gm, scales, self.options.observer)
        layers, integers = self._quantize_layers(placement, gm, calibration, originals, scales, target, tensors)
        return self.new_plan(
            sites=[*(table["site"] for table in tables), *(site.node.name for site in placement.sites)],
            refusals=refusals,
            tensors={**integers, **_constants(values, gm)},
            respelled=respelled,
            values=tuple(values),
            layers=tuple(layers),
            dropped=tuple(node.name for node in placement.dropped),
            tables=tuple(tables),
        )

    def apply(self, program: Program, plan: Int8Plan) -> Program:
        """Insert what the plan says."""
        prepared, _ = _prepared(program, plan.respelled)
        editor = Editor(prepared.graph_module, self.name)
        Rewriter(editor, plan).run()
        read_integers(editor, plan.tables, plan.tensors)
        return prepared.with_graph(editor.finish())

    def _choose_scales(
        self,
        placement: Placement,
        gm: fx.GraphModule,
        calibration: Calibration,
        originals: Mapping[str, str],
        target: TargetDescription,
    ) -> dict[fx.Node, QParams]:
        """Choose the parameters of every value that has a scale of its own."""
        values = [*placement.integers, *placement.reads]
        roots = [node for node in values if placement.root(node) is node]
        gates = {site.node: site for site in placement.sites if site.kernel.name == "sigmoid"}
        observed = [node for node in roots if node not in gates and constant(node, gm) is None]
        names = [originals.get(node.name, node.name) for node in observed]
        histograms = dict(zip(observed, calibration.gather((n, Histogram()) for n in names), strict=True))
        scales: dict[fx.Node, QParams] = {}
        for node in gm.graph.nodes:
            if node in histograms:
                limits = placement.dropped.get(node, (-math.inf, math.inf))
                scales[node] = self._choose(histograms[node], target.activation, limits)
            elif node in gates:  # between 0 and the sigmoid of the largest input
                largest = scales[placement.root(gates[node].kernel.operands[0])].range[1]
                scales[node] = from_range(0.0, 1 / (1 + math.exp(-largest)), target.activation)
            elif node in placement.reads and (value := constant(node, gm)) is not None:
                scales[node] = from_range(float(value.detach().min()), float(value.detach().max()), target.activation)
        return scales

    def _choose(self, histogram: Histogram, integers: IntegerFormat, limits: tuple[float, float]) -> QParams:
        return choose(histogram, integers, self.options.observer, percentile=self.options.percentile, bounds=limits)

    def _quantize_layers(
        self,
        placement: Placement,
        gm: fx.GraphModule,
        calibration: Calibration,
        originals: Mapping[str, str],
        scales: Mapping[fx.Node, QParams],
        target: TargetDescription,
        tables: Mapping[str, Tensor],
    ) -> tuple[list[LayerRecord], dict[str, Tensor]]:
        sites = [(site, site.kernel.layer) for site in placement.sites if site.kernel.layer is not None]
        means = self._input_means([layer for _, layer in sites], calibration, originals)
        per_channel = self.options.weights == "channel"
        quantizer = LayerQuantizer(gm, target.weight, tables, per_channel=per_channel)
        layers = [
            quantizer.quantize(site, layer, scales[placement.root(layer.input)].scale, mean)
            for (site, layer), mean in zip(sites, means, strict=True)
        ]
        return layers, quantizer.tensors

    def _input_means(
        self, layers: Sequence[WeightedCall], calibration: Calibration, originals: Mapping[str, str]
    ) -> Sequence[Tensor | None]:
        """Return the mean of each layer's input per channel where biases are to be corrected by it."""
        if not self.options.bias_correction:
            return [None] * len(layers)
        inputs = ((originals.get(layer.input.name, layer.input.name), layer.input_axis) for layer in layers)
        return [found.mean for found in calibration.gather((name, ChannelMean(axis)) for name, axis in inputs)]


def _prepared(program: Program, respelled: Mapping[str, str]) -> tuple[Program, dict[str, str]]:
    """Return a copy with nodes respelled, and the original name of each new node."""
    prepared = program.copy()
    editor = Editor(prepared.graph_module, "int8")
    originals = respell(editor, respelled)
    return prepared.with_graph(editor.finish()), originals


def _value_records(
    placement: Placement, gm: fx.GraphModule, scales: Mapping[fx.Node, QParams], observer: str
) -> list[ValueRecord]:
    moves = {site.node for site in placement.sites if site.rule.role == "move"}
    records = []
    for node in gm.graph.nodes:
        if node not in placement.integers and node not in placement.reads:
            continue
        form: Form = "move" if node in moves else "constant" if constant(node, gm) is not None else "quantize"
        readers = placement.reads.get(node) if node not in placement.integers else None
        source = placement.root(node)
        chosen = scales[source]
        records.append(
            ValueRecord(
                value=node.name,
                form=form,
                source=source.name,
                readers=[reader.name for reader in readers] if readers is not None else None,
                scale=chosen.scale,
                zero_point=chosen.zero_point,
                low=chosen.low,
                high=chosen.high,
                observer=observer if form == "quantize" else "",
            )
        )
    return records


def _constants(values: list[ValueRecord], gm: fx.GraphModule) -> dict[str, Tensor]:
    """Return the integers of constant operands."""
    nodes = {node.name: node for node in gm.graph.nodes}
    tensors = {}
    for record in values:
        if record["form"] == "constant":
            value = constant(nodes[record["value"]], gm)
            assert value is not None
            scale, zero = torch.tensor(record["scale"]), torch.tensor(record["zero_point"])
            tensors[stored_name(record["value"], "integers")] = quantize(
                value.detach(), scale, zero, None, record["low"], record["high"]
            )
    return tensors

"""int8: weights and activations as 8-bit integers, placed so that the target's integer kernels fuse.

    conv -> relu -> conv    becomes    quantize -> conv' -> quantize -> dequantize -> conv' -> ...

Scales come from calibration data; weights are stored as integers in the program; everything about where quantize
and dequantize stand is read from the target description.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import fx

from graphopt.data.batches import Batch, pieces, whole_batches
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.measure.budget import Guard
from graphopt.passes.layers.skipping import check_not_folded
from graphopt.passes.quantization.choice import choose_forms, inputs_to_keep
from graphopt.passes.quantization.given_scales import too_wide
from graphopt.passes.quantization.knobs import knobs_of
from graphopt.passes.quantization.layers import LayerQuantizer
from graphopt.passes.quantization.placement import Placement, Site
from graphopt.passes.quantization.placing import Placer
from graphopt.passes.quantization.plan import Int8Plan, LayerRecord
from graphopt.passes.quantization.prepare import Prepared
from graphopt.passes.quantization.recurrent import lstm_call, record_lstms, rewrite_lstms
from graphopt.passes.quantization.rewrite import Rewriter
from graphopt.passes.quantization.scales import Observing, choose_scales, constant_integers, value_records
from graphopt.passes.quantization.tables import quantize_tables, read_integers
from graphopt.passes.quantization.timing import fastest
from graphopt.passes.quantization.widths import fill_up, widened
from graphopt.pipeline.context import Context
from graphopt.pipeline.knobs import Knob
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.plan import Refusal
from graphopt.quantization.histogram import ChannelMean, FirstSamples, Statistic
from graphopt.quantization.observers import Observer
from graphopt.quantization.qparams import QParams
from graphopt.statistics.calibration import Calibration, read_batches
from graphopt.targets.description import Scales, TargetDescription

_DEFAULT: Mapping[str, Scales | None] = {"auto": None, "static": "static", "dynamic": "dynamic"}
_COMPARED = 32  # samples by which layers choose between static and dynamic scales
_COMPARED_AT_ONCE = 8
_ROUNDED_BY = 128  # samples that weights are rounded by
_PERCENTILE = 99.99
_AT_ONCE = 32
_SIMULATED = (
    "weights=float: activations are rounded to integers between layers that compute in float32, which shows what that "
    "costs in accuracy; nothing is smaller, and it is slower than float32"
)


@dataclass(frozen=True, slots=True)
class Int8Options:
    """How scales are chosen and weights rounded, and what stays float.

    mode: how scales of activations are chosen: from the data (static), by a kernel from each batch (dynamic), or by
        layer (auto).
    observer: how ranges are chosen from the data; auto: by kind of operator.
    percentile: percent of values kept in range, of observer=percentile.
    samples: calibration samples used.
    batch_size: samples per calibration step; changes the last digits of the result at most.
    weights: one scale for each output channel, or for the tensor; float: weights are not rounded.
    weight_bits: of a weight, at most; fewer than 8 lie in bytes all the same, for studies.
    accuracy: what the next two are where nothing is said of them: fast, neither; balanced, the first; best, both.
    bias_correction: biases make up for the mean error of rounded weights; none: except for accuracy=fast.
    rounding: of weights: to the nearest, or by their inputs with gptq; none: gptq for accuracy=best.
    skip: what is left float, as globs of module paths or nodes.
    guard: what keeps layers float that are faster so: a table of costs, timing here, or nothing.
    fill_up: whether depthwise layers get channels that change nothing where the target is faster with them.
    """

    mode: Literal["auto", "static", "dynamic"] = "auto"
    observer: Observer | Literal["auto"] = "auto"
    percentile: Annotated[float, Field(gt=50, le=100)] = _PERCENTILE
    samples: Annotated[int, Field(ge=1)] = 512
    batch_size: Annotated[int, Field(ge=1)] = _AT_ONCE
    weights: Literal["channel", "tensor", "float"] = "channel"
    weight_bits: Annotated[int, Field(ge=2, le=8)] = 8
    accuracy: Literal["fast", "balanced", "best"] = "balanced"
    bias_correction: bool | None = None
    rounding: Literal["nearest", "gptq"] | None = None
    skip: tuple[str, ...] = ()
    guard: Literal["costs", "measure", "none"] = "costs"
    fill_up: bool = True

    def __post_init__(self) -> None:
        """Refuse what would change nothing."""
        if self.percentile != _PERCENTILE and self.observer != "percentile":
            raise ValueError(f"observer={self.observer} reads no `percentile`; observer=percentile does")
        if self.observer == "average" and self.batch_size != _AT_ONCE:
            raise ValueError("observer=average looks at one sample at a time: no `batch_size` with it")
        if self.observer != "auto" and self.mode == "dynamic":
            raise ValueError("mode=dynamic chooses no ranges, so no `observer` either")
        if self.weights == "float" and self.guard == "measure":
            raise ValueError("weights=float simulates integers, slower than float32: no guard=measure with it")
        unread = {
            "mode": self.mode == "dynamic",
            "weight_bits": self.weight_bits < 8,
            "accuracy": self.accuracy != "balanced",
            "rounding": self.rounding is not None,
            "bias_correction": self.bias_correction is not None,
            "fill_up": not self.fill_up,
        }
        option = next((name for name, given in unread.items() if given), None)
        if self.weights == "float" and option:
            raise ValueError(f"weights=float rounds activations alone, by static scales: no `{option}` with it")


class Int8(Pass[Int8Options, Int8Plan]):
    """Store weights and activations as 8-bit integers wherever the target has integer kernels.

    1. Layers (convolutions, products with constant matrices) whose target rule says "compute" become integer.
    2. Operators between them (add, mul, concatenation, pooling) follow where that keeps a chain in integers.
    3. Operators that only move values (reshape, slice, pad) run on the stored integers.
    4. Activations that the integer range clamps anyway (ReLU, ReLU6 in front of an unsigned quantization) are dropped.
    5. Channels of depthwise layers are filled up to as many as the target's kernel computes at once, 80 in place of 72,
       with zero weights behind them, where layers around them do not lose more by the costs. Exact.
    6. LSTMs run layer by layer on integer weights, whose kernels choose the scales of activations.
    7. Embedding tables are stored as integers, a scale for each row, where the target reads such; what is read of them
       is float again.
    8. With `weights=float` activations alone are rounded where they would be, to see what that costs: layers compute in
       float32 then, and nothing is smaller or faster.

    Scales of activations are static, chosen here from data, or dynamic, chosen by a kernel from each batch (so that a
    sample's result depends on those beside it). By default a layer has dynamic ones where static ones leave too little
    of small samples, and stays float where both do.

    What the target's kernels do faster in float stays float, with what turns values into integers and back counted in:
    by a table of costs where the target has one (`guard=costs`), or by timing here integers everywhere, and those that
    the table is for, against float (`guard=measure`).

    Refused: operators without an integer kernel on the target, weights computed at run time, values that are not
    float32, have no elements or are written in place, what `skip` names. There are no activations of 16 bits: ONNX
    Runtime computes with them at 0.4 to 0.8 times the speed of float32, TensorRT does not.
    """

    name = "int8"
    options_type = Int8Options
    plan_type = Int8Plan
    cached = True
    needs = ("folded",)
    produces = ("quantized",)
    after = ("drop_blocks", "prune", "svd", "recover", "sparsity24")
    reads_target = True

    def plan(self, program: Program, ctx: Context) -> Int8Plan:
        """Place integers where they pay, calibrate, and choose scales and integer weights."""
        target, skip, guarding = self._target(ctx), self.options.skip, self.options.guard
        check_not_folded(skip, program, ctx)
        everywhere = Placer(target, skip, self._scales)
        by_costs = Placer(target, skip, self._scales, target.costs)
        if guarding != "measure":
            asked = guarding == "costs" and self._rounds_weights
            return self._planned(by_costs if asked else everywhere, program, ctx)
        guard = Guard(ctx.need_timer(self.name))
        ways = [("integers everywhere", everywhere), *([("integers by costs", by_costs)] if target.costs else [])]
        chosen = fastest(
            ways,
            lambda placer: self._planned(placer, program, ctx),
            lambda plan: self.apply(program, plan),
            program,
            guard,
        )
        measured = {name: list(times) for name, times in guard.measured.items()}
        return dataclasses.replace(chosen, measured={"time of float": measured})

    def _planned(self, placer: Placer, program: Program, ctx: Context) -> Int8Plan:
        target, wider = placer.target, dict[str, int]()
        placed, placement = placer.run(program)
        if self.options.fill_up and self._rounds_weights:
            program, wider = fill_up(placed, placement, target, self.name)
            placed, placement = placer.run(program) if wider else (placed, placement)
        calibration = self._calibration(placement, program, ctx)
        placed, placement, scales = self._with_scales(placer, placed, placement, calibration, ctx)
        prepared, gm = placed.program, placed.program.graph_module
        integers = [site.node for site in placement.sites]
        found = quantize_tables(gm, target, self.options.skip, integers) if self._rounds_weights else None
        tables, tensors, float_tables = found or ([], {}, [])
        values = value_records(placement, gm, scales, self._observing)
        quantizer = LayerQuantizer(gm, target.weight, tensors)
        if self._rounding == "gptq" and placement.sites:
            quantizer.round_by_inputs(placement.sites, prepared, self._batches(program, ctx), ctx.progress)
        layers = self._quantize_layers(quantizer, placement, calibration, placed.originals, scales)
        lstms = [call for site in placement.sites if (call := lstm_call(site.node)) is not None]
        recurrent, gates = record_lstms(lstms, gm, target.weight)
        return self.new_plan(
            sites=[*(table["site"] for table in tables), *(site.node.name for site in placement.sites)],
            refusals=[*placement.refusals, *float_tables],
            tensors={**quantizer.tensors, **gates, **constant_integers(values, gm)},
            widths=wider,
            respelled=placed.respelled,
            values=tuple(values),
            layers=tuple(layers),
            dropped=tuple(node.name for node in placement.dropped),
            tables=tuple(tables),
            recurrent=tuple(recurrent),
            weight_range=(target.weight.low, target.weight.high),
            notes=_notes(wider) if self._rounds_weights else (_SIMULATED,),
        )

    def _with_scales(
        self,
        placer: Placer,
        placed: Prepared,
        placement: Placement,
        calibration: Calibration | None,
        ctx: Context,
    ) -> tuple[Prepared, Placement, dict[fx.Node, QParams]]:
        """Return scales of values, and what is placed where layers chose between static ones, dynamic ones and none."""
        program, prepared, activation = placed.source, placed.program, placer.target.activation
        count = self._compared_samples(program)
        means = [request for _, request in self._means_wanted(placement, placed.originals)]
        choosing = self.options.mode == "auto" and self._rounds_weights
        inputs = inputs_to_keep(placement, prepared, placed.originals, count) if choosing else {}
        kept = [(name, FirstSamples(count)) for name in inputs.values()]

        def scales_of(
            placed: Prepared, placement: Placement, also: Sequence[tuple[str, Statistic]] = ()
        ) -> dict[fx.Node, QParams]:
            gm, observing = placed.program.graph_module, self._observing
            return choose_scales(placement, gm, calibration, placed.originals, activation, observing, also)

        scales = scales_of(placed, placement, [*means, *kept])
        if wide := too_wide(placement, scales):
            units = {placed.unit(node): reason for node, reason in wide.items()}
            placer = placer.without({unit: Refusal(unit, reason) for unit, reason in units.items()})
            return self._with_scales(placer, *placer.run(program), calibration, ctx)
        if not choosing or calibration is None:
            return placed, placement, scales
        found = zip(inputs, calibration.gather(kept), strict=True)
        seen = {node: self._compared_batches(program, first.values) for node, first in found}
        choice = choose_forms(placement, prepared, scales, placer.target, lambda: self._compared(program, ctx), seen)
        if not choice:
            return placed, placement, scales
        placed, placement = placer.again(placed, choice)
        return placed, placement, scales_of(placed, placement)

    def apply(self, program: Program, plan: Int8Plan) -> Program:
        """Insert what the plan says."""
        prepared = Prepared.of(widened(program, plan.widths, self.name), plan.respelled).program
        editor = Editor(prepared.graph_module, self.name)
        Rewriter(editor, plan).run()
        read_integers(editor, plan.tables, plan.tensors)
        rewrite_lstms(editor, plan.recurrent, plan.tensors)
        return prepared.with_graph(editor.finish())

    def knobs(self, program: Program, ctx: Context) -> list[Knob]:
        """List what it does to each weight, of those that there are: none is filled up."""
        plan = Int8(dataclasses.replace(self.options, fill_up=False)).plan(program, ctx)
        return knobs_of(Prepared.of(program, plan.respelled), plan)

    def _calibration(self, placement: Placement, program: Program, ctx: Context) -> Calibration | None:
        """Return what saw the samples; None where nothing needs them and there are none."""
        if not placement.sites:
            return None
        if ctx.samples is None and all(site.dynamic for site in placement.sites):
            if self.options.bias_correction:
                ctx.need_samples(self.name, "to see what rounded weights lose on average (bias_correction=yes)")
            return None
        ctx.need_samples(self.name, "to measure the ranges of activations (mode=dynamic, for products, needs none)")
        per_sample = self.options.observer == "average"  # it asks for the range of each
        together = 1 if per_sample else self.options.batch_size
        return Calibration.of(ctx, program, self.name, limit=self.options.samples, batch_size=together)

    def _compared(self, program: Program, ctx: Context) -> Iterator[Batch]:
        """Yield samples by which layers choose; none are read where no layer has a choice."""
        samples = ctx.need_samples(self.name, "to choose how layers are quantized")
        yield from whole_batches(samples, _COMPARED_AT_ONCE, self._compared_samples(program), takes=program.takes)

    def _compared_batches(self, program: Program, values: torch.Tensor) -> list[torch.Tensor]:
        """Return values of the same samples in the same batches."""
        size = program.takes(min(_COMPARED_AT_ONCE, self._compared_samples(program)))
        return [values[piece] for piece in pieces(len(values), size, program.takes)]

    def _compared_samples(self, program: Program) -> int:
        return max(min(self.options.samples, _COMPARED), program.takes(1))

    @property
    def _rounds_weights(self) -> bool:
        return self.options.weights != "float"

    @property
    def _scales(self) -> Scales | None:
        """Return how scales of activations are chosen, None for what each kernel is best at."""
        return _DEFAULT[self.options.mode] if self._rounds_weights else "static"

    @property
    def _observing(self) -> Observing:
        return Observing(self.options.observer, self.options.percentile)

    @property
    def _rounding(self) -> Literal["nearest", "gptq"]:
        return self.options.rounding or ("gptq" if self.options.accuracy == "best" else "nearest")

    def _target(self, ctx: Context) -> TargetDescription:
        """Return the target, with weights of no more bits and scales than asked for."""
        target = ctx.need_target(self.name)
        weight = dataclasses.replace(target.weight, bits=min(target.weight.bits, self.options.weight_bits))
        if self.options.weights == "tensor":
            weight = dataclasses.replace(weight, granularity="tensor")
        return dataclasses.replace(target, weight=weight)

    def _batches(self, program: Program, ctx: Context) -> list[Batch]:
        samples = ctx.need_samples(self.name, "to round weights by what they are multiplied with")
        return read_batches(
            program, samples, limit=min(self.options.samples, _ROUNDED_BY), batch_size=_COMPARED_AT_ONCE
        )

    def _quantize_layers(
        self,
        quantizer: LayerQuantizer,
        placement: Placement,
        calibration: Calibration | None,
        originals: Mapping[str, str],
        scales: Mapping[fx.Node, QParams],
    ) -> list[LayerRecord]:
        sites = [(site, site.kernel.layer) for site in placement.sites if site.kernel.layer is not None]
        means = {}
        if calibration is not None:
            wanted = self._means_wanted(placement, originals)
            found = calibration.gather(request for _, request in wanted)
            means = {site: seen.mean for (site, _), seen in zip(wanted, found, strict=True)}
        if not self._rounds_weights:
            return []
        read = {site: None if site.dynamic else scales[placement.root(layer.input)].scale for site, layer in sites}
        for site, layer in sites:
            quantizer.leave_room(site, layer, read[site])
        return [quantizer.quantize(site, layer, read[site], means.get(site)) for site, layer in sites]

    def _means_wanted(
        self, placement: Placement, originals: Mapping[str, str]
    ) -> list[tuple[Site, tuple[str, ChannelMean]]]:
        """Return the layers whose biases are to be corrected by the mean of their input per channel, and what tells."""
        wanted = self.options.bias_correction if self._rounds_weights else False
        if not (self.options.accuracy != "fast" if wanted is None else wanted):
            return []
        layers = [(site, site.kernel.layer) for site in placement.sites]
        return [
            (site, (originals.get(layer.input.name, layer.input.name), ChannelMean(layer.input_axis)))
            for site, layer in layers
            if layer is not None and originals.get(site.node.name) != ""  # what scales channels is exact
        ]


def _notes(wider: Mapping[str, int]) -> tuple[str, ...]:
    if not wider:
        return ()
    named = ", ".join(f"`{name}` to {size}" for name, size in wider.items())
    return (f"filled up with channels that change nothing, as integer kernels are faster so: {named}",)

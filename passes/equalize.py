"""equalize: the channels of a value are scaled to like ranges, so that one scale of integers suits all of them. Exact.

    norm(x; w, b) -> linear W          becomes    norm(x; w / s, b / s) -> linear W s
    conv W, b -> relu -> conv V        becomes    conv W / s, b / s -> relu -> conv V s
    y -> linear W, y read elsewhere    becomes    y * (1 / s) -> linear W s

s is a power of two for each channel, so no digit changes. It is where rounding to integers adds least to what the
layers give (`equalization.noise`): Xiao et al. 2023, "SmoothQuant", equation 4, and for convolutions Nagel et al. 2019,
"Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1, with the ranges of activations.

MiniLM is 3.2 dB nearer its float outputs so after `int8`, ResNet-20 0.1 dB.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, fx
from typing_extensions import TypedDict  # pydantic reads plans, and takes no other before Python 3.12

from graphopt.ir.editor import Editor
from graphopt.ir.graph import arguments, tensor_attribute
from graphopt.ir.program import Program
from graphopt.passes.equalization.noise import best_scale
from graphopt.passes.equalization.sites import Absorber, Scalable, find_sites
from graphopt.passes.layers.weighted_call import WeightedCall, weighted_call
from graphopt.passes.layers.weights import by_taps, scale_inputs, scale_outputs
from graphopt.pipeline.context import Context
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.plan import Plan, Refusal
from graphopt.quantization.histogram import ChannelRange
from graphopt.statistics.calibration import Calibration

aten = torch.ops.aten

_MULTIPLICATION = 3.0  # dB that one that is put in must bring beyond what scales that cost nothing must


@dataclass(frozen=True, slots=True)
class EqualizeOptions:
    """Which values are scaled.

    gain: dB that rounding must add less, by the model, for a value to be scaled.
    multiply: put a multiplication behind a value that is read elsewhere too, or that takes no factor in.
    samples: calibration samples used.
    batch_size: samples per calibration step; changes the last digits of the result at most.
    """

    gain: Annotated[float, Field(ge=0)] = 1.0
    multiply: bool = True
    samples: Annotated[int, Field(ge=1)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 32


class EqualizedRecord(TypedDict):
    """One value that is scaled by a tensor of the plan; `gain`: dB that rounding adds less, by the model."""

    value: str
    kind: Absorber
    maker: str
    readers: list[str]
    gain: float


@dataclass(frozen=True, kw_only=True)
class EqualizePlan(Plan):
    """Values whose channels are scaled, in graph order."""

    values: tuple[EqualizedRecord, ...] = ()


class Equalize(Pass[EqualizeOptions, EqualizePlan]):
    """Scale channels to like ranges in front of `int8`, and what reads them the other way. Exact.

    1. What a LayerNorm or RMSNorm makes and layers alone read: its weight and bias take the scale in.
    2. What a convolution or linear layer makes, behind operators that a positive factor passes (ReLU, LeakyReLU,
       pooling, views, permutations): its weight and bias take it in. Depthwise and grouped convolutions too.
    3. What linear layers read and nothing takes a scale in for, because others read it too or it comes out of GELU:
       multiplied by the scale (`multiply=no` leaves it).

    Refused: channels of like ranges; weights that several calls share; convolutions behind anything else (ReLU6, SiLU);
    inputs of the program; scales with which a weight would lose digits.
    """

    name = "equalize"
    options_type = EqualizeOptions
    plan_type = EqualizePlan
    cached = True
    tolerance = 1e-6  # powers of two change no digit; sums of convolutions may be taken in another order
    needs = ("folded",)
    after = ("drop_blocks", "prune", "svd", "recover", "sparsity24")
    before = ("int8",)

    def plan(self, program: Program, ctx: Context) -> EqualizePlan:
        """Measure the channels of every value that can be scaled, and choose scales."""
        gm = program.graph_module
        sites, refusals = find_sites(gm, multiply=self.options.multiply)
        if not sites:
            return self.new_plan(sites=(), refusals=refusals)
        calibration = Calibration.of(
            ctx, program, self.name, limit=self.options.samples, batch_size=self.options.batch_size
        )
        wanted = [(site.value.name, ChannelRange(site.readers[0].input_axis)) for site in sites]
        values, tensors = [], {}
        for site, seen in zip(sites, calibration.gather(wanted), strict=True):
            found = self._scaled(gm, site, seen)
            if isinstance(found, str):
                refusals.append(Refusal(site.value.name, found, found.partition(" (")[0]))
                continue
            scale, gain = found
            tensors[_scale_name(site.value.name)] = scale.float()
            readers = [call.node.name for call in site.readers]
            maker = site.maker.name if site.maker is not None else ""
            values.append(
                EqualizedRecord(value=site.value.name, kind=site.kind, maker=maker, readers=readers, gain=gain)
            )
        return self.new_plan(
            sites=[record["value"] for record in values], refusals=refusals, tensors=tensors, values=tuple(values)
        )

    def apply(self, program: Program, plan: EqualizePlan) -> Program:
        """Scale weights, and put multiplications in."""
        program = program.copy()
        editor = Editor(program.graph_module, self.name)
        nodes = {node.name: node for node in program.graph.nodes}
        for record in plan.values:
            scale = plan.tensors[_scale_name(record["value"])].double()
            readers = [weighted_call(nodes[name], editor.gm) for name in record["readers"]]
            changed = [*_readers(editor.gm, readers, scale)]
            if record["kind"] == "multiply":
                _multiply(editor, nodes[record["value"]], [nodes[name] for name in record["readers"]], scale)
            else:
                changed += _made(editor.gm, nodes[record["maker"]], scale)
            for name, tensor in changed:
                editor.put(name, tensor, kind_of=tensor_attribute(editor.gm, name))
        return program.with_graph(editor.finish())

    def _scaled(self, gm: fx.GraphModule, site: Scalable, seen: ChannelRange) -> tuple[Tensor, float] | str:
        """Return the scale of a value's channels and what it gains, or why it is left."""
        weights = [by_taps(call, _stored(gm, call.weight_name).double().cpu()) for call in site.readers]
        scale, gain = best_scale(seen, weights)
        wanted = self.options.gain + (_MULTIPLICATION if site.kind == "multiply" else 0.0)
        if gain <= 0 or gain < wanted:
            return f"its channels have like ranges (scaling them would gain {gain:.1f} of {wanted:g} dB)"
        changed = [*_readers(gm, site.readers, scale)]
        if site.maker is not None:
            changed += _made(gm, site.maker, scale)
        lossy = [name for name, tensor in changed if not _keeps_digits(_stored(gm, name), tensor)]
        return f"a weight would lose digits (`{lossy[0]}`)" if lossy else (scale, gain)


def _readers(gm: fx.GraphModule, readers: Iterable[WeightedCall | None], scale: Tensor) -> Iterable[tuple[str, Tensor]]:
    """Yield the weights of layers that read scaled channels."""
    for call in readers:
        assert call is not None  # the plan found it there
        weight = _stored(gm, call.weight_name)
        yield call.weight_name, scale_inputs(call, weight.double(), scale.to(weight.device)).to(weight.dtype)


def _made(gm: fx.GraphModule, maker: fx.Node, scale: Tensor) -> Iterable[tuple[str, Tensor]]:
    """Yield weight and bias of what is to make channels that are divided by a scale."""
    call = weighted_call(maker, gm)
    reads = (
        [arguments(maker, ()).get(name) for name in ("weight", "bias")] if call is None else [call.weight, call.bias]
    )
    for read in reads:
        if read is None:
            continue
        tensor = _stored(gm, str(read.target))
        factor = 1 / scale.to(tensor.device)
        wide = tensor.double()
        made = scale_outputs(call, wide, factor) if call is not None and read is call.weight else wide * factor
        yield str(read.target), made.to(tensor.dtype)


def _multiply(editor: Editor, value: fx.Node, readers: Iterable[fx.Node], scale: Tensor) -> None:
    """Let layers read a value times 1 / scale."""
    name = editor.put(_scale_name(value.name), (1 / scale).to(value.meta["val"].dtype))
    with editor.graph.inserting_after(value):
        factor = editor.read(name, like=value, site=value.name)
    with editor.graph.inserting_after(factor):
        product = editor.call(aten.mul.Tensor, value, factor, like=value, site=value.name)
    for reader in readers:
        reader.replace_input_with(value, product)


def _stored(gm: fx.GraphModule, name: str) -> Tensor:
    return tensor_attribute(gm, name).detach()


def _keeps_digits(old: Tensor, new: Tensor) -> bool:
    """Whether each number is the old one times a power of two, with all of its digits, none lost to an underflow."""
    return torch.equal(torch.frexp(old.double()).mantissa, torch.frexp(new.double()).mantissa)


def _scale_name(value: str) -> str:
    return f"equalize_{value}.scale"

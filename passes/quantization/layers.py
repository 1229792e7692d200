"""Turns weights and biases into integers.

    w_int  = round(w / s_w), per output channel           s_w = max|w| / 127
    b'     = b - mean over samples of (w' - w) x          w' = w_int * s_w; bias correction
    b_int  = round(b' / (s_x * s_w))                      where the target wants the bias as int32

Bias correction: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
equation 17, with measured means of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx

from graphopt.data.batches import Batch
from graphopt.ir.graph import constant, tensor_attribute
from graphopt.ir.program import Program
from graphopt.passes.layers.weighted_call import WeightedCall
from graphopt.passes.layers.weights import by_taps
from graphopt.passes.quantization.placement import Site
from graphopt.passes.quantization.plan import LayerRecord, stored_name, table_name
from graphopt.passes.quantization.rounding import Rounded, round_by_inputs
from graphopt.pipeline.context import Progress
from graphopt.quantization.formats import IntegerFormat
from graphopt.quantization.qparams import quantize_weight, weight_scales
from graphopt.targets.description import OperatorRule

_INT32 = 2**31 - 1
_Key = tuple[str, int | None, bool]


class LayerQuantizer:
    """Quantizes the layers of one program, weights that several layers share once."""

    def __init__(self, gm: fx.GraphModule, integers: IntegerFormat, tables: Mapping[str, Tensor]) -> None:
        """Prepare to quantize.

        Args:
            gm: the program's graph.
            integers: how weights are stored.
            tables: integers and scales of embedding tables, by name (see `quantize_tables`), which layers may share.
        """
        self._gm = gm
        self._integers = integers
        self._stored: dict[_Key, str] = {}
        self._floors: dict[_Key, Tensor] = {}
        self._tables = tables
        self._rounded: Mapping[str, Rounded] = {}
        self.tensors: dict[str, Tensor] = dict(tables)

    def round_by_inputs(
        self, sites: Iterable[Site], program: Program, batches: Sequence[Batch], progress: Progress
    ) -> None:
        """Round the weights of layers by what they are multiplied with; the others go to the nearest integers.

        Args:
            sites: where layers are placed in the program.
            program: what the batches are run through.
            batches: calibration samples.
            progress: is told.
        """
        axes = {
            layer: scale_axis(site.rule, layer, self._integers)
            for site in sites
            if (layer := site.kernel.layer) is not None
        }
        self._rounded = round_by_inputs(program, axes, self._integers, batches, progress)

    def leave_room(self, site: Site, layer: WeightedCall, input_scale: float | None) -> None:
        """Let the scales of a layer's weight be so large that its bias fits int32, whoever else reads the weight.

        ONNX Runtime rounds a float bias of a convolution to int32 by itself, and what does not fit becomes another.
        Call it for every layer before the first is quantized.
        """
        bias = constant(layer.bias, self._gm)
        if bias is None or input_scale is None:
            return
        key = self._key(site, layer)
        # a bias far larger than the weights must still fit int32
        floor = (bias.detach().abs().double() / (input_scale * _INT32 * 0.5)).float()
        floor = floor.reshape(_sharing(layer), -1).amax(0)
        floor = floor if key[1] is not None else floor.amax()
        self._floors[key] = torch.maximum(floor, self._floors.get(key, floor))

    def quantize(self, site: Site, layer: WeightedCall, input_scale: float | None, mean: Tensor | None) -> LayerRecord:
        """Quantize weight and bias of one layer.

        Args:
            site: where it is placed.
            layer: the layer there.
            input_scale: scale of its input, None where its kernel chooses it.
            mean: mean of its input per channel, to correct the bias.
        """
        weight, bias = tensor_attribute(self._gm, layer.weight_name).detach(), constant(layer.bias, self._gm)
        key = _, axis, transposed = self._key(site, layer)
        name = self._store_weight(key, weight.t() if transposed else weight)
        shift = None if mean is None else self._shift(layer, name, weight, axis, transposed, mean)
        bias_name = self._store_bias(site, bias, shift, name, input_scale)
        return LayerRecord(
            site=site.node.name,
            kernel="matmul" if _is_product(site) else site.kernel.name,
            scales="dynamic" if site.dynamic else "static",
            weight=name,
            axis=axis,
            transposed=transposed,
            bias=bias_name,
            bias_dtype="float" if site.dynamic else site.rule.bias,
        )

    def _key(self, site: Site, layer: WeightedCall) -> _Key:
        """Return what the weight of a layer is stored by: its name, the axis of its scales, whether it is turned."""
        transposed = _is_product(site) and layer.kind == "linear"
        axis = scale_axis(site.rule, layer, self._integers)
        return layer.weight_name, None if axis is None else 1 - axis if transposed else axis, transposed

    def _store_weight(self, key: _Key, weight: Tensor) -> str:
        source, axis, transposed = key
        if key not in self._stored:
            name = f"{source}_int8" + ("_t" if transposed else "") + ("" if axis is not None else "_tensor")
            given = self._rounded.get(source)
            scales = weight_scales(weight, self._integers, axis) if given is None else given.scales.to(weight.device)
            scales = torch.maximum(scales, self._floors.get(key, scales))
            if axis is not None and self._is_table(table_name(source), scales):
                name = table_name(source)
            else:
                if given is not None and torch.equal(scales, given.scales.to(weight.device)):
                    integers = given.integers.t().contiguous() if transposed else given.integers
                else:
                    integers = quantize_weight(weight, scales, self._integers, axis)
                self.tensors[name] = integers.to(weight.device)
                self.tensors[f"{name}_scale"] = scales
            self._stored[key] = name
        return self._stored[key]

    def _is_table(self, name: str, scales: Tensor) -> bool:
        """Whether a table is stored under `name` with the same scales: its rows are a product's output channels."""
        known = self._tables.get(f"{name}_scale")
        return known is not None and torch.equal(known, scales)

    def _shift(
        self, layer: WeightedCall, name: str, weight: Tensor, axis: int | None, transposed: bool, mean: Tensor
    ) -> Tensor:
        """Return the mean change of the output per channel that rounding the weight causes, (out,) float64."""
        scales = self.tensors[f"{name}_scale"].double()
        if axis is not None:
            shape = [1] * weight.dim()
            shape[axis] = -1
            scales = scales.reshape(shape)
        integers = self.tensors[name]
        rounded = (integers.t() if transposed and name in self._tables else integers).double() * scales
        change = by_taps(layer, (rounded.t() if transposed else rounded) - weight.double()).sum(3)
        return (change * mean.view(layer.groups, 1, -1)).sum(2).flatten()

    def _store_bias(
        self, site: Site, bias: Tensor | None, shift: Tensor | None, weight: str, x: float | None
    ) -> str | None:
        if bias is None and (shift is None or site.dynamic or site.kernel.name == "matmul"):
            return None
        value = (bias.detach().double() if bias is not None else 0.0) - (shift if shift is not None else 0.0)
        assert isinstance(value, Tensor)
        name = stored_name(site.node.name, "bias")
        if site.rule.bias == "float" or x is None:
            self.tensors[name] = value.float()
            return name
        scale = (self.tensors[f"{weight}_scale"] * torch.tensor(x, dtype=torch.float32)).reshape(-1)
        scale = scale.repeat(len(value) // scale.numel())
        self.tensors[name] = (value / scale.double()).round_().clamp_(-_INT32, _INT32).to(torch.int32)
        self.tensors[f"{name}_scale"] = scale.contiguous()
        return name


def scale_axis(rule: OperatorRule, layer: WeightedCall, integers: IntegerFormat) -> int | None:
    """Return the axis of a layer's weight that its scales differ along, None for one scale."""
    return layer.weight_axis if rule.by_channel and integers.granularity != "tensor" else None


def _is_product(site: Site) -> bool:
    """Whether a layer becomes a product, to which its bias is added."""
    return site.kernel.name == "matmul" or site.dynamic


def _sharing(layer: WeightedCall) -> int:
    """Return how many output channels share a channel of the weight: those of a transposed convolution's groups."""
    return layer.groups if layer.kind == "transposed conv" else 1

"""Turns weights and biases into integers.

    w_int  = round(w / s_w), per output channel           s_w = max|w| / 127
    b'     = b - mean over samples of (w' - w) x          w' = w_int * s_w; bias correction
    b_int  = round(b' / (s_x * s_w))                      where the target wants the bias as int32

Bias correction: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
equation 17, with measured means of the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from graphopt.ir.graph import arguments, constant
from graphopt.passes.quantization.placement import Site
from graphopt.passes.quantization.plan import LayerRecord, stored_name
from graphopt.quantization.formats import IntegerFormat
from graphopt.quantization.qparams import quantize_weight, weight_scales

_INT32 = 2**31 - 1


class LayerQuantizer:
    """Quantizes the layers of one program, weights that several layers share once."""

    def __init__(self, gm: fx.GraphModule, integers: IntegerFormat, *, per_channel: bool) -> None:
        self._gm = gm
        self._integers = integers
        self._per_channel = per_channel
        self._stored: dict[tuple[str, int | None, bool], str] = {}
        self.tensors: dict[str, Tensor] = {}

    def quantize(self, site: Site, input_scale: float, means: Mapping[str, Tensor]) -> LayerRecord:
        """Quantize weight and bias of one layer.

        Args:
            site: the layer.
            input_scale: scale of its input.
            means: mean of its input per channel under the site's name, to correct the bias; may be absent.
        """
        kernel = site.kernel
        weight, bias = constant(kernel.weight, self._gm), constant(kernel.bias, self._gm)
        assert weight is not None  # placement takes no others
        assert kernel.weight is not None
        transposed = kernel.name == "matmul" and kernel.out_axis == 0
        stored = (weight.t() if transposed else weight).detach()
        axis = self._axis(site, transposed)
        name = self._store_weight(str(kernel.weight.target), stored, axis, transposed, bias, input_scale, site)
        shift = self._shift(site, name, stored, axis, transposed, means)
        bias_name = self._store_bias(site, bias, shift, name, input_scale)
        return LayerRecord(
            site=site.node.name,
            kernel=kernel.name,
            weight=name,
            axis=axis,
            transposed=transposed,
            bias=bias_name,
            bias_dtype=site.rule.bias,
        )

    def _axis(self, site: Site, transposed: bool) -> int | None:
        if not self._per_channel or site.rule.weight_axis is None or self._integers.granularity == "tensor":
            return None
        return 1 if transposed else site.kernel.out_axis

    def _store_weight(
        self, source: str, weight: Tensor, axis: int | None, transposed: bool, bias: Tensor | None, x: float, site: Site
    ) -> str:
        key = (source, axis, transposed)
        if key not in self._stored:
            name = f"{source}_int8" + ("_t" if transposed else "") + ("" if axis is not None else "_tensor")
            scales = weight_scales(weight, self._integers, axis)
            if site.rule.bias == "int32" and bias is not None:
                # a bias far larger than the weights must still fit int32
                floor = (bias.detach().abs().double() / (x * _INT32 * 0.5)).float()
                floor = floor.reshape(_output_groups(site), -1).amax(0)
                scales = torch.maximum(scales, floor if axis is not None else floor.amax())
            self.tensors[name] = quantize_weight(weight, scales, self._integers, axis)
            self.tensors[f"{name}_scale"] = scales
            self._stored[key] = name
        return self._stored[key]

    def _shift(
        self, site: Site, name: str, weight: Tensor, axis: int | None, transposed: bool, means: Mapping[str, Tensor]
    ) -> Tensor | None:
        """Return the mean change of the output per channel that rounding the weight causes, (out,) float64."""
        mean = means.get(site.node.name)
        if mean is None:
            return None
        scales = self.tensors[f"{name}_scale"].double()
        if axis is not None:
            shape = [1] * weight.dim()
            shape[axis] = -1
            scales = scales.reshape(shape)
        change = self.tensors[name].double() * scales - weight.double()
        out_axis = 1 if transposed else site.kernel.out_axis
        change = change.movedim(out_axis, 0)  # (out, in / groups, ...)
        change = change.flatten(2).sum(2) if change.dim() > 2 else change
        if (groups := _output_groups(site)) > 1:  # (out / groups, in), to (out, in / groups)
            change = change.reshape(len(change), groups, -1).transpose(0, 1).flatten(0, 1)
        groups = mean.numel() // change.shape[1]
        per_group = mean.reshape(groups, 1, -1).expand(-1, change.shape[0] // groups, -1).reshape(change.shape)
        return (change * per_group).sum(dim=1)

    def _store_bias(self, site: Site, bias: Tensor | None, shift: Tensor | None, weight: str, x: float) -> str | None:
        if bias is None and (shift is None or site.kernel.name == "matmul"):
            return None
        value = (bias.detach().double() if bias is not None else 0.0) - (shift if shift is not None else 0.0)
        assert isinstance(value, Tensor)
        name = stored_name(site.node.name, "bias")
        if site.rule.bias == "float":
            self.tensors[name] = value.float()
            return name
        scale = (self.tensors[f"{weight}_scale"] * torch.tensor(x, dtype=torch.float32)).reshape(-1)
        scale = scale.repeat(len(value) // scale.numel())
        self.tensors[name] = (value / scale.double()).round_().clamp_(-_INT32, _INT32).to(torch.int32)
        self.tensors[f"{name}_scale"] = scale.contiguous()
        return name


def _output_groups(site: Site) -> int:
    """Return how many output channels share a channel of the weight: those of a transposed convolution's groups.

    Such a weight is (in, out / groups, ...), and output channel g * (out / groups) + j is channel j of group g.
    """
    if not site.kernel.name.startswith("conv_transpose"):
        return 1
    return int(arguments(site.node, ("groups",))["groups"])

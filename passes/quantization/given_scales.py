"""Scales that are not observed: of what has a known range, and of what is read a second time.

sigmoid(x)          0 to the sigmoid of the largest x
hardsigmoid(x)      1 / 255, see below
x * c, relu         what the range of x and the constants allow, where the model computes no such value itself; so
                    where a convolution of one tap multiplies

hardsigmoid(x) = clamp(x + 3, 0, 6) / 6 runs on integers without arithmetic. x is stored with scale 3 / n and zero
point z; the same integers read with zero point z - n are x + 3. These are quantized with scale 6 / 255 and zero point
0, which saturates at 0 and 6, and read with scale 1 / 255. So x is stored from -3 at least, with a scale that divides
3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from torch import fx

from graphopt.ir.graph import constant
from graphopt.passes.quantization.placement import Placement, Site
from graphopt.quantization.formats import IntegerFormat
from graphopt.quantization.qparams import QParams, from_range

SHIFT, WIDTH = 3.0, 6.0  # hardsigmoid is linear over WIDTH, from -SHIFT on
_GIVEN = ("sigmoid", "hardsigmoid")


def given_sites(placement: Placement, originals: Mapping[str, str]) -> dict[fx.Node, Site]:
    """Return the values whose scale is not observed, with the site that computes each.

    Args:
        placement: where integers stand.
        originals: "" for values that the original program does not compute, by name.
    """
    ends = {site.end: site for site in placement.sites if site.end is not None}
    return {end: site for end, site in ends.items() if site.kernel.name in _GIVEN or originals.get(end.name) == ""}


def read_shifted(placement: Placement) -> set[fx.Node]:
    """Return the values whose scale must be one for `hardsigmoid`."""
    return {placement.root(site.kernel.operands[0]) for site in placement.sites if site.kernel.name == "hardsigmoid"}


def given_scale(
    site: Site, placement: Placement, scales: Mapping[fx.Node, QParams], gm: fx.GraphModule, integers: IntegerFormat
) -> QParams:
    """Return the scale of the result of a site out of those of its operands."""
    if site.kernel.name == "hardsigmoid":
        return QParams(float(np.float32(1 / (integers.high - integers.low))), integers.low, integers.low, integers.high)
    weights = () if site.kernel.layer is None else (site.kernel.layer.weight,)
    operands = [_range(operand, placement, scales, gm) for operand in (*site.kernel.operands, *weights)]
    if site.kernel.name == "sigmoid":
        return from_range(0.0, 1 / (1 + math.exp(-operands[0][1])), integers)
    (low, high), (least, most) = operands
    products = (low * least, low * most, high * least, high * most)
    limits = placement.dropped.get(site.end, (-math.inf, math.inf)) if site.end is not None else (-math.inf, math.inf)
    return from_range(max(min(products), limits[0]), min(max(products), limits[1]), integers, limit=limits[1])


def dividing_shift(chosen: QParams, integers: IntegerFormat) -> QParams:
    """Return a scale that divides `SHIFT`, for the same range and -SHIFT; what is beyond 255 * SHIFT is cut off."""
    low, high = min(chosen.range[0], -SHIFT), chosen.range[1]
    levels = integers.high - integers.low
    scale = np.float32(SHIFT / max(1, math.floor(levels * SHIFT / (high - low))))
    zero_point = min(integers.high, integers.low + round(-low / float(scale)))
    return QParams(float(scale), zero_point, integers.low, integers.high)


def steps_of_shift(scale: float) -> int:
    """Return how many steps of a scale that divides it `SHIFT` is."""
    return round(SHIFT / scale)


def _range(
    operand: fx.Node, placement: Placement, scales: Mapping[fx.Node, QParams], gm: fx.GraphModule
) -> tuple[float, float]:
    value = constant(operand, gm)
    if value is not None:
        return float(value.min()), float(value.max())
    return scales[placement.root(operand)].range

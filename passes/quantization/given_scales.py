"""Scales that are not observed: of what has a known range, and of what is read a second time.

sigmoid(x)          0 to the sigmoid of the largest x
hardsigmoid(x)      1 / 255, see below
x * c, relu         what the range of x and the constants allow, where the model computes no such value itself; so
                    where a convolution of one tap multiplies

hardsigmoid(x) = clamp(x + 3, 0, 6) / 6 runs on integers without arithmetic. x is stored with scale 3 / n and zero
point z; the same integers read with zero point z - n are x + 3. These are quantized with scale 6 / 255 and zero point
0, which saturates at 0 and 6, and read with scale 1 / 255. So x is stored with a scale that divides 3, from -3 on where
nothing but it and x * hardsigmoid(x) reads x, and from -3 at least elsewhere. What spans more than 255 steps of 3 stays
float.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
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
    return {placement.root(site.kernel.operands[0]) for site in placement.sites if _is_gate(site)}


def given_scale(
    site: Site, placement: Placement, scales: Mapping[fx.Node, QParams], gm: fx.GraphModule, integers: IntegerFormat
) -> QParams:
    """Return the scale of the result of a site out of those of its operands."""
    if _is_gate(site):
        return QParams(float(np.float32(1 / (integers.high - integers.low))), integers.low, integers.low, integers.high)
    weights = () if site.kernel.layer is None else (site.kernel.layer.weight,)
    operands = [_range(operand, placement, scales, gm) for operand in (*site.kernel.operands, *weights)]
    if site.kernel.name == "sigmoid":
        return from_range(0.0, 1 / (1 + math.exp(-operands[0][1])), integers)
    (low, high), (least, most) = operands
    products = (low * least, low * most, high * least, high * most)
    limits = placement.dropped.get(site.end, (-math.inf, math.inf)) if site.end is not None else (-math.inf, math.inf)
    return from_range(max(min(products), limits[0]), min(max(products), limits[1]), integers, limit=limits[1])


def gated_alone(node: fx.Node) -> bool:
    """Whether hardsigmoid(x) and x * hardsigmoid(x) are all that reads a value x: below -SHIFT both are 0."""
    gates = [user for user in node.users if user.target is torch.ops.aten.hardsigmoid.default]
    products = [user for user in node.users if user.target is torch.ops.aten.mul.Tensor]
    gated = all(any(gate in product.args for gate in gates) for product in products)
    return bool(gates) and gated and len(gates) + len(products) == len(node.users)


def too_wide(placement: Placement, scales: Mapping[fx.Node, QParams]) -> dict[fx.Node, str]:
    """Return the calls of `hardsigmoid` whose operand has no scale that divides `SHIFT`, and why."""
    sites = {site.node: placement.root(site.kernel.operands[0]) for site in placement.sites if _is_gate(site)}
    return {
        node: f"integers of steps that divide {SHIFT:g} do not span its operand ({low:.3g} to {high:.3g})"
        for node, root in sites.items()
        if not _divides_shift(scales[root])
        for low, high in (scales[root].range,)
    }


def dividing_shift(chosen: QParams, integers: IntegerFormat) -> QParams:
    """Return a scale that divides `SHIFT`, for the same range and -SHIFT; that which was chosen where there is none."""
    low, high = min(chosen.range[0], -SHIFT), chosen.range[1]
    levels = integers.high - integers.low
    steps = math.floor(levels * SHIFT / (high - low))
    if not steps:
        return chosen
    scale = np.float32(SHIFT / steps)
    zero_point = min(integers.high, integers.low + round(-low / float(scale)))
    return QParams(float(scale), zero_point, integers.low, integers.high)


def _divides_shift(chosen: QParams) -> bool:
    """Whether x + SHIFT is the same integers with another zero point that is stored, too."""
    steps = steps_of_shift(chosen.scale)
    return math.isclose(steps * chosen.scale, SHIFT, rel_tol=1e-5) and chosen.zero_point - steps >= chosen.low


def steps_of_shift(scale: float) -> int:
    """Return how many steps of a scale that divides it `SHIFT` is."""
    return round(SHIFT / scale)


def _is_gate(site: Site) -> bool:
    return site.kernel.name == "hardsigmoid"


def _range(
    operand: fx.Node, placement: Placement, scales: Mapping[fx.Node, QParams], gm: fx.GraphModule
) -> tuple[float, float]:
    value = constant(operand, gm)
    if value is not None:
        return float(value.min()), float(value.max())
    return scales[placement.root(operand)].range

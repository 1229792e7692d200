"""Gives depthwise convolutions as many channels as the target's integer kernel computes at once.

ONNX Runtime's fastest takes multiples of 16: with 3 x 3 taps 72 channels of 56 x 56 take 206 us and 80 take 118, with
5 x 5 taps 120 of 28 x 28 take 178 and 128 take 100 (1.31.1, x86 with VNNI, one thread). Layers around them take longer:
a group of channels gets there where that costs less, by the target's table of costs, and it takes few more. Exactly
(`graphopt.axes.widening`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from graphopt.axes.groups import Group
from graphopt.axes.infer import infer
from graphopt.axes.layout import Axis
from graphopt.axes.widening import Growing, widen
from graphopt.ir.program import Program
from graphopt.measure.work import is_depthwise
from graphopt.passes.quantization.kernels import kernel_of
from graphopt.passes.quantization.placement import Placement
from graphopt.passes.quantization.prepare import Prepared
from graphopt.passes.quantization.width_costs import WidthCosts
from graphopt.targets.description import TargetDescription

logger = logging.getLogger(__name__)

# Of a group's channels: weights around it grow as much, and are stored. Time alone would allow for more: MobileNetV3's
# block with 17 channels filled up to 32 takes 229 us in place of 297 (56 x 56), with 22 232 in place of 426.
_MOST = 1 / 2


def fill_up(
    placed: Prepared, placement: Placement, target: TargetDescription, made_by: str
) -> tuple[Program, dict[str, int]]:
    """Return the program before it was prepared with wider groups, and by their names how many channels these have.

    Args:
        placed: what is to be quantized.
        placement: where its integers stand.
        target: of how many channels its integer kernel for depthwise convolutions is fastest, and what others take.
        made_by: the pass on whose behalf it gets wider.
    """
    program, found = placed.source, dict[str, int]()
    uneven = _uneven(program, target.depthwise_multiple)
    if not uneven:
        return program, found
    on_integers = {placed.unit(site.node) for site in placement.sites}
    axes = infer(program.graph_module)
    growing, costs = Growing(axes), WidthCosts(axes, placed, placement, target)
    groups = {group.axis: group for group in axes.groups()}
    for name, (weight, size) in uneven.items():
        layout = axes.parameters[weight][0]
        group = groups.get(layout.id) if isinstance(layout, Axis) else None
        why = "it is float" if name not in on_integers else _why_left(growing, group, size)
        if why is not None:
            logger.debug("`%s` does not get %d channels: %s", name, size, why)
        elif group is not None and target.costs and (saved := costs.saved(group, size, target.costs)) <= 0:
            logger.debug("`%s` does not get %d channels: it all takes %.1f us more", name, size, -1e6 * saved)
        elif group is not None:
            found[group.name] = size
    return (program.with_graph(widen(program.graph_module, axes, found, made_by)) if found else program), found


def widened(program: Program, sizes: Mapping[str, int], made_by: str) -> Program:
    """Return a program in which groups have that many channels."""
    if not sizes:
        return program
    gm = program.graph_module
    return program.with_graph(widen(gm, infer(gm), sizes, made_by))


def _uneven(program: Program, multiple: int) -> dict[str, tuple[str, int]]:
    """Return the weight and the next best number of channels of depthwise convolutions, by their names."""
    found = {}
    for node in program.graph.nodes:
        kernel = kernel_of(node, program.graph_module)
        if kernel is None or kernel.layer is None or not is_depthwise(node):
            continue
        channels = kernel.layer.groups
        if channels % multiple and kernel.layer.weight.op == "get_attr":
            found[node.name] = (kernel.layer.weight_name, channels + -channels % multiple)
    return found


def _why_left(growing: Growing, group: Group | None, size: int) -> str | None:
    if group is None:
        return "its channels are several groups, or none that may grow"
    if size > (1 + _MOST) * group.size:
        return f"it has only {group.size}"
    return growing.why_not(group)

"""What a group's count is rounded up to, so that the layers it is part of have widths the runtime's kernels like."""

from __future__ import annotations

import math
from collections.abc import Collection

from graphopt.axes.groups import Group
from graphopt.axes.layout import Axis, Concat, Layout, leaves, size


def multiples(groups: Collection[Group], alignment: int) -> dict[int, int]:
    """Return by axis what its count has to be a multiple of for widths to be multiples of `alignment`.

    An axis that is a layer's whole width has to be aligned itself. Of heads x head_dim, 64 wide each, the heads need
    not be: whatever is left of them, the width is a multiple of 64.
    """
    free = {group.axis for group in groups}
    found = {}
    for group in groups:
        layouts = [member.layout for member in (*group.producers, *group.consumers)]
        factors = [factor for layout in layouts for factor in _others(layout, group.axis, free, alignment)]
        found[group.axis] = math.lcm(*(alignment // math.gcd(alignment, factor) for factor in factors))
    return found


def _others(layout: Layout, axis: int, free: set[int], alignment: int) -> list[int]:
    """Return for each occurrence of an axis what the rest of its product is sure to be a multiple of."""
    if isinstance(layout, Axis):
        return [1] if layout.id == axis else []
    if isinstance(layout, Concat):
        return [factor for part in layout.segments for factor in _others(part, axis, free, alignment)]
    found = []
    for index, part in enumerate(layout.factors):
        outer = math.prod(_static(other) for other in layout.factors[:index] if not _shrinks(other, free))
        # What is inside is rounded before what is outside: it stays whole, or a multiple of the alignment.
        inner = math.prod(math.gcd(_static(other), alignment) for other in layout.factors[index + 1 :])
        found += [factor * outer * inner for factor in _others(part, axis, free, alignment)]
    return found


def _shrinks(layout: Layout, free: set[int]) -> bool:
    return any(axis.id in free for axis in leaves(layout))


def _static(layout: Layout) -> int:
    return int(size(layout))

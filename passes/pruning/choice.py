"""Which groups may lose indices, and which have a ratio of their own."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from graphopt.axes.groups import Group, Unremovable
from graphopt.axes.infer import Axes
from graphopt.errors import UsageError
from graphopt.ir.graph import tensor_attribute
from graphopt.passes.pruning.options import PruneOptions
from graphopt.pipeline.globs import check_glob, is_named
from graphopt.pipeline.plan import Refusal

_PARTICULARS = re.compile(r" ?\(`[^`]*`[^)]*\)")  # the node a reason names, which differs from site to site


@dataclass(frozen=True)
class Choice:
    """What the options make of a program's groups.

    Attributes:
        groups: those that may lose indices.
        ratios: by axis, for those of them that an override names.
        refusals: every axis that stays whole, and why.
    """

    groups: list[Group] = field(default_factory=list)
    ratios: dict[int, float] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)


def choose(axes: Axes, options: PruneOptions) -> Choice:
    """Sort a program's groups by what the options say of them.

    Raises:
        UsageError: a glob matches no group, or two give one group different ratios.
    """
    groups = axes.groups()
    overrides = _overrides(axes, options)
    chosen = Choice(refusals=[_whole(axes, refused) for refused in axes.refusals()])
    if not groups and not chosen.refusals:
        integers = next((name for name in axes.parameters if _integer_matrix(axes, name)), None)
        text = f"; `{integers}` holds integers, so prune before quantizing" if integers else ""
        chosen.refusals.append(Refusal("the program", f"no weight of it produces or consumes an axis{text}"))
    for group in groups:
        ratio, written = overrides.get(group.axis, (1.0, ""))
        if ratio == 0:
            kind = "named in skip" if written.startswith("skip=") else "ratio 0"
            chosen.refusals.append(Refusal(group.name, written, kind))
        elif group.kind not in options.kinds:
            chosen.refusals.append(Refusal(group.name, f"kind `{group.kind}` is not in kinds", "kind not chosen"))
        else:
            chosen.groups.append(group)
            if written:
                chosen.ratios[group.axis] = ratio
    return chosen


def matches(name: str, glob: str) -> bool:
    """Tell whether a glob names an axis, with its kind (`layer1.0.conv1:channels`) or without."""
    return is_named(name, glob) or is_named(name.partition(":")[0], glob)


def _overrides(axes: Axes, options: PruneOptions) -> dict[int, tuple[float, str]]:
    """Return the ratio that an override gives each group it names, and the override."""
    groups, whole = axes.groups(), axes.refusals()
    found: dict[int, tuple[float, str]] = {}
    for ratio, glob, written in options.overrides:
        named = [group for group in groups if matches(group.name, glob)]
        others = [refused.name for refused in whole] if ratio == 0 else []  # these stay whole anyway
        check_glob(written, glob, [group.name for group in groups], kind="group", others=others, matches=matches)
        for group in named:
            earlier, other = found.setdefault(group.axis, (ratio, written))
            if earlier != ratio:
                raise UsageError(
                    f"`{other}` and `{written}` give `{group.name}` different ratios, {earlier:g} and {ratio:g}. "
                    "Keep one of them, or narrow the other's glob."
                )
    return found


def _whole(axes: Axes, refused: Unremovable) -> Refusal:
    """Say why an axis must stay whole."""
    dtype = tensor_attribute(axes.gm, refused.parameter).dtype
    if not dtype.is_floating_point:
        kind = str(dtype).removeprefix("torch.")
        return Refusal(refused.name, f"its weight holds {kind}; prune before quantizing", "its weight holds integers")
    return Refusal(refused.name, refused.reason, _PARTICULARS.sub("", refused.reason))


def _integer_matrix(axes: Axes, name: str) -> bool:
    tensor = tensor_attribute(axes.gm, name)
    return tensor.dim() > 1 and not tensor.dtype.is_floating_point

"""The never-slower guard: times in the runtime what each class of groups gains, and leaves whole what gains nothing.

Groups of one class (same kind, counts and shapes around them) run the same kernels, so they are timed together: the
pruned program against the pruned program with that class whole, in turn. What is left is then timed against the
program that came in, and if that is not faster either, nothing is removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from graphopt.axes.groups import Group
from graphopt.axes.infer import Axes
from graphopt.axes.layout import leaves
from graphopt.axes.rewrite import remove
from graphopt.ir.graph import tensor_attribute
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.measure.bench import Spread
from graphopt.passes.pruning.allocation import Counts
from graphopt.pipeline.context import Context


@dataclass
class Verdict:
    """What the guard found.

    Attributes:
        reasons: by axis, for the groups to be left whole, what was measured.
        measured: by the first group of a class the share of the time that its removal leaves (lower quartile, median,
            upper quartile), and under "all" that of everything removed.
    """

    reasons: dict[int, str] = field(default_factory=dict)
    measured: dict[str, Json] = field(default_factory=dict)


def unpaying(program: Program, axes: Axes, groups: Sequence[Group], counts: Counts, ctx: Context) -> Verdict:
    """Find the groups whose removal does not make the program faster in the target's runtime.

    Args:
        program: before the removal.
        axes: of it.
        groups: all groups that may be pruned.
        counts: how many indices each is to keep.
        ctx: whose target is measured in.
    """
    timer = ctx.need_timer("prune")
    verdict = Verdict()

    def pruned(chosen: Counts) -> Program:
        kept = {axis: range(count) for axis, count in chosen.items()}
        return program.with_graph(remove(program.graph_module, axes, kept))

    shrinking = [group for group in groups if counts.get(group.axis, group.size) < group.size]
    if not shrinking:
        return verdict
    chosen = dict(counts)
    everything = pruned(chosen)
    classes = list(_classes(axes, shrinking, counts).values())
    for members in ctx.progress.track(classes, "timing what removal gains", len(classes)):
        whole = {group.axis: group.size for group in members}
        found = timer(everything, pruned({**counts, **whole}))
        verdict.measured[members[0].name] = _plain(found)
        if found.median >= 1:
            chosen.update(whole)
            verdict.reasons.update(dict.fromkeys(whole, _reason(members, counts, found)))
    if any(chosen[group.axis] < group.size for group in shrinking):
        found = timer(pruned(chosen), program)
        verdict.measured["all"] = _plain(found)
        if found.median >= 1:
            for group in shrinking:
                text = f"all that is removed together takes {_times(found)} of the time"
                verdict.reasons.setdefault(group.axis, text)
    return verdict


def _classes(axes: Axes, groups: Sequence[Group], counts: Counts) -> Mapping[object, list[Group]]:
    """Sort groups by kind, counts, and the shapes of the weights and values that carry their axis."""
    around: dict[int, dict[str, None]] = {group.axis: {} for group in groups}
    for node, dims in axes.layouts.items():
        for axis in {leaf.id: None for layout in dims for leaf in leaves(layout)}:
            if axis in around and node.op != "get_attr":
                around[axis][f"{node.target} {tuple(node.meta['val'].shape)}"] = None
    found: dict[object, list[Group]] = {}
    for group in groups:
        weights = [
            f"{member.dim} {tuple(tensor_attribute(axes.gm, member.parameter).shape)}"
            for member in (*group.producers, *group.consumers)
        ]
        key = (group.kind, counts[group.axis], tuple(sorted(weights)), tuple(sorted(around[group.axis])))
        found.setdefault(key, []).append(group)
    return found


def _reason(members: Sequence[Group], counts: Counts, found: Spread) -> str:
    first = members[0]
    others = f" (timed with {len(members) - 1} others like it)" if len(members) > 1 else ""
    return f"{counts[first.axis]} of {first.size} take {_times(found)} of the time of all{others}"


def _times(found: Spread) -> str:
    return f"{found.median:.3f} ({found.lower:.3f}-{found.upper:.3f})"


def _plain(found: Spread) -> list[Json]:
    return [found.lower, found.median, found.upper]

"""The guard: times in the runtime what each class of groups gains, and leaves whole what gains no more than times vary.

Groups of one class (same kind, counts and shapes around them) run the same kernels, so they are timed together: the
pruned program against the pruned program with that class whole, in turn. What is left is then timed against the
program that came in, and if that is not faster either, nothing is removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphopt.axes.groups import Group
from graphopt.axes.infer import Axes
from graphopt.axes.layout import leaves
from graphopt.axes.rewrite import remove
from graphopt.ir.graph import tensor_attribute
from graphopt.ir.program import Program
from graphopt.measure.budget import Guard
from graphopt.passes.pruning.allocation import Counts
from graphopt.pipeline.context import Progress


def unpaying(
    program: Program, axes: Axes, groups: Sequence[Group], counts: Counts, guard: Guard, progress: Progress
) -> dict[int, str]:
    """Find the groups whose removal does not make the program surely faster in the target's runtime.

    Args:
        program: before the removal.
        axes: of it.
        groups: all groups that may be pruned.
        counts: how many indices each is to keep.
        guard: tells what pays; by the first group of a class it records the share of the time that its removal leaves,
            and under "all" that of everything removed.
        progress: shows how far it has come.

    Returns:
        By axis, for the groups to be left whole, what was measured.
    """
    reasons: dict[int, str] = {}

    def pruned(chosen: Counts) -> Program:
        kept = {axis: range(count) for axis, count in chosen.items()}
        return program.with_graph(remove(program.graph_module, axes, kept))

    shrinking = [group for group in groups if counts.get(group.axis, group.size) < group.size]
    if not shrinking:
        return reasons
    chosen = dict(counts)
    everything = pruned(chosen)
    classes = list(_classes(axes, shrinking, counts).values())
    for members in progress.track(classes, "timing what removal gains", len(classes)):
        whole = {group.axis: group.size for group in members}
        objection = guard.objects(members[0].name, everything, pruned({**counts, **whole}))
        if objection:
            chosen.update(whole)
            reasons.update(dict.fromkeys(whole, _reason(members, counts, objection)))
    if any(chosen[group.axis] < group.size for group in shrinking):
        objection = guard.objects("all", pruned(chosen), program)
        if objection:
            for group in shrinking:
                reasons.setdefault(group.axis, f"all that is removed together takes {objection} of the time")
    return reasons


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


def _reason(members: Sequence[Group], counts: Counts, objection: str) -> str:
    first = members[0]
    others = f" (timed with {len(members) - 1} others like it)" if len(members) > 1 else ""
    return f"{counts[first.axis]} of {first.size} take {objection} of the time of all{others}"

"""Pairing: which value of a student stands for which value of its teacher.

A value means what its users take it for. Passes replace operators, but an operator that is still there takes what
it always took, so its inputs say which values correspond:

    fold    conv -> bn -> relu   becomes   conv' -> relu        relu took bn, so conv' stands for bn
    svd     linear -> gelu       becomes   l1 -> l2 -> gelu     gelu took linear, so l2 stands for linear
    prune   the same operators, narrower                        every value stands for itself

Operators made by a pass from one captured operator act together as that operator, so two factorised layers in a
row pair as well. Where nobody uses a value any more, it stands for the operator it descends from. A teacher value
that no student value stands for (the convolution before a folded BatchNorm) is refused, not guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

import torch
from torch import fx

from graphopt.distillation.addresses import Tap, Tappable, addresses
from graphopt.distillation.cuts import WEIGHTED, residual_points, spatial_size, stage_ends
from graphopt.ir.operators import COPIES, DROPOUTS, REORDERS, RESHAPES, Family
from graphopt.ir.program import Program
from graphopt.ir.provenance import origin
from graphopt.ir.torch_internals import pytree
from graphopt.pipeline.plan import Refusal

T = TypeVar("T")

_SHOWING = RESHAPES | REORDERS | Family("contiguous")  # the same numbers in another shape or order
_IDENTITIES = COPIES | DROPOUTS  # what passes its input on unchanged when nothing is trained


@dataclass(frozen=True, slots=True)
class Pair:
    """One value in two programs, under the teacher's address."""

    teacher: Tap
    student: Tap


def derived_from(student: Program, teacher: Program) -> bool:
    """Whether passes made `student` out of `teacher`: all of its captured operators are the teacher's."""
    known = {descent.node: descent for descent in map(origin, teacher.graph.nodes) if descent}
    calls = [origin(node) for node in student.graph.nodes if node.op == "call_function"]
    for descent in calls:
        twin = known.get(descent.node) if descent else None
        if descent is None or twin is None or (twin.op, twin.module) != (descent.op, descent.module):
            return False
    return bool(calls)


def pair_taps(teacher: Program, student: Program, taps: Sequence[Tap]) -> tuple[list[Pair], list[Refusal]]:
    """Find, for values of the teacher, what stands for them in a student that passes made out of it.

    Returns:
        The pairs in the order of `taps`, and a refusal for each tap without a counterpart.
    """
    stands_for = _correspondence(teacher, student)
    own = {node: address for address, node in addresses(student).items()}
    nodes = {node.name: node for node in teacher.graph.nodes}
    tappable = Tappable(student.graph)
    pairs, refusals = [], []
    for tap in taps:
        found = stands_for.get(_behind_identities(nodes[tap.node]))
        if found is None or found.name not in own:
            refusals.append(Refusal(tap.address, "no value of the student stands for it: a pass merged it away"))
        elif tappable.why_not(found):
            refusals.append(Refusal(tap.address, f"in the student {tappable.why_not(found)}", "no tap in the student"))
        else:
            pairs.append(Pair(tap, Tap(own[found.name], found.name)))
    return pairs, refusals


def pair_stages(teacher: Program, student: Program) -> list[Pair]:
    """Pair two programs of different descent by structure: the ends of their stages, or of their blocks.

    A stage ends where the spatial size changes. Of stages that are not equally many, those of like spatial size pair,
    the deepest where that does not tell. With a single stage, as in a transformer, the boundaries of the blocks of one
    are spread evenly over those of the other (the uniform mapping of TinyBERT, Jiao et al. 2020).
    """
    wide, narrow = stage_ends(teacher), stage_ends(student)
    if len(wide) == len(narrow) == 1:
        wide, narrow = residual_points(teacher), residual_points(student)
        return _as_pairs(teacher, student, list(zip(*spread(wide, narrow), strict=True)))
    if any(map(spatial_size, wide)) and any(map(spatial_size, narrow)):  # what a head takes is no stage
        wide, narrow = ([point for point in points if spatial_size(point)] for points in (wide, narrow))
    return _as_pairs(teacher, student, list(zip(*_of_like_size(wide, narrow), strict=True)))


def _of_like_size(wide: Sequence[fx.Node], narrow: Sequence[fx.Node]) -> tuple[Sequence[fx.Node], Sequence[fx.Node]]:
    """Return as many of both, in order: of the longer those of the nearest sizes, the deepest of equally near."""
    longer, shorter = (wide, narrow) if len(wide) > len(narrow) else (narrow, wide)

    def apart(chosen: Sequence[int]) -> tuple[float, int]:
        pairs = zip((longer[index] for index in chosen), shorter, strict=True)
        return sum(abs(_log_size(one) - _log_size(other)) for one, other in pairs), -sum(chosen)

    best = [longer[index] for index in min(combinations(range(len(longer)), len(shorter)), key=apart)]
    return (best, shorter) if longer is wide else (shorter, best)


def _log_size(node: fx.Node) -> float:
    """Return the logarithm of how many places a value has; of dynamic sizes nothing is known."""
    return math.log(math.prod(size for size in spatial_size(node) if isinstance(size, int)))


def spread(wide: Sequence[T], narrow: Sequence[T]) -> tuple[list[T], list[T]]:
    """Return as many of both, in order: of the longer those that close equal shares of it, the last among them."""
    count = min(len(wide), len(narrow))
    chosen = [[points[(index + 1) * len(points) // count - 1] for index in range(count)] for points in (wide, narrow)]
    return chosen[0], chosen[1]


def _as_pairs(teacher: Program, student: Program, found: Sequence[tuple[fx.Node, fx.Node]]) -> list[Pair]:
    taught = {node: address for address, node in addresses(teacher).items()}
    own = {node: address for address, node in addresses(student).items()}
    return [Pair(Tap(taught[t.name], t.name), Tap(own[s.name], s.name)) for t, s in found]


def _correspondence(teacher: Program, student: Program) -> dict[fx.Node, fx.Node]:
    """Return the student's value for each of the teacher's that has one."""
    captured = {descent.node: node for node in teacher.graph.nodes if (descent := origin(node)) and node.op != "output"}
    groups = _groups(student)
    produced = _by_production(groups, captured)
    used = _by_use(teacher, student, groups, captured)
    means: dict[fx.Node, fx.Node] = {}
    for node in student.graph.nodes:
        value = _meaning(node, produced.get(node), used.get(node, []))
        if value is not None:
            means[node] = value
    stands_for: dict[fx.Node, fx.Node] = {}
    for node, value in means.items():
        taken = stands_for.get(value)
        if taken is None or (produced.get(node) is value and produced.get(taken) is not value):
            stands_for[value] = node
    for node, value in means.items():
        if produced.get(node) is not value and _carries(node):  # a scale went in before it, behind its back
            stands_for = {known: other for known, other in stands_for.items() if other not in _carried(node)}
    return stands_for


def _meaning(node: fx.Node, produced: fx.Node | None, used: Sequence[fx.Node]) -> fx.Node | None:
    """Choose between what a value descends from and what its users take it for."""
    if len(used) > 1:
        return produced if produced in used else None
    if not used or used[0] is produced or produced is None:
        return used[0] if used else produced
    # A scale between the two went into a weight: the one before it, or, if there is none, the one after, which now
    # takes the plain value.
    scaled = _only_scales(used[0], produced)
    weighted = _carried(node)[-1] in WEIGHTED
    return produced if scaled and not weighted else used[0]


def _only_scales(value: fx.Node, start: fx.Node) -> bool:
    """Whether `value` is computed from `start` alone, by calls that take one activation each."""
    active = _activation_inputs(value)
    while value is not start and len(active) == 1:
        value = active[0]
        active = _activation_inputs(value)
    return value is start


def _activation_inputs(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if source.op != "get_attr"] if node.op == "call_function" else []


def _carries(node: fx.Node) -> bool:
    return node in _SHOWING and isinstance(node.args[0], fx.Node)


def _carried(node: fx.Node) -> list[fx.Node]:
    """Return what a chain of views shows, `node` first and the value that was computed last."""
    chain = [node]
    while _carries(chain[-1]):
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    return chain[1:] or chain


def _groups(student: Program) -> dict[str, list[fx.Node]]:
    """Group the student's calls by the captured operator they descend from."""
    groups: dict[str, list[fx.Node]] = {}
    for node in student.graph.nodes:
        descent = origin(node)
        if node.op == "call_function":
            groups.setdefault(descent.node if descent else node.name, []).append(node)
    return groups


def _by_production(groups: Mapping[str, Sequence[fx.Node]], captured: Mapping[str, fx.Node]) -> dict[fx.Node, fx.Node]:
    """Claim the one value that leaves a group for the operator the group descends from."""
    claims = {}
    for name, members in groups.items():
        leaving = [node for node in members if not node.users or any(user not in members for user in node.users)]
        if len(leaving) == 1 and name in captured:
            claims[leaving[0]] = _behind_identities(captured[name])
    return claims


def _by_use(
    teacher: Program, student: Program, groups: Mapping[str, Sequence[fx.Node]], captured: Mapping[str, fx.Node]
) -> dict[fx.Node, list[fx.Node]]:
    """Claim what enters a group, or leaves the program, for what entered the operator, or left the teacher."""
    claims: dict[fx.Node, list[fx.Node]] = {}

    def claim(taken: Sequence[fx.Node], meant: Sequence[fx.Node]) -> None:
        for node, value in zip(taken, meant, strict=True) if len(taken) == len(meant) else ():
            value = _behind_identities(value)
            if value not in claims.setdefault(node, []):
                claims[node].append(value)

    active = _activations(teacher) | _activations(student)
    for name, members in groups.items():
        if name in captured:
            entering = [node for member in members for node in member.all_input_nodes if node not in members]
            meant = [node for node in captured[name].all_input_nodes if node in active]
            claim([node for node in dict.fromkeys(entering) if node in active], meant)
    outputs = [[leaf for leaf in _results(program) if isinstance(leaf, fx.Node)] for program in (student, teacher)]
    shared = min(map(len, outputs))  # taps follow the program's own outputs
    claim(outputs[0][:shared], outputs[1][:shared])
    return claims


def _activations(program: Program) -> set[fx.Node]:
    """Return the values, sizes aside, that depend on an input."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        depends = node.op == "placeholder" or any(source in found for source in node.all_input_nodes)
        tensors = any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(node.meta.get("val")))
        if depends and tensors and node.op != "output":
            found.add(node)
    return found


def _results(program: Program) -> Sequence[object]:
    leaves = next(node for node in program.graph.nodes if node.op == "output").args[0]
    assert isinstance(leaves, tuple | list)
    return leaves


def _behind_identities(node: fx.Node) -> fx.Node:
    while node in _IDENTITIES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node

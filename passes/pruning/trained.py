"""Training between two rounds of removal: what is left learns from the unoptimised program, and loses more then.

    remove, refit, train (`recover`), remove from what was trained, refit, ..

Indices are those of the original throughout; here they become those of a program that has lost some already.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from graphopt.axes.infer import Axes, infer
from graphopt.axes.rewrite import remove
from graphopt.errors import PassError
from graphopt.ir.program import Program

Kept = Mapping[int, Sequence[int]]  # by axis the indices that stay, where some go


@dataclass(frozen=True)
class Trained:
    """A program that lost indices and was trained.

    Attributes:
        program: it.
        axes: of the original.
        kept: the original's indices that it has, by axes of the original.
    """

    program: Program
    axes: Axes
    kept: Kept

    def own(self, kept: Kept) -> tuple[Axes, dict[int, list[int]]]:
        """Return its axes, and which indices of them are the original's `kept`, where it has more than these."""
        axes = self._axes
        named = {group.name: group.axis for group in axes.groups()}
        counts, before = (Counter(map(_unnumbered, names)) for names in (named, [g.name for g in self.axes.groups()]))
        if lost := next((name for name in before if before[name] != counts[name]), ""):
            raise PassError(
                f"Pass `prune` cannot go on from what was trained: an axis of `{lost}` has one index left, which tells "
                "it from no other. Leave at least two (min_channels=2), or leave `epochs` out."
            )
        found = {}
        for group in self.axes.groups():
            wanted = kept.get(group.axis)
            present = self.kept.get(group.axis, range(group.size))
            if wanted is not None and len(wanted) < len(present):
                place = {index: at for at, index in enumerate(present)}
                found[named[group.name]] = [place[index] for index in wanted]
        return axes, found

    @functools.cached_property
    def _axes(self) -> Axes:
        return infer(self.program.graph_module)

    def without(self, kept: Kept) -> Callable[[], Program]:
        """Return what makes the program that has but these of the original's indices."""
        axes, own = self.own(kept)
        return lambda: self.program.with_graph(remove(self.program.graph_module, axes, own, "prune"))


def _unnumbered(name: str) -> str:
    return name.partition("#")[0]


def differing(program: Program, other: Program) -> dict[str, torch.Tensor]:
    """Return the tensors of `program` that are not those of `other`, which has the same names."""
    own, theirs = program.state_dict(), other.state_dict()
    return {name: tensor.detach() for name, tensor in own.items() if not torch.equal(tensor, theirs[name])}

"""Criteria that run the program on samples.

Removing an index is zeroing what the consuming weights multiply it with. For their elements w_k of index i, and one
direction g of how an output reacts to them,

    taylor   E (sum of w_k g_k)^2          what removing i alone does to the outputs, to first order
    obd      E sum of w_k^2 g_k^2 / 2      the same, each element on its own

Where a product of two values sums over the axis, as query times key does, w_k = 1 is a gate there (`gates`).

With a loss, g is its gradient on a few samples: Molchanov et al., "Importance Estimation for Neural Network Pruning",
CVPR 2019, equation 8; LeCun et al., "Optimal Brain Damage", 1989, with the Fisher diagonal for the Hessian. A trained
model's average gradient is zero, which says nothing; the square is taken before the average.

Without a loss, what counts is the distance |f(w) - f(w0)|^2 / 2 from the unpruned outputs f(w0). Its gradient at w0 is
zero too, and so to first order in f the distance is that of its Gauss-Newton form |J dw|^2 / 2. With u drawn from
{-1, 1} for each output, J'u is a gradient that costs one backward pass, and E (dw' J'u)^2 = |J dw|^2 because
E uu' = I: the formulas above with g = J'u, which is what is used (Hutchinson 1990; Martens 2020, section 9).

Both are in units of the loss, so groups can be ranked against each other without normalising them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.axes.groups import Group
from graphopt.data.batches import whole_batches
from graphopt.errors import DataError
from graphopt.ir.walker import Walker
from graphopt.passes.layers.directions import Purpose, directions
from graphopt.passes.pruning.gates import UnitGate, gated
from graphopt.passes.pruning.standing import Standing, Worths
from graphopt.passes.pruning.weight_criteria import mean_one
from graphopt.statistics.calibration import no_batch

_BATCH = 64  # samples run forward at once
_GRADIENT_SAMPLES = 512


def activation(standing: Standing, groups: Sequence[Group]) -> Worths:
    """Mean |a| of the values that carry the axis, where a weight sums over them; mean 1 within a value.

    Polyak and Wolf, "Channel-Level Acceleration of Deep Face Representations", IEEE Access 2015, section III.
    """
    samples = standing.ctx.need_samples("prune", "for criterion=activation")
    observer = _Observer(standing, groups)
    batches = whole_batches(samples, _BATCH, standing.samples, takes=standing.program.takes)
    count = 0
    for batch in standing.ctx.progress.track(batches, "measuring activations"):
        observer.run(batch)
        count += 1
    if not count:
        raise _too_few(standing, "activation")
    return {group.axis: observer.worth(group) for group in groups}


def taylor(standing: Standing, groups: Sequence[Group]) -> Worths:
    """Return the root of E (sum of w g)^2 over what an index is multiplied with where its axis is summed."""

    def squared(each: _Elements) -> torch.Tensor:
        return each.by_index(lambda product: product).square()

    return {axis: worth.sqrt() for axis, worth in _averaged(standing, groups, squared, "taylor").items()}


def obd(standing: Standing, groups: Sequence[Group]) -> Worths:
    """Return E sum of w^2 g^2 / 2 over what an index is multiplied with where its axis is summed."""
    return dict(_averaged(standing, groups, lambda each: each.by_index(lambda product: product.square() / 2), "obd"))


@dataclass(frozen=True)
class _Elements:
    """What the values of a group's axis are multiplied with before they are summed, and one direction.

    Attributes:
        standing: where the pruning stands.
        group: the group.
        gates: those of its axis.
        directions: by name of the weight or gate.
    """

    standing: Standing
    group: Group
    gates: Sequence[UnitGate]
    directions: dict[str, torch.Tensor]

    def by_index(self, of_product: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Sum what is made of w g, element by element, over what each index owns, (indices left,)."""
        standing, axis = self.standing, self.group.axis
        members = self.group.weighed if not self.gates else self.group.consumers
        parts = [
            standing.by_index(of_product(standing.weight(m) * self.directions[m.parameter]), m, axis) for m in members
        ]
        parts += [gate.by_index(of_product(self.directions[gate.name]), axis, standing) for gate in self.gates]
        return torch.stack(parts).sum(0)


class _Observer(Walker):
    """Runs a program and sums up the magnitude of every value that a group's consumers read."""

    def __init__(self, standing: Standing, groups: Sequence[Group]) -> None:
        super().__init__(standing.program)
        self._standing = standing
        self._watched: dict[fx.Node, list[tuple[fx.Node, int]]] = {}
        self._sums: dict[tuple[fx.Node, int], torch.Tensor] = {}
        self._values: dict[int, dict[fx.Node, None]] = {}
        for group in groups:
            for call, value in standing.readings(group):
                self._watched.setdefault(call, []).append((value, group.axis))
                self._values.setdefault(group.axis, {})[value] = None

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call; note what it reads before it may write to it."""
        for value, axis in self._watched.get(node, ()):
            self._note(value, axis)
        return super().call(node, args, kwargs)

    def worth(self, group: Group) -> torch.Tensor | str:
        """Return the mean over the values of a group."""
        values = [self._sums[value, group.axis] for value in self._values.get(group.axis, ())]
        if not values:
            return (
                "no value of it that a weight sums over, outside torch.cond and other regions, can be told apart by "
                "index, which criterion=activation needs"
            )
        return torch.stack([mean_one(value) for value in values]).mean(0)

    def _note(self, value: fx.Node, axis: int) -> None:
        magnitude = self.values[value][0].detach().abs().double()
        for dim in self._standing.dims(value, axis):
            found = self._standing.sums(value, magnitude, dim, axis)
            key = (value, axis)
            self._sums[key] = self._sums[key] + found if key in self._sums else found


def _averaged(
    standing: Standing, groups: Sequence[Group], of_elements: Callable[[_Elements], torch.Tensor], criterion: str
) -> dict[int, torch.Tensor]:
    """Average what `of_elements` makes of every direction over all of them."""
    gm, gates = gated(standing, groups)
    names = [member.parameter for group in groups for member in group.weighed]
    names += [gate.name for each in gates.values() for gate in each]
    totals: dict[int, torch.Tensor] = {}
    count = 0
    setting, limit = f"criterion={criterion}", min(standing.samples, _GRADIENT_SAMPLES)
    samples = standing.ctx.need_samples("prune", f"for {setting}")
    asked = Purpose("prune", setting, "criterion=activation or l2")
    for along in directions(standing.program, gm, list(dict.fromkeys(names)), samples, limit, standing.ctx, asked):
        count += 1
        for group in groups:
            found = of_elements(_Elements(standing, group, gates.get(group.axis, ()), along))
            totals[group.axis] = totals.get(group.axis, torch.zeros_like(found)) + found
    if not count:
        raise _too_few(standing, criterion)
    return {axis: total / count for axis, total in totals.items()}


def _too_few(standing: Standing, criterion: str) -> DataError:
    return no_batch(standing.program, f" for criterion={criterion}")

"""Penalties that a training loop adds to its loss, so that whole groups become small before they are removed.

    program = graphopt.capture(model, (example,)).copy(share_tensors=False).train()
    penalty = GroupLasso(program)
    for x, y in loader:
        (loss(program(x), y) + 1e-4 * penalty()).backward()
        optimizer.step(); optimizer.zero_grad()

What goes together is what `prune` would remove together; after training, `prune` with criterion=l2 (GroupLasso) or
bn_scale (ScaleL1) and scope=global removes what has become small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphopt.axes.groups import Group
from graphopt.axes.infer import infer
from graphopt.errors import UsageError
from graphopt.ir.graph import tensor_attribute
from graphopt.ir.program import Program
from graphopt.passes.pruning.choice import matches
from graphopt.passes.pruning.index_rows import places
from graphopt.passes.pruning.weight_criteria import scales
from graphopt.pipeline.globs import check_globs


@dataclass(frozen=True, eq=False)
class _Slices:
    """Where each index of a group lies in one tensor: positions of the dimension, (indices, positions of each)."""

    name: str
    dim: int
    where: tuple[torch.Tensor, ...]

    def rows(self, program: Program) -> torch.Tensor:
        """Return what each index owns of the tensor as it is now, (indices, elements)."""
        moved = tensor_attribute(program.graph_module, self.name).movedim(self.dim, 0)
        return torch.cat([moved[where.to(moved.device)].flatten(1) for where in self.where], 1)


class GroupLasso:
    """Sum over all groups of sqrt(elements of an index) times the norm of what each index owns, over all its weights.

    Wen et al., "Learning Structured Sparsity in Deep Neural Networks", NIPS 2016, with the groups of Fang et al.,
    "DepGraph", CVPR 2023, equation 5. The square root is that of Yuan and Lin 2006: wide indices cost as narrow ones.
    """

    def __init__(self, program: Program, *, only: Sequence[str] = ("*",)) -> None:
        """Find the groups once.

        Args:
            program: the one that is trained; calls read its tensors as they are then.
            only: globs of the names of groups to take in.

        Raises:
            UsageError: there is no such group.
        """
        self._program = program
        self._groups = [
            tuple(
                _Slices(member.parameter, member.dim, tuple(places(member.layout, group.axis, {})))
                for member in dict.fromkeys([*group.producers, *group.consumers])
            )
            for group in _chosen(program, only)
        ]

    def __call__(self) -> torch.Tensor:
        """Return the penalty, a scalar that gradients flow through."""
        total = []
        for group in self._groups:
            rows = torch.cat([part.rows(self._program) for part in group], 1)
            total.append(math.sqrt(rows.shape[1]) * torch.linalg.vector_norm(rows, dim=1).sum())
        return torch.stack(total).sum()


class ScaleL1:
    """Sum of |gamma| of the norms, and other per-channel scales, that multiply a group's axis.

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017, equation 1.
    """

    def __init__(self, program: Program, *, only: Sequence[str] = ("*",)) -> None:
        """Find the scales once.

        Args:
            program: the one that is trained; calls read its tensors as they are then.
            only: globs of the names of groups to take in.

        Raises:
            UsageError: there is no such group, or no norm scales any.
        """
        known = scales(program.graph_module)
        members = [member.parameter for group in _chosen(program, only) for member in group.members]
        self._program = program
        self._names = list(dict.fromkeys(name for name in members if name in known))
        if not self._names:
            raise UsageError("No norm of this model scales an axis that could be removed; use GroupLasso.")

    def __call__(self) -> torch.Tensor:
        """Return the penalty, a scalar that gradients flow through."""
        gm = self._program.graph_module
        return torch.stack([tensor_attribute(gm, name).abs().sum() for name in self._names]).sum()


def _chosen(program: Program, only: Sequence[str]) -> list[Group]:
    groups = infer(program.graph_module).groups()
    check_globs("only", only, [group.name for group in groups], kind="group", matches=matches)
    return [group for group in groups if any(matches(group.name, glob) for glob in only)]

"""What each index of an axis owns in a tensor that carries it.

    weight (heads x 64, 768), the axis of 12 heads:   by_index (12,),   rows (12, 64 * 768)

Layouts are those of the whole program; the tensor may have lost indices since, and then has a row less for each.
"""

from __future__ import annotations

import torch

from graphopt.axes.groups import coordinates
from graphopt.axes.layout import Layout, surviving, touches
from graphopt.axes.rewrite import Kept


def places(layout: Layout, axis: int, kept: Kept) -> list[torch.Tensor]:
    """Return for each occurrence of an axis in a dimension the positions of each index, (indices left, positions)."""
    found = []
    for owners in coordinates(layout, axis):
        if touches(layout, kept):
            owners = [owners[position] for position in surviving(layout, kept)]
        owner = torch.tensor(owners)
        carried = int((owner >= 0).sum())  # a concatenation carries other axes beside
        indices = len(torch.unique(owner[owner >= 0]))
        order = torch.argsort(owner, stable=True)[len(owners) - carried :]
        found.append(order.view(indices, -1))
    return found


def by_index(values: torch.Tensor, dim: int, layout: Layout, axis: int, kept: Kept) -> torch.Tensor:
    """Sum what each index owns, (indices left,)."""
    others = [d for d in range(values.dim()) if d != dim]
    along = values.sum(others) if others else values  # (size of the dimension,)
    return torch.stack([along[where].sum(1) for where in places(layout, axis, kept)]).sum(0)


def rows(values: torch.Tensor, dim: int, layout: Layout, axis: int, kept: Kept) -> torch.Tensor:
    """Return what each index owns as one row, (indices left, elements)."""
    moved = values.movedim(dim, 0)
    return torch.cat([moved[where].flatten(1) for where in places(layout, axis, kept)], 1)

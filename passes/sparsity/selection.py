"""Chooses which weights of every group of M stay, and refits the others to the outputs.

A row of weights w meets inputs x with second moments H = E[x x']. In each group of M consecutive inputs a set P goes:

    magnitude       P of least |w_P|
    sqnr            P of least w_P' H_PP w_P                     its error in the output, the others left as they are
    sqnr, refit     P of least w_P' (G_PP)^-1 w_P                its error once the others have taken over what they can
    refit           w <- w - w_P (G_PP)^-1 G_P,:                 over this group and those behind it

G is the inverse of H over this group and those behind it: groups are settled from left to right, once each (optimal
brain surgeon, Hassibi and Stork 1993, equations 5; column by column as in SparseGPT, Frantar and Alistarh 2023,
section 3.3, here jointly for all of P).
"""

from __future__ import annotations

from itertools import combinations

import torch

from graphopt.targets.description import SparseFormat

_CONVERGED = 1e-8  # of the squared gradient at the start: about five digits of the weights
_DAMPING = 0.01  # of the mean second moment, added to all: directions hardly seen must not be refitted to


def sparsify(
    weight: torch.Tensor, moments: torch.Tensor | None, form: SparseFormat, *, by_moments: bool, refit: bool
) -> torch.Tensor:
    """Return weights of which each group holds at most `form.nonzeros` that are not zero.

    Args:
        weight: (rows, inputs), `inputs` a multiple of the group.
        moments: second moments of the inputs (inputs, inputs), None where they are not known.
        form: how many consecutive inputs make a group, and how many of each stay.
        by_moments: choose by the error of the outputs instead of by magnitude; by magnitude without `moments`.
        refit: let what stays take over what goes; not without `moments`.
    """
    result = weight.detach().double().clone()
    if moments is None:
        by_moments = refit = False
    elif refit:
        moments = _damped(moments)
    root = None
    if refit and moments is not None:
        root = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True)
    choices = [list(drop) for drop in combinations(range(form.group), form.group - form.nonzeros)]
    for start in range(0, result.shape[1], form.group):
        here = slice(start, start + form.group)
        inverse = None if root is None else root[here, here].T @ root[here, start:]  # (group, inputs left): G
        known = moments[here, here].double() if by_moments and moments is not None else None
        matrices = [_error(drop, known, inverse) for drop in choices]
        block = result[:, here]
        errors = [
            ((block[:, drop] @ matrix) * block[:, drop]).sum(1) for drop, matrix in zip(choices, matrices, strict=True)
        ]
        chosen = torch.stack(errors).argmin(0)  # (rows,); of equals the first
        for index, drop in enumerate(choices):
            _settle(result, chosen == index, [start + offset for offset in drop], drop, inverse)
    return result


def fit(weight: torch.Tensor, sparse: torch.Tensor, moments: torch.Tensor, steps: int = 30) -> torch.Tensor:
    """Return the weights nearest `weight` in the outputs that are zero wherever `sparse` is.

    All rows at once by conjugate gradients from `sparse`, preconditioned by the diagonal.

    Args:
        weight: (rows, inputs).
        sparse: likewise.
        moments: second moments of the inputs (inputs, inputs).
        steps: at most.
    """
    damped = _damped(moments)
    mask = (sparse != 0).double()
    scale = mask / damped.diagonal()
    result = sparse.double()
    residual = ((weight.double() - result) @ damped) * mask
    direction = residual * scale
    power = (residual * direction).sum(1, keepdim=True)
    enough = _CONVERGED * float(power.sum())
    for _ in range(steps):
        if float(power.sum()) <= enough:
            break
        image = (direction @ damped) * mask
        curvature = (direction * image).sum(1, keepdim=True)
        length = torch.where(curvature > 0, power / curvature, 0.0)
        result = result + length * direction
        residual = residual - length * image
        preconditioned = residual * scale
        latest = (residual * preconditioned).sum(1, keepdim=True)
        direction = preconditioned + torch.where(power > 0, latest / power, 0.0) * direction
        power = latest
    return result


def _damped(moments: torch.Tensor) -> torch.Tensor:
    known = moments.double()
    mean = float(known.diagonal().mean()) or 1.0  # inputs that are always zero
    return known + _DAMPING * mean * torch.eye(len(known)).to(known)


def _error(drop: list[int], block: torch.Tensor | None, inverse: torch.Tensor | None) -> torch.Tensor:
    """Return the matrix F of the error w' F w that dropping the weights w causes, or of their magnitude."""
    if block is None:
        return torch.eye(len(drop)).double()
    return block[drop][:, drop] if inverse is None else torch.linalg.inv(inverse[drop][:, drop])


def _settle(
    result: torch.Tensor, rows: torch.Tensor, columns: list[int], drop: list[int], inverse: torch.Tensor | None
) -> None:
    """Drop `columns` of some rows, in place, and let what is right of the group's start take over."""
    here = rows.nonzero().flatten()
    if inverse is not None and len(here):
        start = columns[0] - drop[0]
        gone = result[here][:, columns]  # (chosen rows, dropped)
        result[here, start:] -= gone @ torch.linalg.solve(inverse[drop][:, drop], inverse[drop])
    result[here[:, None], torch.tensor(columns, device=here.device)] = 0.0

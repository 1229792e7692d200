"""Selection: one setting for each of several sites, best by one quantity within limits on others.

    minimize    sum over sites of x[chosen setting]        x: loss, bytes, seconds, ...
    such that   sum over sites of y[chosen setting] <= limit        for each limited quantity y

An integer program with one choice of each site (a multiple-choice knapsack), solved by HiGHS (Huangfu and Hall
2018, "Parallelizing the dual revised simplex method"), through SciPy. Quantities are taken to add up over sites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

Setting: TypeAlias = Mapping[str, float]  # what it costs, by quantity; what is not named is 0
_SLACK = 1e-9  # of a limit: sums of floats differ in their last digits
_GAP = 1e-7  # of the best sum that is left unproved
_CHOSEN = 1 / 2  # what is chosen is 1 to within a tolerance, the rest 0


def select(sites: Sequence[Sequence[Setting]], minimize: str, limits: Mapping[str, float]) -> list[int] | None:
    """Return which setting each site gets, by its number; None where nothing meets all limits.

    >>> select([[{"loss": 0, "bytes": 4}, {"loss": 1, "bytes": 1}], [{"loss": 0, "bytes": 4}]], "loss", {"bytes": 6})
    [1, 0]

    Args:
        sites: the settings of each, one at least; infinite costs are never chosen.
        minimize: a quantity.
        limits: by quantity the largest sum.

    Raises:
        ValueError: a cost or limit is NaN.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    if not sites:
        return [] if all(limit >= 0 for limit in limits.values()) else None
    owner = np.repeat(np.arange(len(sites)), [len(settings) for settings in sites])
    flat = [setting for settings in sites for setting in settings]
    names = [minimize, *limits]
    costs = {name: np.array([setting.get(name, 0.0) for setting in flat], dtype=float) for name in names}
    if any(np.isnan(values).any() for values in costs.values()) or any(limit != limit for limit in limits.values()):
        raise ValueError("A cost or a limit is NaN.")
    possible = np.isfinite(np.stack([costs[name] for name in names])).all(0)
    one_each = csr_array((np.ones(len(flat)), (owner, np.arange(len(flat)))), shape=(len(sites), len(flat)))
    chosen = None
    while True:
        constraints = [LinearConstraint(one_each, 1, 1)]
        for name, limit in limits.items():
            values = np.where(possible, costs[name], 0.0)
            scale = np.abs(values).max() or 1.0  # solvers work to absolute tolerances
            constraints.append(LinearConstraint(values[None] / scale, -np.inf, (limit + abs(limit) * _SLACK) / scale))
        wanted = np.where(possible, costs[minimize], 0.0)
        found = milp(
            wanted / (np.abs(wanted).max() or 1.0),
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, possible.astype(float)),
            constraints=constraints,
            options={"mip_rel_gap": _GAP},
        )
        if found.x is None:
            break
        chosen = np.flatnonzero(found.x > _CHOSEN)
        # What alone costs more than all that is chosen is in no better choice, and hides small costs from the solver.
        better = possible & (wanted <= wanted[chosen].sum())
        if wanted.min() < 0 or (better == possible).all():
            break
        possible = better
    if chosen is None:
        return None
    starts = np.searchsorted(owner, np.arange(len(sites)))
    return [int(index) for index in chosen - starts]

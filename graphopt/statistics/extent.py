"""The largest magnitude of the values at a node."""

from __future__ import annotations

import torch

from graphopt.quantization.histogram import NotFiniteError


class Extent:
    """The largest finite magnitude seen. Infinity is how models mask, and no magnitude.

    Attributes:
        largest: 0 before the first update.
    """

    key = "extent"

    def __init__(self) -> None:
        self.largest = 0.0

    def update(self, x: torch.Tensor) -> None:
        """Take in one batch.

        Raises:
            NotFiniteError: `x` holds NaN.
        """
        if not x.numel():
            return
        values = x.detach().abs()
        largest = float(values.amax())  # NaN where there is one
        if largest != largest:
            raise NotFiniteError
        if largest == float("inf"):
            largest = float(values.nan_to_num(posinf=0.0).amax())
        self.largest = max(self.largest, largest)

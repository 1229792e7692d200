"""How a tensor may be stored as integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Granularity = Literal["tensor", "channel"]


@dataclass(frozen=True, slots=True)
class IntegerFormat:
    """How a tensor may be stored as integers.

    A symmetric format has zero point `(low + high + 1) // 2` rounded to 0 for signed ranges.
    """

    dtype: Literal["int8", "uint8"]
    symmetric: bool
    low: int  # smallest stored value
    high: int  # largest stored value
    granularity: Granularity = "tensor"

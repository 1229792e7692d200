"""What `weights` decided, as plain data; the tensors are named in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from typing_extensions import TypedDict  # pydantic reads plans, and takes no other before Python 3.12

from graphopt.pipeline.plan import Plan


class RowsRecord(TypedDict):
    """How one weight is stored. The plan holds `NAME`, `NAME_scale` and `NAME_zero_point`, see `stored_as`.

    `sites`: nodes that read it. `bits`: of what is chosen; `stored_bits`: of what is stored, 4 for 3. `block`: columns
    that share a scale. `low`: the integer that is stored as bits that are 0. `symmetric`: whether there is one zero
    point. `method`: how it was rounded. `sqnr`: of the weight in dB. `output_sqnr`: of its products, with data.
    `bytes`: before and after.
    """

    sites: list[str]
    bits: int
    stored_bits: int
    columns: int
    block: int
    low: int
    symmetric: bool
    method: str
    sqnr: float | None
    output_sqnr: float | None
    bytes: list[int]


class InputRecord(TypedDict):
    """Scales of the features of a value, which the weights that it meets are divided by (AWQ).

    `value`: the node. `readers`: the products. `norm`: the norm whose weight and bias take them in, "" where a
    multiplication does.
    """

    value: str
    readers: list[str]
    norm: str


@dataclass(frozen=True, kw_only=True)
class WeightsPlan(Plan):
    """Weights as integers.

    Attributes:
        weights: by the name of the weight.
        inputs: what is scaled on the way, in graph order.
    """

    weights: Mapping[str, RowsRecord] = field(default_factory=dict)
    inputs: tuple[InputRecord, ...] = ()


def stored_as(weight: str, bits: int) -> str:
    """Name the integers of a weight."""
    return f"{weight}_int{bits}"


def scaling_name(value: str) -> str:
    """Name the factors of a value's features."""
    return f"weights_{value}.factor"

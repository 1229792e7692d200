"""What int8 decided, as plain data: one record per value and one per layer; the tensors are named in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from typing_extensions import TypedDict  # pydantic reads plans, and takes no other before Python 3.12

from graphopt.pipeline.plan import Plan
from graphopt.targets.description import Scales

Form = Literal["quantize", "move", "constant", "hard_sigmoid"]


class ValueRecord(TypedDict):
    """How one value of the prepared graph is stored.

    `form`: "quantize" puts a quantize/dequantize pair behind it, "move" says that its producer runs on stored
    integers, "constant" that it is stored as integers in the program, "hard_sigmoid" that it is computed by reading its
    operand's integers with another zero point (`given_scales`). `readers`: calls that read it quantized, null for all.
    `source`: the value whose scale it has (itself unless scales are shared).
    """

    value: str
    form: Form
    source: str
    readers: list[str] | None
    scale: float
    zero_point: int
    low: int
    high: int
    observer: str


class LayerRecord(TypedDict):
    """What becomes of one layer's weight and bias.

    `scales`: whether the scale of its input is one of the plan's, or chosen by the kernel from each batch.
    `weight` and `bias` are names of new tensors; the plan holds `NAME` as well as `NAME_scale` for integers. `axis`:
    of the stored weight, null for one scale. `transposed`: stored the other way round, for a product `x @ w`; what is
    stored for an embedding table that the layer shares is turned when it is read.
    """

    site: str
    kernel: str
    scales: Scales
    weight: str
    axis: int | None
    transposed: bool
    bias: str | None
    bias_dtype: Literal["float", "int32"]


class TableRecord(TypedDict):
    """A read of an embedding table: the plan holds integers under `weight`, scales of rows under `WEIGHT_scale`."""

    site: str
    weight: str


class RecurrentRecord(TypedDict):
    """A layer of an LSTM: the plan holds its tensors as those of the node `stored`."""

    site: str
    stored: str


@dataclass(frozen=True, kw_only=True)
class Int8Plan(Plan):
    """Placement, scales and weights.

    Attributes:
        widths: group of channels to how many it has then, before anything else.
        respelled: node name to how it is spelled anew before anything is placed.
        values: every value that is stored as integers, in graph order.
        layers: every layer whose weight is, in graph order.
        dropped: activations left out because the integer range clamps the same.
        tables: every read of an embedding table that is stored as integers, in graph order.
        recurrent: every layer of an LSTM whose weights are, in graph order.
        weight_range: the smallest and the largest integer of the weights of layers.
    """

    widths: Mapping[str, int] = field(default_factory=dict)
    respelled: Mapping[str, str] = field(default_factory=dict)
    values: tuple[ValueRecord, ...] = ()
    layers: tuple[LayerRecord, ...] = ()
    dropped: tuple[str, ...] = ()
    tables: tuple[TableRecord, ...] = ()
    recurrent: tuple[RecurrentRecord, ...] = ()
    weight_range: tuple[int, int] = (-127, 127)


def table_name(weight: str) -> str:
    """Name the integers of an embedding table."""
    return f"{weight}_rows"


def stored_name(node: str, what: str) -> str:
    """Name a tensor that is stored for a node: `int8_conv2d.scale`.

    Not `int8.conv2d.scale`: a node may be called `float` or `to`, and a submodule may not.
    """
    return f"int8_{node}.{what}"

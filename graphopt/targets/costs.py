"""Costs: how long a runtime's kernels take on a class of processors, measured once and shipped as plain data.

    seconds of a call  =  fixed + samples * (operations * operation + elements * element)

A table says it for each kernel in each form: as floats, as integers with static scales or dynamic ones, and for what
turns values from one into the other. It is for choosing between forms of a layer without a clock, not for promising a
latency.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pydantic

from graphopt.errors import LoweringError, first_problem

Form = Literal["float", "static", "dynamic"]
_Seconds = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
_STRICT = pydantic.ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, slots=True)
class Work:
    """What one call of a kernel has to do.

    Attributes:
        operations: as `graphopt.measure.cost` counts them: two for a multiply-add, none for what multiplies nothing.
        elements: of all operands, weights and the result, whatever they are stored as.
    """

    operations: float
    elements: float


@dataclass(frozen=True, slots=True)
class KernelCost:
    """What one kernel takes in one form.

    Attributes:
        kernel: as rules of targets call operators, or more special: "conv2d_depthwise", see `graphopt.measure.work`.
            "quantize" and "dequantize" turn values into integers and back.
        form: how it computes.
        samples: how many a call has: what of one fits into caches does not of many.
        fixed: seconds of a call that has nothing to do.
        operation: seconds more for each operation.
        element: seconds more for each element.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = _STRICT

    kernel: str
    form: Form
    samples: Annotated[int, pydantic.Field(ge=1)]
    fixed: _Seconds
    operation: _Seconds
    element: _Seconds

    def seconds(self, work: Work) -> float:
        """Return how long a call takes, of which each sample has this work."""
        return self.fixed + self.samples * (self.operation * work.operations + self.element * work.elements)


@dataclass(frozen=True, slots=True)
class CostTable:
    """What kernels take on one class of processors, with one thread.

    Attributes:
        target: whose kernels.
        processor: on what they were timed, and of what kind that is.
        runtime: with which version.
        costs: of each kernel in each form.
        like: kernels that were not timed, and whose costs stand for theirs.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = _STRICT

    target: str
    processor: str
    runtime: str
    costs: tuple[KernelCost, ...]
    like: Mapping[str, str] = field(default_factory=dict)

    @property
    def batches(self) -> tuple[int, ...]:
        """The numbers of samples that calls were timed with."""
        return tuple(sorted({cost.samples for cost in self.costs}))

    def seconds(self, kernel: str, form: Form, work: Work, samples: int = 1) -> float | None:
        """Return how long a call takes, None for a kernel that was not measured so.

        Args:
            kernel: which one.
            form: how it computes.
            work: of one sample.
            samples: of a call, one of `batches`.
        """
        found = {cost.kernel: cost for cost in self.costs if (cost.form, cost.samples) == (form, samples)}
        cost = found.get(kernel) or found.get(self.like.get(kernel, ""))
        return None if cost is None else cost.seconds(work)

    def to_json(self) -> str:
        """Return it as text that `read_costs` reads."""
        text: str = pydantic.TypeAdapter(CostTable).dump_json(self, indent=1).decode()
        return f"{text}\n"


def read_costs(path: Path) -> CostTable:
    """Read a table.

    Raises:
        LoweringError: it is missing or holds something else.
    """
    try:
        table: CostTable = pydantic.TypeAdapter(CostTable).validate_json(path.read_bytes())
    except OSError as err:
        raise LoweringError(
            f"The costs of kernels in {path.name} cannot be read: {err}. Install graphopt anew."
        ) from err
    except pydantic.ValidationError as err:
        raise LoweringError(f"{path.name} is no table of costs: {first_problem(err)}. Measure it anew.") from err
    return table

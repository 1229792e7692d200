"""Plan: what a pass decided, as plain data, before anything is rewritten.

JSON decisions plus the tensors that cannot be recomputed exactly. `apply` is a function of program and plan
alone, so a stored plan replays byte for byte on any machine.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import typing
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import pydantic
import torch

from graphopt.errors import PassError, first_problem
from graphopt.ir.contents import resolved
from graphopt.ir.ownership import storage_key
from graphopt.ir.plain_data import Json


@dataclass(frozen=True, slots=True)
class Refusal:
    """A site that a pass matched and left alone, and why."""

    site: str  # node, weight or group
    reason: str  # full sentence fragment: "weight is shared with `lm_head`"
    kind: str = ""  # the reason without the particulars, for counting: "weight is shared"; "" = names left out

    @property
    def counted_as(self) -> str:
        """The text that refusals are counted by."""
        return self.kind or re.sub(r"`[^`]*`", "…", self.reason.partition(";")[0])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one pass decided on one program. Subclasses add fields of plain JSON data.

    Attributes:
        pass_name: the pass that made it.
        options: its options, as plain data.
        sites: names of the places that `apply` rewrites, in graph order. Empty: the plan changes nothing.
        refusals: places that were matched and left alone.
        tensors: payload by name: factors, scales, trained weights. Stored as safetensors.
        measured: times or scores that steered a decision. Recorded, not reproducible.
        notes: what a user should know, for the report.
        seconds: that parts of the decision took, by what they are called. For reports: they are not stored.
        unmet: what was asked for and is not reached by the best that was found: the run fails as at a gate.
    """

    # how `from_json` reads: what is not declared is refused
    __pydantic_config__: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(
        extra="forbid", arbitrary_types_allowed=True
    )

    pass_name: str
    options: Mapping[str, Json] = field(default_factory=dict)
    sites: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    measured: Mapping[str, Json] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict, repr=False)
    unmet: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a field that manifests use themselves."""
        super().__init_subclass__(**kwargs)
        if "target" in inspect.get_annotations(cls):
            raise TypeError(f"{cls.__name__} has a field `target`, which manifests keep beside a plan. Rename it.")

    def summary(self) -> str:
        """Return "matched 12, rewrote 9, left 3 (2 x shared weight, 1 x too small)"."""
        counts = Counter(refusal.counted_as for refusal in self.refusals)
        reasons = ", ".join(f"{count} x {kind}" for kind, count in counts.most_common())
        matched = len(self.sites) + len(self.refusals)
        left = f", left {len(self.refusals)} ({reasons})" if counts else ""
        return f"matched {matched}, rewrote {len(self.sites)}{left}"

    def on(self, device: torch.device) -> Self:
        """Return the plan with its tensors on a device, as they are stored: in the order of indices, each its own."""
        moved: dict[str, torch.Tensor] = {}
        taken: set[Hashable] = set()
        for name, tensor in self.tensors.items():
            there = resolved(tensor.detach().to(device)).contiguous()
            moved[name] = there.clone() if storage_key(there) in taken else there
            taken.add(storage_key(there))
        return dataclasses.replace(self, tensors=moved)

    def to_json(self) -> dict[str, Json]:
        """Return everything but tensors and seconds as JSON data; what is not finite is null."""
        names = [item.name for item in dataclasses.fields(self) if item.name not in ("tensors", "seconds")]
        data = {name: getattr(self, name) for name in names}
        return typing.cast("dict[str, Json]", _plain(data))

    @classmethod
    def from_json(cls, data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        """Rebuild a plan of this type from `to_json` and its tensors.

        Raises:
            PassError: the data lack a field, have one this version does not know, or one of another type.
        """
        try:
            plan: Self = pydantic.TypeAdapter(cls).validate_json(json.dumps(data), strict=True)
        except pydantic.ValidationError as err:
            raise PassError(
                f"The stored plan of `{data.get('pass_name')}` does not fit this version of the pass: "
                f"{first_problem(err)}. Make the plan again."
            ) from err
        return dataclasses.replace(plan, tensors=dict(tensors))


def _plain(value: Any) -> Json:
    if value is None or isinstance(value, bool | int | str):  # most are indices
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None  # JSON has no other number
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    raise PassError(f"A plan holds {type(value).__name__}, which is not JSON data. This is a bug in the pass.")

"""What `codebook` decided, as plain data; the tensors are named in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from typing_extensions import TypedDict  # pydantic reads plans, and takes no other before Python 3.12

from graphopt.pipeline.plan import Plan


class CodesRecord(TypedDict):
    """How one weight is stored.

    The plan holds `NAME.table` of entries, `NAME.codes2` or the like of each part (see `codes_name`), `NAME.scale`
    where rows share a table, and `NAME.tables`, the first entry of that of each group, or row, where there are several.

    `name`: what its tensors are stored under. `sites`: nodes that read it. `codes`: how entries were chosen. `entries`:
    of a table. `parts`: bases in which codes are packed. `packed_rows`: rows that are packed each on its own, 1 where
    all follow each other. `rows`, `columns`: of the weight, see `MatrixSite.rows`. `vector`: columns of an entry.
    `group`: rows that share a table. `weighted`: whether inputs were looked at. `sqnr`: of the weight in dB. `bytes`:
    before and after.
    """

    name: str
    sites: list[str]
    codes: str
    entries: int
    parts: list[int]
    packed_rows: int
    rows: int
    columns: int
    vector: int
    group: int
    weighted: bool
    sqnr: float | None
    bytes: list[int]


@dataclass(frozen=True, kw_only=True)
class CodebookPlan(Plan):
    """Weights as codes.

    Attributes:
        weights: by the name of the weight.
    """

    weights: Mapping[str, CodesRecord] = field(default_factory=dict)


def codes_name(base: int) -> str:
    """Name the part of the codes with digits to a base."""
    return f"codes{base}"

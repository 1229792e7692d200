"""Which sizes a dynamic axis may have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from graphopt.errors import cut

MOST_AT_LEAST = 1 << 20  # that the smallest size of an axis may be in a file: inputs are made up of it
_MOST = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class SizeRange:
    """Which sizes a dynamic axis may have, both ends included; no `most`: as large as memory is."""

    least: int = 0
    most: int | None = None

    @classmethod
    def stored(cls, ends: object) -> Self:
        """Read what a file holds of one: its ends, the second of them None where there is none.

        Raises:
            ValueError: they are none, or begin beyond what inputs are made up of.
        """
        if isinstance(ends, list) and len(ends) == 2:
            least, most = ends
            begins_well = type(least) is int and 0 <= least <= MOST_AT_LEAST
            if begins_well and (most is None or (type(most) is int and max(1, least) <= most <= _MOST)):
                return cls(least, most)
        raise ValueError(f"{cut(repr(ends), 80)} is no range of sizes")

    def __contains__(self, size: int) -> bool:
        """Whether it is one of them."""
        return self.least <= size and (self.most is None or size <= self.most)

    def __and__(self, other: SizeRange) -> SizeRange:
        """Return those of both."""
        ends = [end for end in (self.most, other.most) if end is not None]
        return SizeRange(max(self.least, other.least), min(ends, default=None))

    def __str__(self) -> str:
        """Say it: "4 to 8", "4 or more", "at most 8", "any"."""
        if self.most is None:
            return f"{self.least} or more" if self.least else "any"
        if not self.least:
            return f"at most {self.most}"
        return f"{self.least} to {self.most}" if self.least < self.most else f"{self.least}"

    def nearest(self, size: int) -> int:
        """Return the size in range that is nearest to `size`."""
        return max(self.least, size if self.most is None else min(size, self.most))


ANY = SizeRange()

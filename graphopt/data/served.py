"""Inputs as they are served: how bytes, say, become what a model takes.

    taken = (channels_first(served) * scale - mean) / std

A user writes `x:uint8:nhwc:scale=1/255:mean=0.485,0.456,0.406:std=0.229,0.224,0.225`; whatever is not said changes
nothing, and the type is uint8.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphopt.errors import UsageError, printable

_FORM = "x:uint8:nhwc:scale=1/255:mean=0.485,0.456,0.406:std=0.229,0.224,0.225"
_TYPES = {name: getattr(torch, name) for name in ["uint8", "int8", "int16", "int32", "float16", "float32", "float64"]}
_LAYOUTS = {"nwc": 3, "nhwc": 4, "ndhwc": 5}  # channels last, by rank
_NUMBERS = ("scale", "mean", "std")


@dataclass(frozen=True, slots=True)
class ServedInput:
    """How one input of a model is served.

    Attributes:
        name: the input.
        dtype: element type of what is served.
        layout: nwc, nhwc or ndhwc where channels are served last and the model takes them first, "" for as it takes.
        scale: what is served is multiplied with it first.
        mean: then this is subtracted: one number, or one for each channel.
        std: then it is divided by this, likewise.
    """

    name: str
    dtype: torch.dtype = torch.uint8
    layout: str = ""
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        """Refuse what no input can be served as."""
        if self.dtype not in _TYPES.values():
            raise UsageError(f"Input `{self.name}` cannot be served as {self.dtype}. Known: {', '.join(_TYPES)}.")
        if self.layout not in ("", *_LAYOUTS):
            raise UsageError(f"Input `{self.name}`: no layout is called {self.layout!r}. Known: {', '.join(_LAYOUTS)}.")
        if not (self.mean and self.std):
            raise UsageError(f"Input `{self.name}`: mean and std are at least one number.")
        if not all(map(math.isfinite, (self.scale, *self.mean, *self.std))):
            raise UsageError(f"Input `{self.name}`: scale, mean and std must be finite.")
        if self.scale == 0 or 0 in self.std:
            raise UsageError(f"Input `{self.name}`: a scale or std of 0 leaves nothing of what is served.")

    @classmethod
    def parse(cls, text: str) -> ServedInput:
        """Parse what a user writes.

        >>> ServedInput.parse("x:nhwc:scale=1/255:mean=0.5")
        ServedInput(name='x', dtype=torch.uint8, layout='nhwc', scale=0.00392156862745098, mean=(0.5,), std=(1.0,))

        Raises:
            UsageError: it has another form.
        """
        name, *parts = (part.strip() for part in text.split(":"))
        if not name.isidentifier():
            raise UsageError(f"--served {printable(text)!r} does not name the input. Write it as `{_FORM}`.")
        words = [part for part in parts if "=" not in part]
        dtypes, layouts = ([word for word in words if word in known] for known in (_TYPES, _LAYOUTS))
        options = dict(part.split("=", 1) for part in parts if "=" in part)
        wrong = [word for word in words if word not in _TYPES and word not in _LAYOUTS]
        wrong += [key for key in options if key not in _NUMBERS]
        if wrong or len(dtypes) > 1 or len(layouts) > 1 or len(options) + len(words) < len(parts):
            said = printable(wrong[0]) if wrong else "something said twice"
            near = difflib.get_close_matches(said, [*_TYPES, *_LAYOUTS, *_NUMBERS], 1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise UsageError(f"--served {printable(text)!r} has {said}.{hint} Write it as `{_FORM}`.")
        numbers = {key: _numbers(value, text) for key, value in options.items()}
        if len(numbers.get("scale", (1.0,))) > 1:
            raise UsageError(f"--served {printable(text)!r}: the scale is one number; `std` may differ by channel.")
        return cls(
            name,
            _TYPES[dtypes[0]] if dtypes else torch.uint8,
            layouts[0] if layouts else "",
            numbers.get("scale", (1.0,))[0],
            numbers.get("mean", (0.0,)),
            numbers.get("std", (1.0,)),
        )

    def __str__(self) -> str:
        """Return what `parse` reads."""
        lists = {key: ",".join(map(repr, getattr(self, key))) for key in ("mean", "std")}
        said = [str(self.dtype).removeprefix("torch."), self.layout, f"scale={self.scale!r}"]
        return ":".join([self.name, *filter(None, said), *(f"{key}={text}" for key, text in lists.items())])

    def order(self, rank: int) -> list[int]:
        """Return the axes of what is served in the order in which the model takes them.

        Raises:
            UsageError: the layout is of another rank.
        """
        if self.layout and _LAYOUTS[self.layout] != rank:
            right = next((f"Use {layout}" for layout, of in _LAYOUTS.items() if of == rank), "Leave the layout out")
            raise UsageError(
                f"Input `{self.name}` has {rank} axes, {self.layout} has {_LAYOUTS[self.layout]}. {right}."
            )
        return [0, rank - 1, *range(1, rank - 1)] if self.layout else list(range(rank))

    def taken(self, served: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return what the model takes of what is served.

        Raises:
            UsageError: it has another rank or number of channels.
        """
        first = served.permute(self.order(served.dim()))
        shift, factor = self.affine(first.shape)
        return ((first.double() - shift) * factor).to(dtype)

    def served(self, taken: torch.Tensor) -> torch.Tensor:
        """Return what is served so that the model takes this, as near as the type holds."""
        shift, factor = self.affine(taken.shape)
        values = taken.double().cpu() / factor + shift
        if not self.dtype.is_floating_point:
            bounds = torch.iinfo(self.dtype)
            values = values.round().clamp(bounds.min, bounds.max)
        back = sorted(range(taken.dim()), key=self.order(taken.dim()).__getitem__)
        return values.permute(back).to(taken.device, self.dtype).contiguous()

    def affine(self, taken: Sequence[int | str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `shift` and `factor` in float64, of shapes that broadcast: taken = (served - shift) * factor.

        Args:
            taken: sizes of what the model takes.

        Raises:
            UsageError: no axis has as many channels as there are numbers.
        """
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (self.mean, self.std))
        counts = {len(values) for values in (self.mean, self.std)} - {1}
        shape: list[int] = []
        if counts:
            axes = [axis for axis in (1, len(taken) - 1) if 0 < axis < len(taken) and {taken[axis]} == counts]
            if not axes:
                sizes = "x".join(["N", *map(str, taken[1:])])
                raise UsageError(
                    f"Input `{self.name}` takes {sizes}, which has no {' or '.join(map(str, sorted(counts)))} channels "
                    "along its second or last axis. Give one mean and std, or one for each channel."
                )
            shape = [-1, *[1] * (len(taken) - axes[0] - 1)]
        shift, factor = mean / self.scale, self.scale / std
        return _spread(shift, shape), _spread(factor, shape)


def _spread(values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return values along an axis, or one number where they are equal."""
    return values[0] if bool((values == values[0]).all()) else values.reshape(shape)


Served = str | ServedInput | Sequence[str | ServedInput]  # what users say


def advice(name: str, dtype: torch.dtype, layout: str = "") -> str:
    """Say how integers are let be made floats in the program, and their channels first, which a layout has last."""
    kind = ":".join(filter(None, [str(dtype).removeprefix("torch."), layout]))
    said = f"let the program make them so: `--served {name}:{kind}:scale=1/255:mean=0.5:std=0.5` (`served=...`)"
    return said if layout else f"{said}, with `:nhwc` where channels come last"


def served_inputs(given: Served) -> tuple[ServedInput, ...]:
    """Return what users say of inputs: text, descriptions, or several of them.

    Raises:
        UsageError: a text has another form, or an input is named twice.
    """
    several = [given] if isinstance(given, str | ServedInput) else given
    found = tuple(ServedInput.parse(one) if isinstance(one, str) else one for one in several)
    names = [one.name for one in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"It is said twice how input `{twice[0]}` is served.")
    return found


def _numbers(value: str, text: str) -> tuple[float, ...]:
    try:
        pairs = [number.partition("/") for number in value.split(",")]
        return tuple(float(above) / float(below) if slash else float(above) for above, slash, below in pairs)
    except (ValueError, ZeroDivisionError) as err:
        raise UsageError(
            f"--served {printable(text)!r}: {printable(value)!r} is no list of numbers such as 0.5 or 1/255."
        ) from err

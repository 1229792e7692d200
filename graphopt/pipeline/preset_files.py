"""Presets: passes, and what a distillation before them teaches, in files that are read and copied.

about = "..."
passes = "int8"

[plan]                 # of `graphopt distill`: what --plan takes
temperature = 4.0
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pydantic

from graphopt.errors import UsageError, cut, first_line, first_problem, printable
from graphopt.files import read_file

_FOLDER = Path(__file__).with_name("presets")
_LARGEST_FILE = 1 << 20  # bytes
_EXAMPLE = "`graphopt presets show distill-int8` prints one."


class RunPreset(pydantic.BaseModel):
    """What a preset says.

    Attributes:
        about: what it is for, in a sentence.
        passes: the pipeline.
        plan: fields of a `DistillPlan`; none: it is of `graphopt optimize`.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)

    about: str
    passes: str = ""
    plan: dict[str, Any] = {}

    @property
    def command(self) -> str:
        """The command that it is for."""
        return "distill" if self.plan else "optimize"


def preset_names() -> list[str]:
    """List the presets that come with graphopt."""
    return sorted(file.stem for file in _FOLDER.glob("*.toml"))


def preset_file(name: str) -> Path:
    """Return the file of a preset: one that comes with graphopt, or one of the user's own by its path.

    Raises:
        UsageError: there is none.
    """
    own = Path(name)
    if own.suffix == ".toml":
        return own
    if name not in preset_names():
        raise UsageError(f"There is no preset `{cut(printable(name), 80)}`. There are {', '.join(preset_names())}.")
    return _FOLDER / f"{name}.toml"


def preset_called(name: str) -> RunPreset:
    """Read a preset.

    Raises:
        UsageError: there is none of that name, or its file says something else.
    """
    path = preset_file(name)
    try:
        return RunPreset.model_validate(tomllib.loads(read_file(path, most=_LARGEST_FILE).decode()))
    except pydantic.ValidationError as err:
        raise UsageError(
            f"{path} is no preset: {first_problem(err)}. `graphopt presets show distill-int8` is one."
        ) from err
    except (OSError, ValueError, RecursionError) as err:
        said = getattr(err, "strerror", None) or printable(first_line(err))
        raise UsageError(f"{path} is no preset: {said}. `graphopt presets show distill-int8` is one.") from err

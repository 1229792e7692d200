"""Pipeline: which passes run, in which order, with which options. Text and TOML forms round-trip.

    prune:ratio=0.5:criterion=l2,svd:energy=0.95,int8

Order constraints are checked before anything expensive runs; nothing is reordered silently. A pass that needs
a property nobody produced gets its producer inserted right before it, marked so in the printed pipeline.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from graphopt.errors import UsageError, cut, first_line, printable
from graphopt.files import read_file
from graphopt.ir.plain_data import Json
from graphopt.pipeline.contract import called
from graphopt.pipeline.options import build, changed
from graphopt.pipeline.order import AnyPass, Step, check_order, complete
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.registry import PassRegistry
from graphopt.targets.description import TargetDescription

_LARGEST_FILE = 1 << 20  # bytes
_FORM = "Expected one [[pass]] table per pass, with `name` and its options."


@dataclass(frozen=True)
class Pipeline:
    """An ordered, checked sequence of passes."""

    steps: tuple[Step, ...] = ()

    @classmethod
    def parse(
        cls, passes: str | Sequence[AnyPass | type[AnyPass] | str] | Pipeline, registry: PassRegistry | None = None
    ) -> Pipeline:
        """Read pipeline text, or a sequence of pass instances, classes and texts.

        Raises:
            UsageError: an unknown pass or option (the nearest name is suggested), a bad value, or a broken order.
        """
        if isinstance(passes, Pipeline):
            return passes
        registry = registry or PassRegistry()
        written = _split(passes) if isinstance(passes, str) else list(passes)
        return cls._checked([_instance(item, registry) for item in written], registry)

    @classmethod
    def from_toml(cls, path: Path, registry: PassRegistry | None = None) -> Self:
        """Read the TOML form: one `[[pass]]` table each, `name` and options as keys."""
        registry = registry or PassRegistry()
        instances = []
        for table in _tables(path):
            options = {key: tuple(v) if isinstance(v, list) else v for key, v in table.items() if key != "name"}
            instances.append(_build(table["name"], options, registry))
        return cls._checked(instances, registry)

    @classmethod
    def _checked(cls, instances: Sequence[AnyPass], registry: PassRegistry) -> Self:
        steps = complete(instances, registry)
        check_order(steps, registry)
        return cls(tuple(steps))

    @property
    def text(self) -> str:
        """The pipeline as the user would write it; `parse` reads it back."""
        return ",".join(step.text for step in self.steps if not step.inserted_for)

    def __str__(self) -> str:
        """Show every step, inserted ones with the reason."""
        shown = [f"{s.text} (needed by {s.inserted_for})" if s.inserted_for else s.text for s in self.steps]
        return " -> ".join(shown) or "no passes"

    def to_toml(self) -> str:
        """Return the TOML form; `from_toml` reads it back."""
        tables = []
        for step in self.steps:
            if not step.inserted_for:
                options = "".join(f"{key} = {_toml(value)}\n" for key, value in changed(step.instance.options).items())
                tables.append(f'[[pass]]\nname = "{step.name}"\n{options}')
        return "\n".join(tables)

    def check_targets(self, targets: Iterable[TargetDescription]) -> None:
        """Refuse passes that are not for one of the targets.

        Raises:
            LoweringError: a pass says why.
        """
        for target in targets:
            for step in self.steps:
                with called(step.instance, "look at its target"):
                    step.instance.accepts(target)

    def fork(self) -> int:
        """Return the index of the first step that reads a target description; their number if none does."""
        return next((i for i, step in enumerate(self.steps) if step.instance.reads_target), len(self.steps))


def _tables(path: Path) -> list[dict[str, Any]]:
    """Return the tables of a pipeline file, one a pass, each with a `name`."""
    try:
        content = tomllib.loads(read_file(path, most=_LARGEST_FILE).decode())
    except (OSError, ValueError, RecursionError) as err:  # what is not UTF-8, and integers too long to read, too
        said = getattr(err, "strerror", None) or printable(first_line(err))
        raise UsageError(f"{path} is not a pipeline: {said}. {_FORM}") from err
    tables = content.get("pass")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{path} is not a pipeline: `pass` is missing, or no list of tables. {_FORM}")
    others = sorted(content.keys() - {"pass"})
    if others:
        raise UsageError(f"{path} holds `{cut(printable(others[0]), 80)}` beside its passes. {_FORM}")
    nameless = [number for number, table in enumerate(tables, start=1) if not isinstance(table.get("name"), str)]
    if nameless:
        raise UsageError(f"Pass {nameless[0]} of {path} has no `name`. {_FORM}")
    return tables


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _instance(item: AnyPass | type[AnyPass] | str, registry: PassRegistry) -> AnyPass:
    if isinstance(item, Pass):
        return item
    if isinstance(item, type):
        return item()
    name, *settings = item.split(":")
    options: dict[str, Any] = {}
    latest = ""
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals and latest:  # a value may hold colons itself: taps=layer1.conv1:conv2d
            options[latest] += f":{setting}"
            continue
        if not equals or not key:
            raise UsageError(
                f"Cannot read `{setting}` in `{item}`. Write options as name:option=value:option=value, "
                "for example prune:ratio=0.5."
            )
        if key in options:
            raise UsageError(f"`{key}` is given twice in `{item}`. Keep one.")
        options[key] = value
        latest = key
    return _build(name, options, registry)


def _build(name: str, options: Mapping[str, Any], registry: PassRegistry) -> AnyPass:
    found = registry.pass_class(name)
    with called(found, "take its options"):
        return found(build(name, found.options_type, options))


def _toml(value: Json) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, Iterable):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if value is None:
        return '"none"'
    return str(value)

"""Finding passes and backends: built-in ones, installed plugins, files, classes handed to the API.

Built-in ones are found exactly as a stranger's are: by entry point. A broken plugin is one warning line and
breaks nothing; two plugins with one name are an error that names both distributions.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import UsageError, cut, foreign_code, printable

if TYPE_CHECKING:
    from graphopt.pipeline.pass_base import Pass
    from graphopt.targets.backend import Backend

logger = logging.getLogger(__name__)

PASSES = "graphopt.passes"
BACKENDS = "graphopt.backends"
# Of a job that is not told.
DEFAULT_PASSES = "prune,svd,int8"
DEFAULT_TARGET = "onnxruntime"
_PASS_NAME = r"[A-Za-z_][A-Za-z0-9_-]*"


@dataclass(frozen=True, slots=True)
class Entry:
    """A registered name, before anything of it is imported."""

    name: str
    source: str  # distribution, file or class that provides it
    loader: Any  # an EntryPoint or the class itself

    def load(self, base: type[Any]) -> type[Any]:
        """Import the class.

        Raises:
            UsageError: it cannot be imported or is not a subclass of `base`.
        """
        if isinstance(self.loader, EntryPoint):
            with foreign_code(
                lambda said, _: UsageError(
                    f"`{self.name}` from {self.source} cannot be imported: {said}. Repair or uninstall it."
                )
            ):
                loaded = self.loader.load()
        else:
            loaded = self.loader
        if not (inspect.isclass(loaded) and issubclass(loaded, base)):
            raise UsageError(f"`{self.name}` from {self.source} is {loaded!r}, not a subclass of {base.__name__}.")
        return loaded


_PLUGINS = " Those of a file are known where it is given: --plugin FILE, or plugins=[FILE]."


class Registry:
    """Names of one kind, resolved lazily: listing them imports nothing."""

    def __init__(self, group: str, extra: Iterable[Entry] = ()) -> None:
        self._entries: dict[str, Entry] = {}
        self._broken: set[str] = set()
        named = functools.cache(_named)  # which reads the whole description of a distribution
        for point in sorted(entry_points(group=group), key=lambda point: (point.name, point.value)):
            self._add(Entry(point.name, named(point.dist), point))
        for entry in extra:
            self._add(entry)

    def _add(self, entry: Entry) -> None:
        other = self._entries.get(entry.name)
        if other is not None and not _same(other, entry):
            raise UsageError(
                f"Two plugins are called `{entry.name}`: {other.source} and {entry.source}. "
                "Uninstall or rename one of them."
            )
        self._entries.setdefault(entry.name, entry)

    def names(self) -> list[str]:
        """List the registered names."""
        return sorted(self._entries)

    def get(self, name: str, base: type[Any], what: str) -> type[Any]:
        """Import the class registered as `name`.

        Raises:
            UsageError: there is none; the nearest name is suggested.
        """
        if name not in self._entries:
            from graphopt.pipeline.options import nearest

            known = ", ".join(self.names())
            raise UsageError(
                f"There is no {what} `{cut(printable(name), 80)}`{nearest(name, self.names())} Known: {known}."
                f"{_PLUGINS if what == 'pass' else ''}"
            )
        return self._entries[name].load(base)

    def source(self, name: str) -> str:
        """Return where `name` comes from."""
        return self._entries[name].source

    def working(self, base: type[Any]) -> dict[str, type[Any]]:
        """Import every class that can be; a broken one is tried once, and is one warning."""
        found = {}
        for name in self.names():
            if name in self._broken:
                continue
            try:
                found[name] = self._entries[name].load(base)
            except UsageError as err:
                self._broken.add(name)
                logger.warning("%s", err)
        return found


class PassRegistry(Registry):
    """The passes a pipeline may name."""

    def __init__(self, plugins: Iterable[Path | str | type[Pass[Any, Any]]] = ()) -> None:
        super().__init__(PASSES, _plugin_passes(plugins))

    def pass_class(self, name: str) -> type[Pass[Any, Any]]:
        """Return the pass called `name`."""
        from graphopt.pipeline.pass_base import Pass

        return self.get(name, Pass, "pass")

    def producer_of(self, needed: str) -> str | None:
        """Return the name of a pass that produces the property `needed`: one of the default passes, else the first."""
        from graphopt.pipeline.pass_base import Pass

        names = [name for name, found in self.working(Pass).items() if needed in found.produces]
        return min(names, key=lambda name: (name not in DEFAULT_PASSES.split(","), name), default=None)


def backend(name: str) -> Backend:
    """Return the backend called `name`; "onnxruntime:x86-avx2" is "onnxruntime-x86-avx2".

    Raises:
        UsageError: there is none.
    """
    from graphopt.targets.backend import Backend

    registry = Registry(BACKENDS)
    joined = name.replace(":", "-", 1)
    found: Backend = registry.get(joined if joined in registry.names() else name, Backend, "target")()
    return found


def backend_of(file: Path, *, preferred: str) -> Backend | None:
    """Return a backend whose artifacts end as `file` does: `preferred` or the first by name; None if there is none."""
    from graphopt.targets.backend import Backend

    found = {name: kind for name, kind in Registry(BACKENDS).working(Backend).items() if kind.suffix == file.suffix}
    kind: type[Backend] | None = found.get(preferred, next(iter(found.values()), None))
    return None if kind is None else kind()


def backends_named(target: str | Backend | Sequence[str | Backend] | None) -> tuple[Backend, ...]:
    """Return the backends that a target argument names: text with commas, backends, or a sequence of both.

    A runtime on certain processors may be a target of its own.

    Raises:
        UsageError: there is no such backend, two have one name, or one a name that files cannot bear
            or that is not its description's.
    """
    from graphopt.targets.backend import TARGET_NAME

    if target is None:
        return ()
    listed = [target] if not isinstance(target, Sequence) or isinstance(target, str) else list(target)
    found: list[Backend] = []
    for item in listed:
        if isinstance(item, str):
            found += [backend(name.strip()) for name in item.split(",") if name.strip()]
        else:
            found.append(item)
    names = [item.name for item in found]
    odd = [name for name in names if not re.fullmatch(TARGET_NAME, name)]
    if odd:
        raise UsageError(f"A backend is called {odd[0]!r}. Files bear its name: use letters, digits, `_` and `-` only.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"Target `{twice[0]}` is given twice. Give each target once.")
    for item in found:
        if item.description.name != item.name:
            raise UsageError(
                f"The backend `{item.name}` describes a target called `{item.description.name}`. Programs are made for "
                "a target by its name: let both be one."
            )
    return tuple(found)


def _named(distribution: Distribution | None) -> str:
    return f"distribution `{distribution.name}`" if distribution else "an unknown distribution"


def _same(one: Entry, other: Entry) -> bool:
    if isinstance(one.loader, EntryPoint) and isinstance(other.loader, EntryPoint):
        return one.loader.value == other.loader.value and one.source == other.source
    return one.loader is other.loader


def _plugin_passes(plugins: Iterable[Path | str | type[Pass[Any, Any]]]) -> list[Entry]:
    entries = []
    for plugin in plugins:
        if inspect.isclass(plugin):
            entries.append(Entry(plugin.name, f"class `{plugin.__qualname__}`", plugin))
        else:
            entries.extend(_passes_of_file(Path(plugin)))
    return entries


def _passes_of_file(path: Path) -> list[Entry]:
    """Return the passes that a file defines; one that defines none has rules for operators."""
    from graphopt.axes.registry import built_in_rules
    from graphopt.loading.python_files import import_file
    from graphopt.pipeline.pass_base import Pass

    module = import_file(path)
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Pass)
        and value.__module__ == module.__name__
        and not inspect.isabstract(value)
    ]
    if not found and not any(rule.infer.__module__ == module.__name__ for rule in built_in_rules().values()):
        raise UsageError(f"The plugin {path} defines no pass. Define a subclass of graphopt.Pass in it.")
    for value in found:
        name = getattr(value, "name", None)
        if not isinstance(name, str) or not re.fullmatch(_PASS_NAME, name):
            raise UsageError(
                f"The pass `{value.__name__}` of the plugin {path} is called {name!r}. Give the class a `name` of "
                "letters, digits, `_` and `-`, by which pipelines name it."
            )
    return [Entry(value.name, f"file {path}", value) for value in found]

"""The source that code is made of: files of the user's and what they import, versions of what is installed.

Imports are followed through the text of files, nothing is run: what is imported within functions counts, and what lies
beside a plugin or in the current directory. What cannot be followed so has no digest:

    importlib.import_module(name), exec(text), sys.path.append(..)      which files that means is known when it runs
    a compiled module of the user's, a module without a file
    a file that was written since it may have been imported             what runs is not what can be read
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import graphopt
from graphopt.loading.functions import importable, imports
from graphopt.loading.python_files import module_name

_STDLIB = Path(os.__file__).resolve().parent
_DYNAMIC = frozenset(
    {
        *("exec", "eval", "import_module", "__import__", "exec_module", "load_module", "spec_from_file_location"),
        *("resolve_name", "pydoc", "ImportString", "entry_points", "EntryPoint", "get_loader", "find_loader"),
        *("runpy", "__path__", "extend_path", "addsitedir", "sys.path", "sys.modules", "sys.meta_path"),
        *("load_library", "CDLL", "LoadLibrary", "cpp_extension"),
    }
)


class _UnfollowedError(Exception):
    """It is not known which source a module is made of."""


def sources_of(modules: Iterable[str]) -> dict[str, str] | None:
    """Return what modules and those that they import are made of; not of our own, see `digests.of_libraries`.

    Returns:
        By file its digest, by distribution its version, and "" for what is not there; None where it cannot be followed.
    """
    names = [name for name in modules if not is_ours(name)]
    places = sorted({Path.cwd(), *(file.parent for name in names if (file := _loaded_from(name)) is not None)})
    walk = _Walk()
    try:
        for place in (None, *places):  # where an import looks follows from when it runs
            with contextlib.nullcontext() if place is None else importable(place):
                walk.follow(names)
    except (_UnfollowedError, OSError, ImportError, SyntaxError, ValueError):
        return None
    return walk.found | dict.fromkeys(walk.missing - walk.there, "")


def files_of(modules: Iterable[str], known: Container[str]) -> list[Path]:
    """List the user's files that modules are made of, as far as they can be followed, and that were imported meanwhile.

    Args:
        modules: their names.
        known: names of the modules that had been imported before.
    """
    sources = {name for module in modules for name in sources_of([module]) or ()}
    files = {Path(name) for name in sources if os.path.isabs(name)}
    imported = {name: file for name in list(sys.modules) if name not in known and (file := _loaded_from(name))}
    places = {top: _places(_spec(top)) for top in {name.partition(".")[0] for name in imported if not is_ours(name)}}
    users = {top for top, of in places.items() if not _versions(top, of) and not _is_of_python(top, of)}
    return sorted(files | {file for name, file in imported.items() if name.partition(".")[0] in users})


def is_ours(name: str) -> bool:
    """Whether a module is of graphopt, or of the interpreter itself."""
    return name.partition(".")[0] in ("graphopt", "builtins")


def _loaded_from(name: str) -> Path | None:
    file = getattr(sys.modules.get(name), "__file__", None)
    return None if file is None else Path(file).resolve()


@dataclass
class _Walk:
    """From module to module; what was found, and names that were and were not in some place."""

    found: dict[str, str] = field(default_factory=dict)
    there: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)

    def follow(self, names: Iterable[str]) -> None:
        """Go from modules to all that they import."""
        waiting, seen, read = list(names), set[str](), set[str]()
        while waiting:
            name = waiting.pop()
            top = name.partition(".")[0]
            if name in seen or is_ours(name):
                continue
            seen.add(name)
            places = _places(_spec(top))
            versions = _versions(top, places)
            self.found |= versions
            if versions or _is_of_python(top, places):
                continue
            for module in itertools.accumulate(name.split("."), "{}.{}".format):  # with those that it is in
                if module not in read:
                    read.add(module)
                    waiting += self._read(module)
            waiting += [other for other in sys.modules if other.startswith(f"{name}.")]  # they are its attributes

    def _read(self, name: str) -> Sequence[str]:
        """Note the source of a module, and return what it imports."""
        spec, whole = _spec(name), _spec(name.removesuffix(".*"))
        if name.endswith(".*") and whole is not None and whole.submodule_search_locations:
            raise _UnfollowedError  # modules that the package names in its `__all__` are imported too
        if spec is None and name not in sys.modules:
            self.missing.add(name)
            return ()
        self.there.add(name)
        file = _loaded_from(name)
        if file is None and spec is not None and spec.has_location:
            (file,) = _places(spec)
        if file is None:
            if spec is None or not spec.submodule_search_locations:
                raise _UnfollowedError
            return ()
        content = _content(file, name)
        self.found[str(file)] = hashlib.sha256(content).hexdigest()
        return _imports(content, spec.parent or "" if spec is not None else "")


def _spec(name: str) -> ModuleSpec | None:
    """Find what an import of a module finds, without importing those that it is in."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__spec__", None)
    parent = name.rpartition(".")[0]
    if not parent:
        return importlib.util.find_spec(name)
    above = _spec(parent)
    places = None if above is None else above.submodule_search_locations
    return None if places is None else PathFinder.find_spec(name, list(places))


def _places(spec: ModuleSpec | None) -> list[Path]:
    """Return where a module is: its file, or the folders of a package without one; nowhere for what is built in."""
    if spec is None:
        return []
    places = [spec.origin] if spec.has_location and spec.origin else spec.submodule_search_locations or []
    return [Path(place).resolve() for place in places]


def _is_of_python(top: str, places: Sequence[Path]) -> bool:
    return top in sys.stdlib_module_names and all(place.is_relative_to(_STDLIB) for place in places)


@functools.cache
def _distributions() -> Mapping[str, Sequence[str]]:
    return importlib.metadata.packages_distributions()


@functools.cache
def _homes(top: str) -> Mapping[Path, tuple[str, str]]:
    """Return where a module may be installed, and with which distribution of which version."""
    known = map(importlib.metadata.distribution, _distributions().get(top, ()))
    whole = (one for one in known if one.read_text("RECORD") is not None)  # no checkout, whose files change without one
    return {Path(str(one.locate_file(""))).resolve(): (one.metadata["Name"], one.version) for one in whole}


def _versions(top: str, places: Sequence[Path]) -> dict[str, str]:
    """Return the versions of what a module was installed with."""
    homes = _homes(top)
    found = [[known for home, known in homes.items() if place.is_relative_to(home)] for place in places]
    return dict(itertools.chain(*found)) if all(found) else {}


def _content(file: Path, name: str) -> bytes:
    """Read the source of a module, unless what is in memory may be of another."""
    content = file.read_bytes()
    changed = name in sys.modules and file.stat().st_ctime >= graphopt.IMPORTED
    if file.suffix != ".py" or (changed and name != module_name(file, content)):
        raise _UnfollowedError
    return content


@functools.lru_cache(maxsize=1024)
def _imports(source: bytes, package: str) -> tuple[str, ...]:
    tree = ast.parse(source)
    found = tuple(imports(tree, package))
    if not _DYNAMIC.isdisjoint((*_names(tree), *found, *itertools.chain(*(name.split(".") for name in found)))):
        raise _UnfollowedError
    return found


def _names(tree: ast.AST) -> Iterator[str]:
    """Yield what a file calls or reads by name; no method `eval`, which models have."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr if node.attr != "eval" else ""
            yield f"{node.value.id}.{node.attr}" if isinstance(node.value, ast.Name) else ""

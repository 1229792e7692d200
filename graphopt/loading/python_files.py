"""Importing a Python file that a user names by its path."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from graphopt.errors import UsageError
from graphopt.loading.functions import check_origin, importable


def import_file(path: Path) -> ModuleType:
    """Import a file under a name of its own, which stays in `sys.modules`; modules beside it can be imported by it.

    The name follows from path and contents. So files of one stem do not replace each other, a file given twice is one
    module, and one that was edited meanwhile is a new one beside the old, whose classes still pickle.

    Raises:
        UsageError: there is no such file, it raises, or a module beside it has the name of another one.
    """
    if not path.is_file():
        raise UsageError(f"The plugin file {path} does not exist. Give --plugin the path of a Python file.")
    place, source = path.resolve(), path.read_bytes()
    digest = hashlib.sha256(os.fsencode(place) + b"\0" + source).hexdigest()
    stem = re.sub(r"\W", "_", path.stem)
    name = f"graphopt_plugin_{stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, place)
    if spec is None or not isinstance(spec.loader, SourceFileLoader):
        raise UsageError(f"The plugin {path} is not a Python file. Give a file that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        _execute(module, spec.loader, source, path)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _execute(module: ModuleType, loader: SourceFileLoader, source: bytes, path: Path) -> None:
    place = path.resolve()
    try:
        with importable(place.parent):
            # not `exec_module`: a compiled file tells an edit by its second and size alone
            exec(loader.source_to_code(source, place), module.__dict__)
    except Exception as err:  # the user's file may raise anything
        raise UsageError(f"The plugin {path} cannot be imported: {type(err).__name__}: {err}.") from err
    for imported in _imports(source):
        if imported.partition(".")[0] not in sys.stdlib_module_names:
            check_origin(imported, place.parent)


def _imports(source: bytes) -> Iterator[str]:
    """Yield what a file imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)

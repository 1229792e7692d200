"""Importing a Python file that a user names by its path."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from graphopt.errors import UsageError, foreign_code, line_of
from graphopt.loading.functions import check_origins, importable, imports_of


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
    name = module_name(place, source)
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


def module_name(place: Path, source: bytes) -> str:
    """Return what a file is called in `sys.modules`."""
    digest = hashlib.sha256(os.fsencode(place) + b"\0" + source).hexdigest()
    stem = re.sub(r"\W", "_", place.stem)
    return f"graphopt_plugin_{stem}_{digest}"


def _execute(module: ModuleType, loader: SourceFileLoader, source: bytes, path: Path) -> None:
    place = path.resolve()

    def failed(said: str, err: BaseException) -> UsageError:
        line = line_of(err, module.__name__)
        return UsageError(f"The plugin {path} cannot be imported: {said}{f' ({line})' if line else ''}.")

    with foreign_code(failed), importable(place.parent):
        # not `exec_module`: a compiled file tells an edit by its second and size alone
        exec(loader.source_to_code(source, place), module.__dict__)
    check_origins(imports_of(source), place.parent)

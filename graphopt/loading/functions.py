"""Finding the function that a user names as `package.module:function`."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from graphopt.errors import UsageError, foreign_code

_FORM = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_function_name(text: str) -> bool:
    """Tell whether `text` has the form `package.module:function`."""
    return _FORM.fullmatch(text) is not None


def resolve_function(text: str, option: str) -> Callable[..., Any]:
    """Import and return the function called `text`, looking in the current directory too.

    Args:
        text: `package.module:function`.
        option: What asked for it, such as `--factory`, for the messages.

    Raises:
        UsageError: `text` has another form, the module cannot be imported, or it has no such function.
    """
    if not is_function_name(text):
        hint = " A path is not a module name: drop `.py` and write dots for slashes." if "/" in text else ""
        raise UsageError(f"{option} {text!r} is not of the form `package.module:function`.{hint}")
    module_name, _, attribute = text.partition(":")
    directory = Path.cwd()
    failed = foreign_code(
        lambda said, _: UsageError(
            f"{option} {text!r}: importing `{module_name}` failed ({said}); the current directory, {directory}, and "
            "the installed packages were searched."
        )
    )
    with importable(directory), failed:
        found: Any = importlib.import_module(module_name)
    check_origins([module_name], directory)
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, [name for name in dir(found) if not name.startswith("_")], 1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise UsageError(f"{option} {text!r}: `{module_name}` has no `{attribute}`.{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"{option} {text!r} is a {type(found).__name__}, not a function.")
    return found  # type: ignore[no-any-return]


@contextlib.contextmanager
def importable(directory: Path) -> Iterator[None]:
    """Let imports look into a directory first, as those of a script look beside it, for as long as this is entered."""
    importlib.invalidate_caches()  # its files may be a moment old
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        # The user's code may have changed the list meanwhile.
        with contextlib.suppress(ValueError):
            sys.path.remove(str(directory))


def check_origins(names: Iterable[str], directory: Path) -> None:
    """Check modules and, of those that lie in a directory, what they import themselves; see `check_origin`."""
    waiting, seen = list(names), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        check_origin(name, directory)
        file = _file_in(directory, name)
        if file is not None and name in sys.modules:
            waiting += imports_of(file.read_bytes())


def imports_of(source: bytes) -> Iterator[str]:
    """Yield what a file imports by absolute names, inside functions too; nothing of the standard library."""
    found = imports(ast.parse(source), "")
    return (name for name in found if name.partition(".")[0] not in sys.stdlib_module_names)


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield what a module imports, inside functions too, and what may be an attribute of it.

    Args:
        tree: its source.
        package: which one it is in, that its relative names are of; "" for none, then they are left out.

    Raises:
        ImportError: a relative name leads out of the package.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (package or not node.level):
            name = importlib.util.resolve_name(f"{'.' * node.level}{node.module or ''}", package)
            yield from (name, *(f"{name}.{alias.name}" for alias in node.names))


def check_origin(name: str, directory: Path) -> None:
    """Refuse a module that was imported from elsewhere, where a directory has one of that name too.

    A process has one module of a name, whichever was imported first.

    Raises:
        UsageError: it is another file; both are named.
    """
    own = _file_in(directory, name)
    if own is None or name not in sys.modules:
        return
    found = getattr(sys.modules[name], "__file__", None)
    if found is None or not Path(found).exists() or not own.samefile(found):
        raise UsageError(
            f"`{name}` is {found or 'a part of Python'} in this process, and {own} would be it too: a name is imported "
            "once. Rename one of them."
        )


def _file_in(directory: Path, name: str) -> Path | None:
    """Return the file that a directory has for a module of this name."""
    stem = directory.joinpath(*name.split("."))
    return next((file for file in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")) if file.is_file()), None)

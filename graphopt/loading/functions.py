"""Finding the function that a user names as `package.module:function`."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from graphopt.errors import UsageError

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
    with current_directory_importable():
        try:
            found: Any = importlib.import_module(module_name)
        except Exception as err:  # importing runs the user's module, which may raise anything
            raise UsageError(
                f"{option} {text!r}: importing `{module_name}` failed ({type(err).__name__}: {err}); the current "
                f"directory, {os.getcwd()}, and the installed packages were searched."
            ) from err
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
def current_directory_importable() -> Iterator[None]:
    """Let imports see the current directory, as `python -m` does, for as long as this is entered."""
    directory = os.getcwd()
    if directory in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        # The user's code may have changed the list meanwhile.
        with contextlib.suppress(ValueError):
            sys.path.remove(directory)

"""Which versions of torch and of ONNX Runtime graphopt runs with; pyproject.toml asks pip for the same."""

from __future__ import annotations

import functools
import importlib.metadata
import re

from graphopt.errors import UsageError

RANGES = {"torch": ((2, 11), (2, 15)), "onnxruntime": ((1, 22), (1, 33))}  # from the first, to before the second


def check_version(library: str, installed: str | None) -> None:
    """Compare the version of a library, None where there is none, to the range.

    Raises:
        UsageError: it lies outside.
    """
    first, end = RANGES[library]
    found = re.match(r"(\d+)\.(\d+)", installed or "")
    if found is not None and first <= (int(found[1]), int(found[2])) < end:
        return
    least, below = (".".join(map(str, version)) for version in (first, end))
    raise UsageError(
        f"graphopt runs with {library} from {least} to before {below}, and "
        f"{f'{installed} is installed' if installed else 'none is installed'}: "
        f'run `pip install "{library}>={least},<{below}"` in an environment of its own.'
    )


def version_of(library: str) -> str | None:
    """Return the installed version of a library, whichever distribution brings it (onnxruntime-gpu); None for none."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        others = importlib.metadata.packages_distributions().get(library.replace("-", "_"), ())
        return ", ".join(f"{importlib.metadata.version(name)} ({name})" for name in sorted(set(others))) or None


@functools.cache
def check_torch() -> None:
    """Look which torch is installed, without importing it.

    Raises:
        UsageError: none, or one outside the range.
    """
    check_version("torch", version_of("torch"))

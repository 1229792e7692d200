"""The file that `--depfile` writes: what results were made from, in the words that Make and Ninja share."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from graphopt.errors import UsageError

# What GNU Make 4.3 and Ninja 1.11 read alike: everything else means something to one of them, however it is written.
_ESCAPED = str.maketrans({"$": "$$", "#": r"\#", " ": r"\ ", ":": r"\:"})
_UNSAYABLE = re.compile(r"""[\x00-\x1f\x7f\\"'`;|&<>^*?\[\]]|^~|[: ]$|\(.*\)$""")
_UNSAYABLE_BEFORE_THE_COLON = re.compile("[%=]")


def rules(artifacts: Sequence[Path], inputs: Sequence[Path | None]) -> bytes:
    """Return `artifacts: inputs`, with the files in inputs that are directories.

    Ninja takes no other output than a build statement declares, so the files beside the artifacts are not named. Each
    input has a rule without a recipe, so that one that is gone means building again and not that Make cannot; but for
    names such as `step=100.ckpt`, of which Make would take that for a variable.

    Raises:
        UsageError: a name cannot be written so that both understand it.
    """
    given = [item for item in inputs if item is not None]
    all_files = (file for item in given for file in (item, *(sorted(item.rglob("*")) if item.is_dir() else ())))
    files = list(dict.fromkeys(all_files))
    targets, sources = (" ".join(map(_written, paths)) for paths in (artifacts, files))
    if found := _UNSAYABLE_BEFORE_THE_COLON.search(targets):
        raise _unsayable(str(artifacts[0]), found)
    alone = [f"{_written(file)}:" for file in files if not _UNSAYABLE_BEFORE_THE_COLON.search(str(file))]
    return os.fsencode("\n".join([f"{targets}: {sources}", *alone, ""]))


def _written(path: Path) -> str:
    if found := _UNSAYABLE.search(str(path)):
        raise _unsayable(str(path), found)
    return str(path).translate(_ESCAPED)


def _unsayable(name: str, found: re.Match[str]) -> UsageError:
    return UsageError(
        f"--depfile cannot name {name!r}: no way of writing {found[0]!r} there is read alike by Make and Ninja. Rename "
        "it, or leave out --depfile."
    )

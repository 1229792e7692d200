"""Zip archives as torch writes them, read with bounds that a hostile archive cannot exceed.

torch stores every member uncompressed and once. Insisting on that makes the size of what is read at most the
size of the file (no zip bombs, no overlapping members) and leaves no two readings of one name.
"""

from __future__ import annotations

import io
import zipfile

from graphopt.loading.refusal import DamagedError

# torch writes one member per tensor; the largest models have some tens of thousands.
MAX_MEMBERS = 1_000_000


class Archive:
    """The members of a torch zip archive, by their name below the archive's root folder."""

    def __init__(self, data: bytes) -> None:
        """Open the archive held in `data`; raises `DamagedError` where it is not one that torch writes."""
        self._zip = _open(data)
        members = [info for info in self._zip.infolist() if not info.filename.endswith("/")]
        _check_members(members, len(data))
        # Files of torch 2.7 and older have members at the top, without a root folder.
        roots = {info.filename.partition("/")[0] for info in members}
        nested = len(roots) == 1 and all("/" in info.filename for info in members)
        skip = len(min(roots)) + 1 if nested else 0
        self._members = {info.filename[skip:]: info for info in members}

    @property
    def names(self) -> list[str]:
        """Names of all members, in the archive's order."""
        return list(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def size(self, name: str) -> int:
        """Return the length of a member in bytes."""
        return self._members[name].file_size

    def read(self, name: str) -> bytes:
        """Return a member's bytes; raises `DamagedError` where it is missing or its checksum does not match."""
        if name not in self._members:
            raise DamagedError(f"its member `{name}` is missing")
        try:
            return self._zip.read(self._members[name])
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as err:
            raise DamagedError(f"its member `{name}` cannot be read ({err})") from err


def member_names(data: bytes) -> set[str]:
    """Return the names of an archive's members, below its root folder too, whatever program wrote it."""
    names = _open(data).namelist()
    return {*names, *(name.partition("/")[2] for name in names)}


def _open(data: bytes) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BytesIO(data))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as err:
        raise DamagedError(f"it starts like a zip archive but has no readable directory ({err})") from err


def _check_members(members: list[zipfile.ZipInfo], length: int) -> None:
    if not members:
        raise DamagedError("it is an empty zip archive")
    if len(members) > MAX_MEMBERS:
        raise DamagedError(f"it lists {len(members)} members, more than the {MAX_MEMBERS} a model file can need")
    seen: set[str] = set()
    total = 0
    for info in members:
        if not info.filename:
            raise DamagedError("it holds a member without a name")
        # Readers that ignore case would find another member than this one did.
        key = info.filename.lower()
        if key in seen:
            raise DamagedError(f"it holds two members called `{info.filename}`")
        seen.add(key)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise DamagedError(f"its member `{info.filename}` is compressed, which torch never does")
        if info.flag_bits & 0x1:
            raise DamagedError(f"its member `{info.filename}` is encrypted")
        total += info.file_size
    if total > length:
        raise DamagedError(f"its members claim {total} bytes, more than the {length} of the file")

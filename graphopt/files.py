"""Reading files that are files, and writing them so that a killed run leaves nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from graphopt.errors import UsageError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` and rename it over `path` when the block ends well.

    Raises:
        UsageError: the directory cannot be written to, or the disk is full; `path` is as it was.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        os.chmod(temporary, 0o666 & ~_umask())
        yield temporary
        os.replace(temporary, path)
    except OSError as err:
        raise UsageError(
            f"Could not write {path}: {err.strerror or err}. Nothing was left half-written. "
            "Free some space or choose another place with -o."
        ) from err
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; when the block ends well its files replace those in `path`.

    Files of `path` that the block did not write are left alone.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing.", dir=path))
    except OSError as err:
        raise UsageError(f"Could not write to {path}: {err.strerror or err}. Choose another place with -o.") from err
    try:
        yield temporary
        for file in sorted(temporary.iterdir()):
            os.replace(file, path / file.name)
    except OSError as err:
        raise UsageError(
            f"Could not write to {path}: {err.strerror or err}. Nothing was left half-written. "
            "Free some space or choose another place with -o."
        ) from err
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}


def read_file(path: Path, *, most: int | None = None) -> bytes:
    """Return the bytes of a regular file; never wait for a FIFO, never read a device.

    Args:
        path: the file, or a link to it.
        most: bytes that it may have; as many as the machine has memory where it is None.

    Raises:
        OSError: there is no such file, it is no regular file, too large, or cannot be read; `strerror` says so.
    """
    kind = stat.S_IFMT(path.stat().st_mode)  # before it is opened, which some devices answer with a deed
    if kind in _KINDS:
        raise OSError(errno.EINVAL, f"it is {_KINDS[kind]}, not a regular file", str(path))
    if most is None:
        most, said = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "of this machine's memory"
    else:
        said = "that such a file may have"
    with path.open("rb") as stream:
        small = os.fstat(stream.fileno()).st_size <= most
        content = stream.read() if small else b""
    if not small or len(content) > most:  # the size of a file in /proc is said to be 0
        raise OSError(errno.EFBIG, f"it has more than the {most:,} bytes {said}", str(path))
    return content


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

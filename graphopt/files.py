"""Reading files that are files, and writing them so that a killed run leaves nothing half-written.

What is written lies in a scratch directory first, inside the directory it is for. A process that is killed leaves that
behind, and the next one to write there clears it away. A lock, which ends with the process, tells whether it is in use;
the name of the directory and the content of the lock's file tell that it is one of these.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from graphopt.errors import LoadError, UsageError

MANIFEST = "manifest.json"  # holds the digests of the files beside it, by name: with it they are a result
MOST_OF_A_MANIFEST = 2**26  # bytes; plans list what they keep, one index a line
REPORT = "report.json"  # belongs to them, but holds times, which its digest would bring into the manifest
_FIELDS = {"schema", "pipeline", "plans", "sha256"}  # of a manifest since the first
SCRATCH = ".graphopt-scratch-"  # what the names of scratch directories start with
_LOCK = ".lock"
_MARK = b"A scratch directory of graphopt's: whoever finds no lock on this file may remove it.\n"
_PATIENCE = 60.0  # seconds; what is done under the lock of a directory takes milliseconds
_WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # as some network file systems are
_LONG_AGO = (1, 1)  # seconds since 1970, of the last access and change
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class ScratchDirectory(tempfile.TemporaryDirectory[str]):
    """A temporary directory that the next one made beside it clears away where this process is killed."""

    def __init__(self, parent: Path | None = None) -> None:
        """Make it in `parent`, or where temporary files go.

        Raises:
            UsageError: nothing can be written there.
        """
        try:
            parent = parent or Path(tempfile.gettempdir())
            _clear(parent)
            super().__init__(prefix=SCRATCH, dir=parent, ignore_cleanup_errors=True)
            lock = _lock_file(Path(self.name))
        except OSError as err:
            raise _unwritable(parent or Path("$TMPDIR"), err) from err
        self._release = weakref.finalize(self, _release, Path(self.name), lock)  # runs before that of the class

    def cleanup(self) -> None:
        """Remove it, if it is still there."""
        self._release()
        super().cleanup()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write, and rename it over `path` when the block ends well.

    Raises:
        UsageError: the directory cannot be written to, the disk is full, or `path` is something else than a file;
            it is as it was.
    """
    try:
        _check_kinds([path])
        path.parent.mkdir(parents=True, exist_ok=True)
        with ScratchDirectory(path.parent) as scratch:
            yield Path(scratch) / path.name
            os.replace(Path(scratch) / path.name, path)
    except OSError as err:
        raise _unwritable(path, err) from err


@contextlib.contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """Yield a directory to write files to; when the block ends well they replace those of `path`, all or none.

    A killed process leaves the old files, or the new ones, or some of either without their manifest; never both kinds.
    Files of `path` stay that the block does not write, but for those that only the manifest it replaces is about.

    Raises:
        UsageError: the directory cannot be written to, the disk is full, something is in the way that no run wrote, or
            `path` holds a result that these files would make another and do not replace; it is as it was.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with ScratchDirectory(path) as scratch:
            new, old = (Path(scratch) / name for name in ("new", "old"))
            new.mkdir()
            old.mkdir()
            yield new
            with _locked(path):
                _publish(new, old, path)
    except OSError as err:
        raise _unwritable(path, err) from err


def remove_result(directory: Path) -> None:
    """Remove the files of a result as its manifest knows them, and the directory if nothing else is in it."""
    digests = _digests(directory / MANIFEST)
    if digests is None:
        return
    with _locked(directory):
        for name in (MANIFEST, REPORT, *(name for name in digests if _has(directory / name, digests[name]))):
            (directory / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody has other files there
        directory.rmdir()


def _unwritable(path: Path, err: OSError) -> UsageError:
    reason = err.strerror or f"the disk may be full ({err})"  # as NumPy says it, which drops the reason
    remedy = "Make it writable" if err.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else "Free some space"
    return UsageError(
        f"Could not write to {path}: {reason}. Nothing was left half-written. {remedy} or choose "
        "another place with -o, for temporary files with the environment variable TMPDIR."
    )


def _publish(new: Path, old: Path, path: Path) -> None:
    """Move the files of `new` to `path`, and those they replace from there to `old`.

    The old manifest goes first and the new one comes last. New files are older than whatever they were made from until
    it is there: a build that was killed in between starts again.
    """
    names = sorted((file.name for file in new.iterdir()), key=lambda name: (name == MANIFEST, name))
    before = _digests(path / MANIFEST) or {}
    if MANIFEST in names:
        _check_replaceable(path, names)
        coming, gone = names, [name for name in before if name not in names and _has(path / name, before[name])]
    else:
        _check_kinds(path / name for name in names)
        changed = next((name for name in names if name in before and not _has(new / name, before[name])), None)
        if changed is not None:
            raise UsageError(
                f"{path} holds the result of another run, and its {MANIFEST} would no longer be true: {changed} is "
                "another file there. Choose another place with -o."
            )
        coming, gone = [name for name in names if not _has(path / name, before.get(name))], []
    going = [name for name in reversed(coming) if os.path.lexists(path / name)] + gone
    with contextlib.ExitStack() as undo:
        for name in coming:
            os.utime(new / name, _LONG_AGO)
        for source, target, moved in ((path, old, going), (new, path, coming)):
            for name in moved:
                os.rename(source / name, target / name)
                undo.callback(os.rename, target / name, source / name)
        for name in names:
            os.utime(path / name)
        undo.pop_all()


def check_replaceable(directory: Path, names: Iterable[str]) -> None:
    """Raise a UsageError for what files of these names in a directory would replace that is of no result.

    What belongs to a result its manifest says; other programs call files of theirs so, too.
    """
    if not directory.is_dir():
        _check_writable(next(parent for parent in directory.absolute().parents if parent.exists()), directory)
        return
    _check_writable(directory, directory)
    try:
        _clear(directory)  # what a killed process left there is nobody's
        with _locked(directory):
            _check_replaceable(directory, names)
    except OSError as err:
        raise _unwritable(directory, err) from err


def _check_replaceable(directory: Path, names: Iterable[str]) -> None:
    before = _digests(directory / MANIFEST)
    ours = () if before is None else (*before, MANIFEST, REPORT)
    paths = [directory / name for name in names]
    _check_kinds(paths)
    foreign = next((path for path in paths if os.path.lexists(path) and path.name not in ours), None)
    if foreign is not None:
        raise UsageError(
            f"{foreign} was not written by graphopt, or the manifest that says so is gone; a result has a file there. "
            "Move it away, or choose another place with -o."
        )


def _check_writable(folder: Path, directory: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unwritable(directory, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def _check_kinds(paths: Iterable[Path]) -> None:
    """Raise a UsageError if there is something else than a file where a file is to be."""
    for path in paths:
        kind = _KINDS.get(stat.S_IFMT(path.stat().st_mode)) if path.exists() else None
        if kind is not None:
            raise UsageError(f"{path} is {kind}, not a file. Move it away, or choose another place with -o.")


def _digests(manifest: Path) -> dict[str, str] | None:
    """Return the digests that a manifest holds by the name of the file; None if it is missing, damaged, or foreign."""
    try:
        found: Any = json.loads(read_file(manifest, most=MOST_OF_A_MANIFEST))
        if not found.keys() >= _FIELDS:
            return None
        return {name: str(digest) for name, digest in found["sha256"].items() if _is_file_name(name)}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def _is_file_name(name: str) -> bool:
    return PurePath(name).name == name and "\0" not in name and len(os.fsencode(name)) < 256


def _has(path: Path, digest: str | None) -> bool:
    return digest is not None and path.is_file() and sha256(path) == digest


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep others from changing the files of a directory.

    Raises:
        OSError: somebody else has done so for a minute.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        until = time.monotonic() + _PATIENCE
        while not _try_to_lock(handle):
            if time.monotonic() > until:
                raise OSError(errno.EBUSY, "another process holds a lock on it, as `flock` puts on a directory")
            time.sleep(0.01)
        yield
    finally:
        os.close(handle)


def _try_to_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as err:
        if err.errno not in _WITHOUT_LOCKS:
            raise
    return True


def _lock_file(folder: Path) -> io.FileIO:
    """Say that a folder is in use until the file is closed; nobody finds the mark in it before the lock is held."""
    stream = io.FileIO(folder / _LOCK, "x")
    with contextlib.suppress(OSError):  # without locks nobody can tell whether it is in use: it is never cleared away
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write(_MARK)
    return stream


def _release(folder: Path, lock: io.FileIO) -> None:
    with contextlib.suppress(FileNotFoundError):  # somebody has tidied up
        _empty(folder)
    lock.close()  # network file systems keep what is open


def _clear(parent: Path) -> None:
    """Remove the scratch directories of processes that were killed."""
    for folder in sorted(parent.glob(f"{SCRATCH}*")):
        try:
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                continue
            if time.time() - found.st_mtime > _PATIENCE and not os.listdir(folder):
                folder.rmdir()  # killed before it had a lock
                continue
            with open(folder / _LOCK, "rb", opener=_without_waiting) as stream:
                if stream.read(len(_MARK) + 1) != _MARK:
                    continue
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _withdraw(folder, parent)
                _empty(folder)
                shutil.rmtree(folder)
        except OSError:  # in use, not one of these, or not to be removed: nothing that is done here needs it gone
            continue


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


def _empty(folder: Path) -> None:
    """Remove all but the lock, without which nobody could tell later what the rest is."""
    for part in folder.iterdir():
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
        elif part.name != _LOCK:
            part.unlink(missing_ok=True)


def _withdraw(scratch: Path, path: Path) -> None:
    """Remove what a process that was killed in `_publish` left of the old files and had brought of the new ones."""
    folders = [scratch / "old", scratch / "new"]
    listed = {folder: found for folder in folders if (found := _digests(folder / MANIFEST))}
    if listed:
        with _locked(path):
            named = _digests(path / MANIFEST) or {}
            for folder, digests in listed.items():
                if not named and not (folder / REPORT).exists():  # it is the one that was there, or that had come
                    (path / REPORT).unlink(missing_ok=True)
                for name, digest in digests.items():
                    if name not in named and not (folder / name).exists() and _has(path / name, digest):
                        (path / name).unlink()


class _LateErrors(io.BufferedWriter):
    """A file that keeps its first failure to itself until it is closed."""

    failure: OSError | None = None

    def write(self, content: Any) -> int:
        """Write, or pretend to."""
        if self.failure is None:
            try:
                return super().write(content)
            except OSError as err:
                self.failure = err
        return memoryview(content).nbytes


@contextlib.contextmanager
def failing_late(path: Path) -> Iterator[io.BufferedWriter]:
    """Open a file for a writer that must not see an error: torch's zip writer ends the process if it does.

    Raises:
        OSError: the disk was full, said when the block has ended.
    """
    with _LateErrors(io.FileIO(path, "w")) as stream:
        yield stream
        if stream.failure is not None:
            raise stream.failure


def read_file(path: Path, *, most: int | None = None) -> bytes:
    """Return the bytes of a regular file; never wait for a FIFO, never read a device.

    Args:
        path: the file, or a link to it.
        most: bytes that it may have; as many as the machine has memory where it is None.

    Raises:
        OSError: there is no such file, it is no regular file, too large, or cannot be read; `strerror` says so.
    """
    kind = stat.S_IFMT(path.stat().st_mode)  # before it is opened, which some devices answer with a deed
    if kind in _KINDS and kind != stat.S_IFDIR:  # which opening it says
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


def check_against_manifest(path: Path, content: bytes | None = None) -> None:
    """Compare a file, and external data that belongs to it, with the manifest beside it, if that names it.

    Args:
        path: the file.
        content: what was read of it, and is going to be used; None reads it.

    Raises:
        LoadError: it has changed since, or is gone.
    """
    digests = _digests(path.parent / MANIFEST) or {}
    for file, held in ((path, content), (path.with_name(f"{path.name}.data"), None)):
        if file.name in digests:
            check_digest(file, digests[file.name], held)


def check_digest(path: Path, digest: str, content: bytes | None = None) -> None:
    """Compare a file with the digest that the manifest beside it holds. Arguments are those of the function above.

    Raises:
        LoadError: it has changed since, or is gone.
    """
    if content is None and not path.is_file():
        raise LoadError(
            f"{path} is missing; {MANIFEST} beside it lists it. Optimise again, or copy the whole directory."
        )
    if (sha256(path) if content is None else hashlib.sha256(content).hexdigest()) != digest:
        raise LoadError(
            f"{path} is not the file that {MANIFEST} beside it was written with: its SHA-256 differs. Optimise again, "
            "copy it anew, or use a copy elsewhere if it is meant to differ."
        )

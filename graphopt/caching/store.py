"""Plans on disk: one folder of JSON and safetensors, of this user alone, bounded, each file whole or not there.

    <key>-<digest of the rest>.json     what is kept, see `CacheEntry`
    <key>-<digest>.safetensors          its tensors

Names hold the digest of the content, so that what is damaged is not what was asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pydantic
import safetensors
import torch
from safetensors.torch import load, save_file

from graphopt.caching.reads import Read
from graphopt.errors import UsageError, first_line
from graphopt.files import ScratchDirectory, read_file, sha256

logger = logging.getLogger(__name__)

PLACE = "GRAPHOPT_CACHE"  # environment variable: the folder; empty for none
MOST = 4 << 30  # bytes; what was used longest ago goes first
_MOST_OF_AN_ENTRY = 1 << 26  # bytes of JSON
_ELSEWHERE = f"Name another folder in the environment variable {PLACE}, or do without (--no-cache)."
_ENTRY = re.compile(r"([0-9a-f]{64})-([0-9a-f]{64})\.json")
_PAYLOAD = re.compile(r"([0-9a-f]{64}-)?[0-9a-f]{64}\.safetensors")


class CacheEntry(pydantic.BaseModel, extra="forbid", strict=True, frozen=True):
    """What is kept of one step.

    Attributes:
        reads: what had been read of the data by then, each with its digest.
        machine: digest of the machine, where a time was measured by then.
        payload: digest of the tensors, "" where there are none.
        content: the plan as JSON, or what was measured of the step's result.
    """

    reads: list[tuple[Read, str]] = []
    machine: str | None = None
    payload: str = ""
    content: dict[str, pydantic.JsonValue]


@dataclass(frozen=True)
class Store:
    """A folder of entries.

    Attributes:
        folder: where they are.
        most: bytes that they may take together.
    """

    folder: Path
    most: int = MOST

    @classmethod
    def of_user(cls) -> Store | None:
        """Return the store of this user, None where the environment says that there is none."""
        said = os.environ.get(PLACE)
        if said == "":
            return None
        try:
            if said is not None:
                return cls(Path(said).expanduser())
            return cls(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graphopt")
        except RuntimeError as err:  # a user without a home
            if said is not None:
                _say_once(f"Nothing is kept in the cache {said}: {first_line(err)}. {_ELSEWHERE}")
            return None

    def entries(self, key: str) -> Iterator[tuple[CacheEntry, Mapping[str, torch.Tensor]]]:
        """Yield what is kept under a key, with its tensors; what is damaged goes."""
        if not self._usable():
            return
        for path in sorted(self.folder.glob(f"{key}-*.json")):
            found = self._read(path)
            if found is not None:
                yield found

    def add(self, key: str, entry: CacheEntry, tensors: Mapping[str, torch.Tensor], *, instead: bool = False) -> bool:
        """Keep an entry, and let go of what has not been used for longest where there is too much.

        Where it cannot be written, that is said once and nothing is kept.

        Args:
            key: what it is found by.
            entry: the entry.
            tensors: its tensors.
            instead: of all others under this key.

        Returns:
            Whether it is there.
        """
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > self.most // 4:
            logger.info("A plan with %d bytes of tensors is not kept: the cache holds %d.", size, self.most)
            return False
        try:
            if not self.folder.exists():
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not self._usable():
                return False
            with ScratchDirectory(self.folder) as scratch:
                if tensors:
                    file = Path(scratch) / "tensors"
                    save_file(dict(tensors), file)
                    entry = entry.model_copy(update={"payload": sha256(file)})
                    os.replace(file, self._payload(key, entry))
                text = entry.model_dump_json().encode()
                if len(text) > _MOST_OF_AN_ENTRY:
                    logger.info("A plan with %d bytes of JSON is not kept: %d are read.", len(text), _MOST_OF_AN_ENTRY)
                    return False
                file = Path(scratch) / "entry"
                file.write_bytes(text)
                path = self.folder / f"{key}-{hashlib.sha256(text).hexdigest()}.json"
                os.replace(file, path)
            if instead:
                self.remove(key, but=[path, self._payload(key, entry)])
            self._shrink()
            return True
        except (OSError, UsageError, safetensors.SafetensorError) as err:
            cause = err.__cause__ or err
            said = getattr(cause, "strerror", None) or first_line(cause)
            _say_once(f"Nothing is kept in the cache {self.folder}: {said}. {_ELSEWHERE}")
            return False

    def remove(self, key: str, *, but: Collection[Path] = ()) -> None:
        """Let go of what is kept under a key, and say nothing where that cannot be."""
        for path in {*self.folder.glob(f"{key}-*")} - {*but}:
            with contextlib.suppress(OSError):
                path.unlink()

    def usage(self) -> tuple[int, int]:
        """Return how many entries there are, and bytes of all files.

        Raises:
            UsageError: the folder cannot be read.
        """
        files = self._files()
        return sum(path.suffix == ".json" for path, _ in files), sum(status.st_size for _, status in files)

    def clear(self) -> None:
        """Remove all entries.

        Raises:
            UsageError: the folder cannot be read, or one cannot be removed.
        """
        try:
            for path, _ in self._files():
                path.unlink(missing_ok=True)
        except OSError as err:
            raise UsageError(f"Could not clear the cache {self.folder}: {err.strerror or err}.") from err

    def unusable(self) -> str:
        """Say why what lies there is not used, "" where it is or nothing lies there."""
        try:
            status = os.stat(self.folder)
        except FileNotFoundError:
            return ""
        except OSError as err:
            return f"The cache {self.folder} is not used: {err.strerror}. {_ELSEWHERE}"
        if not stat.S_ISDIR(status.st_mode):
            return f"The cache {self.folder} is a file, not a folder, and not used. {_ELSEWHERE}"
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            only = "Make it yours alone (chmod 700)"
            return f"The cache {self.folder} is open to others and not used. {only}, or: {_ELSEWHERE}"
        return ""

    def _usable(self) -> bool:
        """Whether the folder is there, and nobody else can write plans into it."""
        reason = self.unusable()
        if reason:
            _say_once(reason)
        return not reason and self.folder.is_dir()

    def _read(self, path: Path) -> tuple[CacheEntry, Mapping[str, torch.Tensor]] | None:
        try:
            text = read_file(path, most=_MOST_OF_AN_ENTRY)
            named = _ENTRY.fullmatch(path.name)
            if named is None or hashlib.sha256(text).hexdigest() != named[2]:
                raise ValueError("it is not what its name says")
            entry = CacheEntry.model_validate_json(text)
            tensors: Mapping[str, torch.Tensor] = {}
            if entry.payload:
                # not mapped: a file that is cut short later would end the process; a quarter of `most` fits in memory
                payload = self._payload(named[1], entry)
                content = read_file(payload, most=self.most // 4 + _MOST_OF_AN_ENTRY)
                if hashlib.sha256(content).hexdigest() != entry.payload:
                    raise ValueError("its tensors are not those it was written with")
                tensors = load(content)
                _touch(payload)
            _touch(path)
        except FileNotFoundError:  # another process has let go of it
            return None
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as err:  # a key: a type that torch lacks
            logger.warning("%s in the cache is damaged and goes: %s", path.name, err)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        return entry, tensors

    def _payload(self, key: str, entry: CacheEntry) -> Path:
        return self.folder / f"{key}-{entry.payload}.safetensors"

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        """List the files of the store, and links that are called so, longest unused first.

        Raises:
            UsageError: the folder cannot be read.
        """
        found = []
        try:
            for path in self.folder.iterdir() if self._usable() else ():
                if _ENTRY.fullmatch(path.name) or _PAYLOAD.fullmatch(path.name):
                    with contextlib.suppress(FileNotFoundError):
                        status = path.lstat()
                        if not stat.S_ISDIR(status.st_mode):  # which is not of ours
                            found.append((path, status))
        except OSError as err:
            raise UsageError(f"Could not read the cache {self.folder}: {err.strerror or err}.") from err
        return sorted(found, key=lambda item: item[1].st_mtime_ns)

    def _shrink(self) -> None:
        files = self._files()
        total = sum(status.st_size for _, status in files)
        for path, status in files:
            if total <= self.most:
                return
            path.unlink(missing_ok=True)
            total -= status.st_size


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):  # a folder that can only be read serves what it holds
        os.utime(path)


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        logger.warning("%s", text)

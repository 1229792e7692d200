"""Files: what is read is a regular file of a bounded size; what is written is there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from graphopt import files
from graphopt.errors import LoadError, UsageError
from graphopt.files import (
    MANIFEST,
    REPORT,
    SCRATCH,
    ScratchDirectory,
    check_against_manifest,
    check_replaceable,
    failing_late,
    read_file,
    replacing,
    replacing_directory,
    sha256,
)


def test_a_regular_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    for most in (None, 5, 6):
        assert read_file(tmp_path / "file", most=most) == read_file(tmp_path / "link", most=most) == b"12345"
    with pytest.raises(OSError, match="it has more than the 4 bytes"):
        read_file(tmp_path / "file", most=4)


def test_a_sparse_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as stream:
        stream.truncate(1 << 42)
    with pytest.raises(OSError, match="it has more than the 1,000,000 bytes"):
        read_file(tmp_path / "file", most=1_000_000)
    with pytest.raises(OSError, match=r"it has more than the [\d,]+ bytes of this machine's memory"):
        read_file(tmp_path / "file")


def test_a_file_that_grows_past_its_bound_while_it_is_read() -> None:
    assert read_file(Path("/proc/self/status"), most=1_000_000)  # whose size is said to be 0
    with pytest.raises(OSError, match="it has more than the 10 bytes"):
        read_file(Path("/proc/self/status"), most=10)


def test_what_is_no_file_is_neither_waited_for_nor_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    (tmp_path / "link").symlink_to("/dev/zero")
    for name, said in {
        "fifo": "it is a FIFO, not a regular file",
        "socket": "it is a socket, not a regular file",
        "/dev/zero": "it is a device, not a regular file",
        "link": "it is a device, not a regular file",
        ".": "Is a directory",
        "absent": "No such file or directory",
        "fifo/below": "Not a directory",
    }.items():
        with pytest.raises(OSError, match=said) as caught:
            read_file(tmp_path / name)
        assert caught.value.strerror == said


# Writing. Killing is done in a process of its own, which is told at which step to end.


def manifest(digests: dict[str, str]) -> str:
    """Return a manifest as far as files are concerned."""
    return json.dumps({"schema": 2, "pipeline": "fold", "plans": [], "sha256": digests})


def _write(path: Path, **files: str) -> None:
    with replacing_directory(path) as folder:
        for name, text in files.items():
            (folder / name.replace("_", ".")).write_text(text)
        digests = {file.name: sha256(file) for file in folder.iterdir()}
        (folder / REPORT).write_text(next(iter(files.values())))
        (folder / MANIFEST).write_text(manifest(digests))


def _state(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir() if file.is_file()}


def _read(path: Path) -> dict[str, str] | None:
    """Return what a reader that looks at the manifest finds: everything that it names, or nothing without it."""
    if not (path / MANIFEST).exists():
        return None
    for name, digest in json.loads((path / MANIFEST).read_text())["sha256"].items():
        assert sha256(path / name) == digest, f"{name} is not what the manifest says"
        assert (path / name).read_text() == (path / REPORT).read_text()
    return {name: text for name, text in _state(path).items() if name not in (MANIFEST, REPORT)}


OLD = {"a_onnx": "old", "b_onnx": "old", "run_py": "old"}
NEW = {"a_onnx": "new", "c_onnx": "new", "run_py": "new"}
STEPS = ("rename", "replace", "unlink", "remove", "rmdir", "utime", "mkdir")


def _killed_at(step: int, path: Path) -> bool:
    """Write `NEW` in a process that is killed before its call number `step` that changes the folder; say if it was."""
    child = os.fork()
    if child == 0:
        left = iter(range(step, -1, -1))

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                if next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return wrapper

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            _write(path, **NEW)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_anywhere_a_folder_is_old_or_new_or_has_no_manifest(tmp_path: Path) -> None:
    """Files of the one and of the other are never there together, manifest or not."""
    old, new = ({name.replace("_", "."): text for name, text in one.items()} for one in (OLD, NEW))
    seen = set()
    for step in range(100):
        path = tmp_path / str(step)
        _write(path, **OLD)
        (path / "notes.txt").write_text("mine")
        killed = _killed_at(step, path)
        left = _state(path)
        assert left.pop("notes.txt") == "mine"
        found = _read(path)
        assert found in (None, {**old, "notes.txt": "mine"}, {**new, "notes.txt": "mine"})
        assert len({*left.values()} & {"old", "new"}) <= 1
        seen.add("old" if found and "b.onnx" in found else "new" if found else "none")
        for scratch in path.glob(f"{SCRATCH}*"):
            os.utime(scratch, (1, 1))  # one that has no lock yet is spared for a minute
        _write(path, a_onnx="other")
        assert _read(path) == {"a.onnx": "other", "notes.txt": "mine"}
        assert sorted(os.listdir(path)) == ["a.onnx", MANIFEST, "notes.txt", REPORT]
        if not killed:
            break
    assert not killed
    assert step > 15
    assert seen == {"old", "new", "none"}


def test_killed_before_anything_is_moved_a_report_of_somebody_stays(tmp_path: Path) -> None:
    (tmp_path / REPORT).write_text("mine")
    child = os.fork()
    if child == 0:
        with replacing_directory(tmp_path) as folder:
            (folder / REPORT).write_text("new")
            (folder / MANIFEST).write_text(manifest({"a.onnx": "0" * 64}))
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert list(tmp_path.glob(f"{SCRATCH}*"))
    with pytest.raises(UsageError, match=f"{REPORT} was not written by graphopt"):
        _write(tmp_path, **NEW)
    assert _state(tmp_path) == {REPORT: "mine"}
    assert not list(tmp_path.glob(f"{SCRATCH}*"))


def test_a_build_starts_again_after_a_kill_before_the_manifest(tmp_path: Path) -> None:
    source = tmp_path / "model.pt"
    source.touch()
    older_artifacts = set()
    for step in range(100):
        path = tmp_path / str(step)
        if not _killed_at(step, path):
            break
        artifact = path / "c.onnx"
        if artifact.exists() and not (path / MANIFEST).exists():
            older_artifacts.add(artifact.stat().st_mtime < source.stat().st_mtime)
    assert older_artifacts == {True}
    assert artifact.stat().st_mtime >= source.stat().st_mtime


def test_a_step_that_fails_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, **OLD)

    def stats() -> dict[str, tuple[int, int, int]]:
        found = {name: (tmp_path / name).stat() for name in os.listdir(tmp_path)}
        return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}

    before = stats()
    rename = os.rename
    for failing in range(12):
        calls = iter(range(100))

        def sometimes(source: Path, target: Path, calls: Iterator[int] = calls, failing: int = failing) -> None:
            if next(calls) == failing:
                raise OSError(errno.EIO, "Input/output error")
            rename(source, target)

        monkeypatch.setattr(os, "rename", sometimes)
        if failing == 10:  # five of the old go, five of the new come
            break
        with pytest.raises(UsageError, match=r"Input/output error\. Nothing was left half-written"):
            _write(tmp_path, **NEW)
        assert stats() == before
    _write(tmp_path, **NEW)
    assert _read(tmp_path) == {"a.onnx": "new", "c.onnx": "new", "run.py": "new"}


@pytest.mark.parametrize("kind", ["folder", "FIFO"])
def test_what_is_in_the_way_of_a_file_is_said_before_anything_changes(tmp_path: Path, kind: str) -> None:
    _write(tmp_path, **OLD)
    (tmp_path / "c.onnx").mkdir() if kind == "folder" else os.mkfifo(tmp_path / "c.onnx")
    before = _state(tmp_path)
    with pytest.raises(UsageError, match=f"c.onnx is a {kind}, not a file. Move it away"):
        _write(tmp_path, **NEW)
    assert _state(tmp_path) == before
    assert not list(tmp_path.glob(f"{SCRATCH}*"))
    with pytest.raises(UsageError, match=f"c.onnx is a {kind}, not a file"), replacing(tmp_path / "c.onnx"):
        raise AssertionError("nothing is computed that could not be written")


def test_devices_are_not_replaced() -> None:
    with pytest.raises(UsageError, match="null is a device, not a file"), replacing(Path("/dev/null")):
        raise AssertionError("nothing is computed that could not be written")


def test_what_only_the_old_manifest_names_goes_if_it_is_what_that_names(tmp_path: Path) -> None:
    _write(tmp_path, **OLD)
    (tmp_path / "b.onnx").write_text("of somebody else since")
    _write(tmp_path, **NEW)
    assert (tmp_path / "b.onnx").read_text() == "of somebody else since"


def test_a_manifest_names_files_beside_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (tmp_path / "victim").write_text("x")
    named = ("../victim", "x" * 256, "a\0b", "ü" * 200, "..")
    (path / MANIFEST).write_text(manifest(dict.fromkeys(named, sha256(tmp_path / "victim"))))
    _write(path, **NEW)
    assert _read(path) == {"a.onnx": "new", "c.onnx": "new", "run.py": "new"}
    assert (tmp_path / "victim").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"sha256": 3}', '{"name": "of a web page", "icons": []}'])
def test_a_manifest_of_something_else_is_not_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    (tmp_path / "a.onnx").write_text("somebody's")
    before = _state(tmp_path)
    with pytest.raises(
        UsageError, match=r"(a.onnx|manifest.json) was not written by graphopt, or the manifest that says so is gone"
    ):
        _write(tmp_path, **NEW)
    assert _state(tmp_path) == before
    assert not list(tmp_path.glob(f"{SCRATCH}*"))
    check_against_manifest(tmp_path / "a.onnx")


@pytest.mark.parametrize("digest", [True, False])
def test_files_that_another_manifest_names_are_somebody_elses(tmp_path: Path, digest: bool) -> None:
    (tmp_path / "victim").write_text("x")
    named = {"victim": sha256(tmp_path / "victim") if digest else "0" * 64}
    (tmp_path / MANIFEST).write_text(json.dumps({"sha256": named}))
    check_against_manifest(tmp_path / "victim")
    with pytest.raises(UsageError, match="not written by graphopt"):
        _write(tmp_path, **NEW)
    assert (tmp_path / "victim").exists()


def test_files_alone_do_not_make_a_manifest_untrue(tmp_path: Path) -> None:
    _write(tmp_path, **OLD)
    before = _state(tmp_path)

    def write(text: str) -> None:
        with replacing_directory(tmp_path) as folder:
            (folder / "a.onnx").write_text(text)
            (folder / "z.onnx").write_text("new")

    with pytest.raises(UsageError, match=r"its manifest.json would no longer be true: a.onnx is another file"):
        write("new")
    assert _state(tmp_path) == before
    write("old")
    assert _state(tmp_path) == {**before, "z.onnx": "new"}


@pytest.mark.parametrize("name", ["run.py", REPORT, "c.onnx"])
def test_a_file_of_somebody_is_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=f"{name} was not written by graphopt"):
        _write(tmp_path, **NEW)
    assert _state(tmp_path) == {name: "mine"}
    (tmp_path / name).rename(tmp_path / "notes.txt")
    _write(tmp_path, **OLD)
    (tmp_path / "c.onnx").symlink_to("nothing")
    with pytest.raises(UsageError, match=r"c\.onnx was not written by graphopt"):
        _write(tmp_path, **NEW)
    assert _read(tmp_path) == {"a.onnx": "old", "b.onnx": "old", "run.py": "old", "notes.txt": "mine"}


def test_a_file_that_its_manifest_does_not_know_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, **OLD, c_onnx_data="old")
    for name in ("a.onnx", "c.onnx", "notes.txt"):
        check_against_manifest(tmp_path / name)
    (tmp_path / "c.onnx.data").write_text("new")
    with pytest.raises(LoadError, match=r"c.onnx.data is not the file that manifest.json beside it was written with"):
        check_against_manifest(tmp_path / "c.onnx")


_WRITER = """
import sys, pathlib
sys.path[:0] = {paths!r}
from tests.graphopt.test_files import _write
while not pathlib.Path({go!r}).exists(): pass
for _ in range(30):
    _write(pathlib.Path({path!r}), **{{name: {text!r} for name in {names!r}}})
"""


def test_two_at_once_end_with_one_of_them_whole(tmp_path: Path) -> None:
    go, path = tmp_path / "go", tmp_path / "out"
    names = {"one": ["a_onnx", "b_onnx"], "two": ["b_onnx", "c_onnx"]}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER.format(paths=sys.path, go=str(go), path=str(path), text=text, names=files)],
            stderr=subprocess.PIPE,
        )
        for text, files in names.items()
    ]
    go.touch()
    for writer in writers:
        assert writer.communicate()[1] == b""
        assert writer.returncode == 0
    found = _read(path)
    assert found in ({"a.onnx": "one", "b.onnx": "one"}, {"b.onnx": "two", "c.onnx": "two"})
    assert len(os.listdir(path)) == 4


def test_somebody_else_who_locks_the_folder_is_waited_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_PATIENCE", 0.05)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match="another process holds a lock on it"):
        _write(tmp_path, **NEW)
    assert os.listdir(tmp_path) == []
    os.close(handle)
    _write(tmp_path, **NEW)


def test_without_locks_files_are_written_and_nothing_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    with monkeypatch.context() as without:
        without.setattr(fcntl, "flock", none)
        first = ScratchDirectory(tmp_path)
        os.utime(first.name, (1, 1))
        with ScratchDirectory(tmp_path) as second:
            assert Path(first.name).exists()
            assert Path(second).exists()
    with ScratchDirectory(tmp_path):  # whose process could have a lock: they may run on two machines
        assert Path(first.name).exists()
    first.cleanup()
    monkeypatch.setattr(fcntl, "flock", none)
    _write(tmp_path, **NEW)
    assert _read(tmp_path) is not None


def test_the_next_run_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / f"{SCRATCH}file").touch()
    child = os.fork()
    if child == 0:
        kept = [ScratchDirectory(tmp_path), ScratchDirectory(tmp_path)]
        assert len(kept) == 2
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(os.listdir(tmp_path)) == 3
    with ScratchDirectory(tmp_path) as one, ScratchDirectory(tmp_path) as other:
        assert {*os.listdir(tmp_path)} == {f"{SCRATCH}file", Path(one).name, Path(other).name}
    assert os.listdir(tmp_path) == [f"{SCRATCH}file"]


@pytest.mark.parametrize("name", ["graphopt-venv", ".writing.mine", f"{SCRATCH}mine"])
@pytest.mark.parametrize("inside", [{}, {".lock": ""}, {".lock.new": ""}, {".lock": "", "bin": "python"}])
def test_what_others_made_is_left_alone(tmp_path: Path, name: str, inside: dict[str, str]) -> None:
    """A lock nobody holds lies in environments of uv too."""
    (tmp_path / name).mkdir()
    for file, text in inside.items():
        (tmp_path / name / file).write_text(text)
    os.utime(tmp_path / name, (1, 1))
    with ScratchDirectory(tmp_path):
        assert (tmp_path / name).exists() == bool(inside or not name.startswith(SCRATCH))
    assert {path.name: path.read_text() for path in (tmp_path / name).glob("*")} == inside


def test_one_that_ended_before_it_had_a_lock_is_spared_for_a_minute(tmp_path: Path) -> None:
    (tmp_path / f"{SCRATCH}new").mkdir()
    with ScratchDirectory(tmp_path):
        assert (tmp_path / f"{SCRATCH}new").exists()
    os.utime(tmp_path / f"{SCRATCH}new", (1, 1))
    with ScratchDirectory(tmp_path):
        assert not (tmp_path / f"{SCRATCH}new").exists()


def test_a_scratch_directory_is_removed_once_and_gives_its_lock_back(tmp_path: Path) -> None:
    one, tidied = ScratchDirectory(tmp_path), ScratchDirectory(tmp_path)
    shutil.rmtree(tidied.name)
    for _ in range(2):
        one.cleanup()
        tidied.cleanup()
    forgotten: ScratchDirectory | None = ScratchDirectory(tmp_path)
    open_files = len(os.listdir("/proc/self/fd"))
    with pytest.warns(ResourceWarning, match="Implicitly cleaning up"):
        forgotten = None
    assert forgotten is None
    assert len(os.listdir("/proc/self/fd")) == open_files - 1
    assert os.listdir(tmp_path) == []


def test_left_overs_of_another_kind_are_neither_waited_for_nor_followed(tmp_path: Path) -> None:
    """They may come with an archive that somebody unpacked."""
    (tmp_path / "victim").write_text("mine")
    digest = sha256(tmp_path / "victim")
    for name in ("fifo", "link", "outside"):
        (tmp_path / f"out/{SCRATCH}{name}/new").mkdir(parents=True)
    fifo, link, outside, folder = (tmp_path / f"out/{SCRATCH}{name}" for name in ("fifo", "link", "outside", "folder"))
    os.mkfifo(fifo / ".lock")
    (tmp_path / "mark").write_bytes(files._MARK)
    (link / ".lock").symlink_to(tmp_path / "mark")
    (outside / ".lock").write_bytes(files._MARK)
    (outside / "deep").symlink_to(tmp_path)
    (outside / "new" / MANIFEST).write_text(manifest({"../victim": digest}))
    folder.symlink_to(tmp_path)
    _write(tmp_path / "out", **NEW)
    assert (tmp_path / "victim").read_text() == "mine"
    assert _read(tmp_path / "out") == {"a.onnx": "new", "c.onnx": "new", "run.py": "new"}
    assert {*(tmp_path / "out").glob(".*")} == {fifo, link, folder}


def test_a_failure_that_numpy_says_without_its_reason(tmp_path: Path) -> None:
    said = r"the disk may be full \(16 requested and 0 written\)\. Nothing was left"
    with pytest.raises(UsageError, match=said), replacing(tmp_path / "file"):
        raise OSError("16 requested and 0 written")


def test_a_failure_to_write_is_said_when_the_writer_has_ended(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))

    def write() -> None:
        with failing_late(tmp_path / "file") as stream:
            assert [stream.write(bytes(10_000)) for _ in range(40)] == [10_000] * 40

    try:
        with pytest.raises(OSError, match="File too large"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for directory in (tmp_path, tmp_path / "new" / "deep"):
        with pytest.raises(UsageError, match=r"Permission denied.*Make it writable or choose another place with -o"):
            check_replaceable(directory, ["model.onnx"])

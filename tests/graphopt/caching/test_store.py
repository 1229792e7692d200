"""The cache on disk: whole or not there, of one user, bounded; what is wrong with it costs time alone."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.caching import store as store_module
from graphopt.caching.reads import Read
from graphopt.caching.store import CacheEntry, Store
from graphopt.cli.app import run
from graphopt.errors import UsageError

KEY, OTHER = "a" * 64, "b" * 64
ENTRY = CacheEntry(
    reads=[(Read("samples", False, 4, None, 3), "c" * 64)], machine="d", content={"sites": ["x"], "n": 1.5}
)
TENSORS = {"w": torch.arange(6.0).view(2, 3), "tied": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_said", set())


def found(store: Store, key: str = KEY) -> list[tuple[CacheEntry, Any]]:
    return list(store.entries(key))


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "new" / "cache")
    assert found(store) == []
    store.add(KEY, ENTRY, TENSORS)
    store.add(KEY, ENTRY.model_copy(update={"machine": None}), {})
    store.add(OTHER, ENTRY, {})
    (one, other) = sorted(found(store), key=lambda pair: pair[0].machine or "")
    assert other[0] == ENTRY.model_copy(update={"payload": other[0].payload})
    assert all(torch.equal(tensor, other[1][name]) for name, tensor in TENSORS.items())
    assert one[1] == {}
    assert (tmp_path / "new" / "cache").stat().st_mode & 0o777 == 0o700
    assert store.usage()[0] == 3
    assert {path.suffix for path in store.folder.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("damage", ["shorter", "changed", "gone", "a folder", "a FIFO", "/dev/zero", "itself"])
def test_what_is_damaged_is_not_found(suffix: str, damage: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    store.add(KEY, ENTRY, TENSORS)
    (file,) = (path for path in store.folder.iterdir() if path.suffix == suffix)
    content = bytearray(file.read_bytes())
    if damage == "shorter":
        file.write_bytes(content[:-3])
    elif damage == "changed":
        content[-2] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
        if damage == "a folder":
            file.mkdir()
        elif damage == "a FIFO":
            os.mkfifo(file)
        elif damage != "gone":
            file.symlink_to(file if damage == "itself" else damage)
    assert found(store) == []
    store.add(KEY, ENTRY, TENSORS) if damage != "a folder" else None
    assert len(found(store)) == (damage != "a folder")


def test_tensors_do_not_change_with_their_file(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    store.add(KEY, ENTRY, TENSORS)
    ((_, tensors),) = found(store)
    (file,) = store.folder.glob("*.safetensors")
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in TENSORS.items())
    os.truncate(file, 8)  # where they are mapped, the next look at them ends the process
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in TENSORS.items())


READS = [{"steps": 2**70}, {"steps": -5}, {"batch_size": 0}, {"batch_size": 2**70}, {"limit": -1}, {"limit": 2**70}]


def test_an_entry_of_another_form_is_not_found(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    store.add(KEY, ENTRY, {})
    read = dataclasses.asdict(ENTRY.reads[0][0])
    reads = [json.dumps({"reads": [[read | other, "c"]], "content": {}}).encode() for other in READS]
    header = b'{"w":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}'  # which safetensors knows and torch does not
    tensors = len(header).to_bytes(8, "little") + header + b"x"
    payload = hashlib.sha256(tensors).hexdigest()
    (store.folder / f"{KEY}-{payload}.safetensors").write_bytes(tensors)
    reads.append(json.dumps({"payload": payload, "content": {}}).encode())
    for text in (b"[]", b'{"content": 1}', b'{"content": {}, "more": 1}', b"\xff", b"{" * 10**5, *reads):
        (store.folder / f"{OTHER}-{hashlib.sha256(text).hexdigest()}.json").write_bytes(text)
    assert found(store, OTHER) == []
    assert len(found(store)) == 1


def test_a_folder_that_cannot_be_written_serves_what_it_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "cache")
    store.add(KEY, ENTRY, TENSORS)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module.os, "replace", full)
    monkeypatch.setattr(store_module.os, "utime", full)
    with caplog.at_level(logging.WARNING, "graphopt"):
        store.add(OTHER, ENTRY, TENSORS)
        store.add(OTHER, ENTRY, TENSORS)
    assert len(found(store)) == 1
    assert found(store, OTHER) == []
    assert [record.message.split(":")[0] for record in caplog.records] == [
        f"Nothing is kept in the cache {store.folder}"
    ]
    assert {path.suffix for path in store.folder.iterdir()} == {".json", ".safetensors"}


def test_a_folder_of_others_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path / "cache")
    store.add(KEY, ENTRY, {})
    os.chmod(store.folder, 0o755)
    with caplog.at_level(logging.WARNING, "graphopt"):
        assert found(store) == []
        store.add(OTHER, ENTRY, {})
    assert len(list(store.folder.iterdir())) == 1
    assert "is open to others and not used. Make it yours alone (chmod 700)" in caplog.text


@pytest.mark.parametrize("mode", [0o644, 0o700])
def test_a_file_in_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    place = tmp_path / "cache"
    place.touch(mode=mode)
    monkeypatch.setenv("GRAPHOPT_CACHE", str(place))
    assert found(Store(place)) == []
    assert not Store(place).add(KEY, ENTRY, {})
    assert run(["cache"]) == run(["cache", "--clear"]) == 2
    (record,) = caplog.records
    assert record.message.startswith(f"The cache {place} is a file, not a folder, and not used. Name another folder")


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache", most=12_000)
    keys = [f"{index:064x}" for index in range(8)]
    for index, key in enumerate(keys):
        store.add(key, ENTRY, {"w": torch.full((500,), float(index))})
        for age, path in enumerate(sorted(store.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)):
            os.utime(path, ns=(10**9 * age, 10**9 * age))
        found(store, keys[0])
    assert store.usage()[1] <= 12_000
    assert [bool(found(store, key)) for key in (keys[0], keys[1], keys[-1])] == [True, False, True]
    store.add(OTHER, ENTRY, {"w": torch.zeros(1000)})  # more than a quarter of all
    assert found(store, OTHER) == []


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    assert Store.of_user() == Store(tmp_path)
    monkeypatch.setenv("GRAPHOPT_CACHE", "")
    assert Store.of_user() is None
    monkeypatch.delenv("GRAPHOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Store.of_user() == Store(tmp_path / "xdg" / "graphopt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store.of_user() == Store(tmp_path / ".cache" / "graphopt")
    monkeypatch.setenv("GRAPHOPT_CACHE", "~/mine")
    assert Store.of_user() == Store(tmp_path / "mine")


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    assert run(["cache"]) == 0
    assert "cache: 0 entries, 0.0 MB of at most 4,096 MB" in capsys.readouterr().out
    Store(tmp_path / "cache").add(KEY, ENTRY, TENSORS)
    (tmp_path / "cache" / "of the user.txt").write_text("stays")
    assert run(["cache"]) == 0
    assert "cache: 1 entries" in capsys.readouterr().out
    taken = f"{Store(tmp_path / 'cache').usage()[1] / 2**20:.1f} MB"
    assert run(["cache", "--clear"]) == 0
    assert capsys.readouterr().out.endswith(f"cache: 1 entries, {taken} removed\n")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["of the user.txt"]
    monkeypatch.setenv("GRAPHOPT_CACHE", "")
    assert run(["cache"]) == 0
    assert "nothing is kept" in capsys.readouterr().out


def test_clearing_what_cannot_be_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    store.add(KEY, ENTRY, {})

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "unlink", denied)
    with pytest.raises(UsageError, match=r"Could not clear the cache .*: Permission denied"):
        store.clear()


def test_odd_things_in_the_folder_stop_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    store = Store(tmp_path / "cache", most=12_000)
    store.add(KEY, ENTRY, TENSORS)
    link, gone, large, folder = (store.folder / f"{KEY}-{digit * 64}.json" for digit in "1234")
    link.symlink_to(link)
    gone.symlink_to(tmp_path / "nothing")
    large.symlink_to(tmp_path / "large")
    (tmp_path / "large").write_bytes(bytes(20_000))
    for path in (folder, store.folder / f"{KEY}-{OTHER}.safetensors"):
        path.mkdir()
        (path / "of the user.txt").write_text("stays")
    assert store.add(OTHER, ENTRY, {})
    assert store.usage()[0] == 5
    assert len(found(store)) == len(found(store, OTHER)) == 1
    link.symlink_to(link)
    assert run(["cache"]) == 0
    assert run(["cache", "--clear"]) == 0
    assert sorted(path.suffix for path in store.folder.iterdir()) == [".json", ".safetensors"]  # the two folders
    assert (tmp_path / "large").exists()


def test_a_folder_that_cannot_be_listed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    tmp_path.chmod(0o700)

    def denied(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    for command in (["cache"], ["cache", "--clear"]):
        assert run(command) == 2
        assert f"Could not read the cache {tmp_path}: Permission denied" in capsys.readouterr().err


def test_what_takes_the_place_of_another_may_have_its_tensors(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    store.add(OTHER, ENTRY, TENSORS)
    for step in (1, 2):
        store.add(KEY, CacheEntry(content={"step": step}), TENSORS, instead=True)
        ((entry, tensors),) = found(store)
        assert entry.content == {"step": step}
        assert tensors.keys() == TENSORS.keys()
    store.remove(KEY)
    assert found(store) == []
    assert found(store, OTHER)[0][1].keys() == TENSORS.keys()
    store.remove(OTHER)
    assert list(store.folder.iterdir()) == []


def test_what_is_more_than_is_read_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_MOST_OF_AN_ENTRY", 1000)
    store = Store(tmp_path / "cache")
    assert not store.add(KEY, CacheEntry(content={"text": "x" * 1000}), {})
    assert found(store) == []


def test_a_home_that_nobody_has(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", "~nobody_here/cache")
    assert Store.of_user() is None
    assert "Nothing is kept in the cache ~nobody_here/cache" in caplog.text
    assert run(["cache"]) == 0


def test_the_command_says_that_a_folder_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Store(tmp_path / "cache").add(KEY, ENTRY, TENSORS)
    (tmp_path / "cache").chmod(0o755)
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    for options in ([], ["--clear"]):
        assert run(["cache", *options]) == 2
        assert "open to others and not used" in capsys.readouterr().err
    assert len(list((tmp_path / "cache").iterdir())) == 2

"""Data files that lie, explode or never end: one sentence, and no more memory than an honest file would take."""

from __future__ import annotations

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphopt.data import InputSpec, Samples, numpy_files
from graphopt.errors import DataError
from graphopt.measure.evaluate import evaluator

X = np.arange(60.0, dtype=np.float32).reshape(10, 2, 3)
SPEC = InputSpec("x", (1, 2, 3))
MEGABYTE = 1 << 20


def npy(shape: object, descr: object = "<f4", *, order: object = False, version: int = 1, body: bytes = b"") -> bytes:
    """Return an `.npy` file whose header says so."""
    text = f"{{'descr': {descr!r}, 'fortran_order': {order!r}, 'shape': {shape!r}}}\n".encode()
    return header(text, version) + body


def header(text: bytes, version: int = 1) -> bytes:
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text


def bomb(path: Path, shape: tuple[int, ...]) -> int:
    """Write an `.npz` with zeros of this shape as `x`, packed 1 to 1000 without ever making them; return its size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = npy(shape)
    head = packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(MEGABYTE)) + packer.flush(zlib.Z_FULL_FLUSH)  # which may be repeated
    size = int(np.prod(shape, dtype=object)) * 4
    packed = head + block * (size // MEGABYTE) + packer.compress(bytes(size % MEGABYTE)) + packer.flush()
    sizes = struct.pack("<III", 0, len(packed), len(start) + size)
    local = b"PK\x03\x04" + struct.pack("<HHHHH", 20, 0, 8, 0, 0) + sizes + struct.pack("<HH", 5, 0) + b"x.npy"
    central = b"PK\x01\x02" + struct.pack("<HHHHHH", 20, 20, 0, 8, 0, 0) + sizes
    central += struct.pack("<HHHHHII", 5, 0, 0, 0, 0, 0, 0) + b"x.npy"
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local) + len(packed), 0)
    path.write_bytes(local + packed + central + end)
    return path.stat().st_size


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record how many bytes members are unpacked to at once."""
    sizes: list[int] = []
    real = numpy_files.NpzColumn._unpacked
    monkeypatch.setattr(
        numpy_files.NpzColumn, "_unpacked", lambda self, start, size: sizes.append(size) or real(self, start, size)
    )
    return sizes


# --- files that explode


def test_of_a_file_that_unpacks_to_gigabytes_only_samples_are_read(tmp_path: Path, unpacked: list[int]) -> None:
    count = 125_000_000
    assert bomb(tmp_path / "d.npz", (count, 2, 3)) < 4 * MEGABYTE
    samples = Samples.open(tmp_path / "d.npz", ["x"]).check([SPEC])
    assert samples.count == count
    assert torch.equal(samples.first(3)[0], torch.zeros(3, 2, 3))
    assert sum(len(batch[0]) for batch in samples.batches(50, 170)) == 170
    assert sum(len(batch[0]) for batch in samples.batches(50, 170)) == 170
    assert max(unpacked) <= 50 * SPEC.shape[1] * SPEC.shape[2] * 4


def test_samples_of_another_shape_are_refused_before_any_is_read(tmp_path: Path, unpacked: list[int]) -> None:
    bomb(tmp_path / "d.npz", (3, 100_000, 2500))
    with pytest.raises(DataError, match=r"takes Nx2x3 float32, but .* has Nx100000x2500 float32"):
        Samples.open(tmp_path / "d.npz", ["x"]).check([SPEC])
    assert unpacked == []


def test_samples_that_each_explode(tmp_path: Path, unpacked: list[int]) -> None:
    """Where nothing says what a sample looks like: a module is captured on its data, or an axis is dynamic."""
    bomb(tmp_path / "d.npz", (2, 250_000_000))
    samples = Samples.open(tmp_path / "d.npz", ["x"])
    with pytest.raises(
        DataError, match=r"2 samples of `x` of .* unpack to 2,000,000,000 bytes, all of it to [12],\d{3},\d{3} in"
    ):
        samples.first(2)
    assert unpacked == []


def test_members_are_read_piece_by_piece_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_files, "_KEPT_BYTES", 0)
    monkeypatch.setattr(numpy_files, "_KEPT_EXPANSION", 0)
    np.savez_compressed(tmp_path / "d.npz", x=X, y=X[::-1] * 2, one=np.float32(3))
    samples = Samples.open(tmp_path / "d.npz", ["x", "one", "y"])
    for size in (1, 3, 10, 99):
        for _ in range(2):
            batches = list(samples.batches(size))
            assert torch.equal(torch.cat([batch[0] for batch in batches]), torch.from_numpy(X))
            assert torch.equal(torch.cat([batch[2] for batch in batches]), torch.from_numpy(X[::-1] * 2))
            assert all(batch[1] == 3 for batch in batches)


def test_column_by_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=np.asfortranarray(X))
    np.save(tmp_path / "x.npy", np.asfortranarray(X))
    for name in ("d.npz", "x.npy"):
        assert torch.equal(Samples.open(tmp_path / name, ["x"]).first(10)[0], torch.from_numpy(X))
    monkeypatch.setattr(numpy_files, "_KEPT_BYTES", 0)
    monkeypatch.setattr(numpy_files, "_KEPT_EXPANSION", 0)
    with pytest.raises(DataError, match=r"stored column by column.*ascontiguousarray"):
        Samples.open(tmp_path / "d.npz", ["x"]).first(2)


# --- headers that lie

HEADERS: dict[str, bytes] = {
    "negative": npy((-3, 4)),
    "two negatives": npy((-3, -4), body=bytes(48)),
    "bool": npy((True, 6), body=bytes(24)),
    "float": npy((2.0, 3), body=bytes(24)),
    "text": npy(("2", 3), body=bytes(24)),
    "no tuple": npy([2, 3], body=bytes(24)),
    "huge": npy((10**15, 10**15)),
    "huge that wraps to little": npy((2**62, 4), body=bytes(24)),
    "many digits": npy(int("9" * 400)),
    "more than there is": npy((10**9,)),
    "many axes": npy((1,) * 65, body=bytes(4)),
    "samples without values": npy((10**18, 0)),
    "values without bytes": npy((10**18,), "V0"),
    "an array in each value": npy((2,), ("<f4", (3,)), body=bytes(24)),
    "an exploding type": npy((1,), ("<f8", (10**9, 10**9))),
    "objects": npy((1,), "|O", body=b"\x80\x04K\x01."),
    "objects in records": npy((1,), [("a", "|O")], body=b"\x80\x04K\x01."),
    "no order": npy((2, 3), order="x", body=bytes(24)),
    "no dictionary": header(b"[1, 2]\n"),
    "source": header(b"{'descr': __import__('os').mkdir('ran'), 'fortran_order': False, 'shape': ()}\n"),
    "nested": header(b"(" * 9000 + b")" * 900),
    "signs": header(b"-" * 9900 + b"1"),
    "deep": header(b"[" * 150 + b"]" * 150),
    "powers": header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (9**9**9,)}\n"),
    "longer than the file": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
    "long": header(b" " * 60_000 + b"{}"),
    "no text": header(bytes(range(128, 255))),
    "records in version 3": npy((2,), [("\u00e9", "<f4")], version=3, body=bytes(8)),
    "version 9": b"\x93NUMPY\x09\x00" + bytes(40),
    "the magic alone": b"\x93NUMPY",
    "complex": npy((2, 3j), body=bytes(24)),
}


@pytest.mark.parametrize("form", ["npy", "npz"])
@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie(case: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"d.{form}"
    path.write_bytes(HEADERS[case])
    if form == "npz":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.npy", HEADERS[case])
    with pytest.raises(DataError) as caught:
        Samples.open(path, ["x"]).first(2)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("version", [1, 2, 3])
def test_headers_of_every_version(version: int, tmp_path: Path) -> None:
    """The third differs in how names of fields are written, and numbers have none."""
    (tmp_path / "d.npy").write_bytes(npy((2, 3), version=version, body=np.arange(6, dtype="<f4").tobytes()))
    assert Samples.open(tmp_path / "d.npy", ["x"]).first(2)[0].tolist() == [[0, 1, 2], [3, 4, 5]]


def safetensors(shape: list[Any], offsets: list[Any], *, dtype: str = "F32", length: int | None = None) -> bytes:
    text = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(24)


@pytest.mark.parametrize(
    "content",
    [
        safetensors([2, 3], [0, 24], length=10**15),
        safetensors([2, 3], [0, 24], length=2**64 - 1),
        safetensors([2, 3], [0, 10**15]),
        safetensors([10**15, 3], [0, 24]),
        safetensors([2**62, 4], [0, 0]),
        safetensors([-2, -3], [0, 24]),
        safetensors([True, 6], [0, 24]),
        safetensors([10**18, 0], [0, 0]),
        safetensors([2, 3], [0, 24], dtype="OBJECT"),
        struct.pack("<Q", 5000) + b'{"a":' * 1000,
    ],
)
def test_safetensors_that_lie(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "d").write_bytes(content)
    with pytest.raises(DataError, match=r"/d`"):
        Samples.open(tmp_path / "d", ["x"]).first(2)


def rezipped(path: Path, change: Callable[[bytearray], object]) -> None:
    """Write an `.npz` and change its bytes."""
    np.savez_compressed(path, x=X)
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def _set(content: bytearray, at: int, form: str, value: int) -> None:
    struct.pack_into(form, content, content.index(b"PK\x01\x02") + at, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: _set(content, 24, "<I", 2**31),  # bytes unpacked
        lambda content: _set(content, 20, "<I", 2**31),  # bytes packed
        lambda content: _set(content, 10, "<H", 14),  # LZMA
        lambda content: _set(content, 8, "<H", 1),  # encrypted
        lambda content: _set(content, 42, "<I", 10**6),  # where it lies
        lambda content: content.__setitem__(slice(120, 124), bytes(4)),
        lambda content: content.__delitem__(slice(-30, None)),
    ],
)
def test_archives_that_lie(change: Callable[[bytearray], object], tmp_path: Path) -> None:
    rezipped(tmp_path / "d.npz", change)
    with pytest.raises(DataError, match=r"d\.npz`"):
        Samples.open(tmp_path / "d.npz", ["x"]).first(10)


def test_two_members_of_one_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", npy((2, 3), body=bytes(24)))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x.npy", npy((2, 3), body=bytes(24)))
    with pytest.raises(DataError, match="holds two arrays called `x`"):
        Samples.open(tmp_path / "d.npz", ["x"])


def test_names_hold_nothing_that_a_terminal_obeys(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("\x1b[2J.npy", npy((2, 3), body=bytes(24)))
    with pytest.raises(DataError, match=r"has `\\x1b\[2J`, but the model's inputs are `x`"):
        Samples.open(tmp_path / "d.npz", ["x"])


# --- what is no file

ODD: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "link to a fifo": lambda path: (os.mkfifo(path.with_suffix(".pipe")), path.symlink_to(path.with_suffix(".pipe"))),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
}
BROKEN: dict[str, Callable[[Path], object]] = {
    "broken link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path),
    "folder": Path.mkdir,
}


@pytest.mark.parametrize("opened", [lambda path: Samples.open(path, ["x"]), lambda path: evaluator(str(path), ["x"])])
@pytest.mark.parametrize("kind", [*ODD, *BROKEN])
def test_what_is_no_file(kind: str, opened: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "data" / "x.npy"
    path.parent.mkdir()
    {**ODD, **BROKEN}[kind](path)
    reason = "is no regular file|no data file|holds no|Cannot read"
    for place in (path, path.parent):
        with pytest.raises(DataError, match=reason):
            opened(place)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", f"{'d/' * 3000}x.npz"])
def test_names_that_no_file_has(name: str) -> None:
    with pytest.raises(DataError):
        Samples.open(name, ["x"])

"""Files: what is read is a regular file of a bounded size."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from graphopt.files import read_file


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

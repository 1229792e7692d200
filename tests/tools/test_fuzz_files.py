"""A few mutations of each kind of file, in this process; `tools/fuzz_files.py` does thousands in one of their own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tools.fuzz_files import examine
from tools.fuzz_kinds import NAMES, Kind, kinds

COUNT = {"module": 15, "program": 10, "manifest": 15}  # what takes long where it is read
FROM = 2  # any: these take little time


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return kinds(tmp_path_factory.mktemp("whole"), *NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_read_or_refused_in_one_sentence(
    name: str, made: dict[str, Kind], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made[name].path.parent)
    made[name].read(made[name].path)
    found = Counter[str]()
    for seed in range(FROM, FROM + COUNT.get(name, 20)):
        word, said = examine(name, made[name], seed)
        assert word in ("read", "refused"), f"{name} seed {seed}: {word}: {said}"
        found[word] += 1
    assert found["refused"] > found.total() / 4


def test_what_a_file_must_not_do_is_seen(tmp_path: Path) -> None:
    """A reader that raises is told from one that refuses."""

    def raises(path: Path) -> None:
        raise ZeroDivisionError(path.name)

    path = tmp_path / "x"
    subject = Kind(path, b"whole", lambda content, rng: rng.randbytes(5), raises)
    word, said = examine("kind", subject, 3)
    assert (word, said.partition(" at ")[0]) == ("traceback", "ZeroDivisionError: 'x'")
    assert path.read_bytes() == b"whole"

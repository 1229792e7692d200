"""Depfiles: Make and Ninja both find in them the files that results were made from, whatever these are called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from graphopt.cli.depfile import rules
from graphopt.errors import UsageError

MAKEFILE = """
out: first
\techo ran >> log
\ttouch out
-include out.d
"""
NINJA = """
rule build
  command = echo ran >> log; touch out
  depfile = out.d
build out: build first
"""
NAMES = (
    "plain.pt", "two words.pt", "a  b", " a", "C:model.pt", "a:b:c", "#1.pt", "a#b", "a# b", "$HOME", "$$", "a$", "a~",
    "model (1).pt", "(1)/b", "100%/a", "epoch=3-step=400.ckpt", "a,b", "@a", "+a", "{a}", "!a", "-a", "é", "b\udcffb",
    ".PHONY",
)  # fmt: skip
UNSAYABLE = (
    "a\nb", "a\tb", "a\\b", "a'b", 'a"b', "a;b", "a|b", "a&b", "a*", "a?", "a[1]", "a:", "a ", "model (1)", "`a`",
    "~root",
)  # fmt: skip


@pytest.mark.parametrize("tool", ["make", "ninja"])
def test_what_is_newer_or_gone_is_built_again(tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    monkeypatch.chdir(tmp_path)
    files = [Path("first"), *map(Path, NAMES)]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.touch()
        os.utime(file, (100, 100))
    Path("Makefile").write_text(MAKEFILE)
    Path("build.ninja").write_text(NINJA)
    Path("out.d").write_bytes(rules([Path("out")], files))

    def ran() -> int:
        """Build; return how often the command has run by then."""
        done = subprocess.run([tool], capture_output=True)
        assert done.returncode == 0, done
        return len(Path("log").read_text().splitlines())

    assert [ran(), ran()] == [1, 1]
    for count, file in enumerate(files, start=2):
        later = Path("out").stat().st_mtime + 10
        os.utime(file, (later, later))
        assert ran() == count, file
        os.utime(file, (100, 100))
    assert ran() == count
    for name in NAMES:
        if not {*"%="} & {*name}:  # Make says that there is no rule for it, which is no less true
            Path(name).unlink()
            count += 1
            assert ran() == count, name


@pytest.mark.parametrize("name", UNSAYABLE)
def test_a_name_that_one_of_them_would_misread_is_refused(name: str) -> None:
    for arguments in (([Path("out")], [Path("data"), Path(name)]), ([Path(name)], [])):
        with pytest.raises(UsageError, match="--depfile cannot name ") as caught:
            rules(*arguments)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lr=1/out.onnx", "100%/out.onnx"])
def test_a_result_that_make_would_take_for_something_else_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"--depfile cannot name '{name}'"):
        rules([Path(name)], [Path("model.pt")])

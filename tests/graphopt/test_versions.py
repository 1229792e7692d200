"""A torch or an ONNX Runtime outside the range is one sentence, and no torch is imported for it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from graphopt.caching import digests
from graphopt.errors import UsageError
from graphopt.job.manifest import library_versions
from graphopt.versions import RANGES, check_torch, check_version, version_of

_ROOT = Path(__file__).parents[2]


def test_pip_is_asked_for_the_same() -> None:
    settings = tomllib.loads((_ROOT / "pyproject.toml").read_text())
    written = {re.split("[>=]", line)[0]: line for line in settings["project"]["dependencies"]}
    for library, (first, end) in RANGES.items():
        assert written[library] == f"{library}>={first[0]}.{first[1]},<{end[0]}.{end[1]}"


@pytest.mark.parametrize("installed", ["2.11.0", "2.13.0+cpu", "2.14.0a0+git1234", "2.14.1"])
def test_inside(installed: str) -> None:
    check_version("torch", installed)


@pytest.mark.parametrize("installed", ["2.10.1", "1.13.0", "2.15.0.dev20261101+cpu", "3.0"])
def test_outside(installed: str) -> None:
    with pytest.raises(UsageError) as raised:
        check_version("torch", installed)
    assert str(raised.value) == (
        f"graphopt runs with torch from 2.11 to before 2.15, and {installed} is installed: "
        'run `pip install "torch>=2.11,<2.15"` in an environment of its own.'
    )


def test_none() -> None:
    with pytest.raises(UsageError, match=r"torch from 2\.11 to before 2\.15, and none is installed: run"):
        check_version("torch", None)


def test_a_library_of_another_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"onnxruntime-gpu": "1.25.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"onnxruntime": ["onnxruntime-gpu"]})
    assert version_of("onnxruntime-gpu") == "1.25.0"
    assert version_of("onnxruntime") == "1.25.0 (onnxruntime-gpu)"
    assert version_of("onnx") is None
    assert library_versions()["onnx"] == "not installed"
    found = digests.of_libraries.__wrapped__()
    installed["onnxruntime-gpu"] = "1.26.0"
    assert digests.of_libraries.__wrapped__() != found


def test_what_is_installed_here() -> None:
    check_torch.cache_clear()
    check_torch()


_SAID = "graphopt: graphopt runs with torch from 2.11 to before 2.15, and 2.10.0 is installed: run"
_ASKED = """
import sys, graphopt
try:
    graphopt.optimize
except graphopt.UsageError as err:
    print("graphopt:", err, file=sys.stderr)
from graphopt.cli.app import run
sys.exit("torch" in sys.modules or run({arguments!r}))
"""


@pytest.mark.parametrize(
    ("arguments", "code", "times"),
    [(["optimize", "model.pt"], 2, 2), (["optimize", "--help"], 0, 1), (["--help"], 0, 1)],
)
def test_the_first_need_of_torch(tmp_path: Path, arguments: list[str], code: int, times: int) -> None:
    """With what pip leaves of an old torch in front of the one that is there; help needs none."""
    (tmp_path / "torch-2.10.0.dist-info").mkdir()
    (tmp_path / "torch-2.10.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.10.0\n"
    )
    path = os.pathsep.join([str(tmp_path), str(_ROOT)])
    asked = [sys.executable, "-c", _ASKED.format(arguments=arguments)]
    done = subprocess.run(asked, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.count(_SAID) == times
    assert len(done.stderr.splitlines()) == times

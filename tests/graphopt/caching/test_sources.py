"""What a pass is made of: every file of the user's that it imports, in any way; nothing where that cannot be told."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import shutil
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

import graphopt
from graphopt.caching import digests, sources
from graphopt.caching.sources import sources_of
from graphopt.loading.python_files import import_file

ROOT = Path(__file__).parents[3]
OWN = [  # files of each of the three packages
    "graphopt/pipeline/runner.py",
    "passes/svd.py",
    "passes/pruning/ranking.py",
    "backends/onnx_backend.py",
    "backends/onnx_lowering/exporter.py",
]
NUMBERS = itertools.count()


@pytest.fixture(scope="module", params=["a checkout", "installed"])
def own(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home: Path = tmp_path_factory.mktemp("own")
    linked = request.param == "a checkout"
    for name in ("graphopt", "passes", "backends") if linked else ("graphopt",):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, home / name, symlinks=linked, ignore=ignored)
    assert (home / "graphopt" / "passes").is_symlink() == linked
    return home


@pytest.mark.parametrize("name", OWN)
def test_our_own_source_counts(own: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(package: str) -> ModuleSpec:
        spec = ModuleSpec(package, None, is_package=True)
        spec.submodule_search_locations = [str(own.joinpath(*package.split(".")))]
        return spec

    file = own / name if (own / name).exists() else own / "graphopt" / name
    before = file.read_bytes()
    monkeypatch.setattr(importlib.util, "find_spec", found)
    kept = digests.of_libraries.__wrapped__()
    file.write_bytes(b"raise RuntimeError\n" + before)
    assert digests.of_libraries.__wrapped__() != kept
    file.write_bytes(before)
    assert digests.of_libraries.__wrapped__() == kept


def test_our_own_source_here() -> None:
    assert {(ROOT / name).resolve() for name in OWN} <= set(digests.own_files())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of a plugin, in a process that is younger than its files and does not keep what it imports."""
    monkeypatch.setattr(graphopt, "IMPORTED", float("inf"))
    before, here = set(sys.modules), tmp_path / f"here{next(NUMBERS)}"
    here.mkdir()
    monkeypatch.chdir(here)
    yield tmp_path
    forget(before)


def forget(before: set[str]) -> None:
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def seen(plugin: Path, *more: str) -> dict[str, str] | None:
    """Return what another process finds."""
    before = set(sys.modules)
    found = sources_of([import_file(plugin).__name__, *more])
    forget(before)
    return found


FOLLOWED = {
    "itself": {"plugin.py": ""},
    "beside it": {"plugin.py": "import helper", "helper.py": ""},
    "from there": {"plugin.py": "from helper import x", "helper.py": "x = 1"},
    "all of it": {"plugin.py": "from helper import *", "helper.py": "x = 1"},
    "two steps away": {"plugin.py": "import near", "near.py": "import far", "far.py": ""},
    "in a function": {"plugin.py": "def plan():\n    import helper", "helper.py": ""},
    "far in a function": {"plugin.py": "import near", "near.py": "def f():\n    from far import x", "far.py": "x = 1"},
    "a circle": {"plugin.py": "import one", "one.py": "import two", "two.py": "import one"},
    "a package": {"plugin.py": "import own", "own/__init__.py": ""},
    "in a package": {"plugin.py": "from own import part", "own/__init__.py": "", "own/part.py": ""},
    "a package it is in": {"plugin.py": "import own.part", "own/part.py": "", "own/__init__.py": ""},
    "relative": {"plugin.py": "import own", "own/__init__.py": "from . import part", "own/part.py": ""},
    "relative, a name": {"plugin.py": "import own", "own/__init__.py": "from .part import x", "own/part.py": "x = 1"},
    "relative, upwards": {
        "plugin.py": "import own.deep.one",
        "own/__init__.py": "",
        "own/deep/__init__.py": "",
        "own/deep/one.py": "def f():\n    from ..part import x",
        "own/part.py": "",
    },
    "no package file": {"plugin.py": "from own.part import x", "own/part.py": "x = 1"},
    "relative, no package file": {"plugin.py": "import own.one", "own/one.py": "from . import part", "own/part.py": ""},
    "an attribute": {
        "plugin.py": "import own, other",
        "own/__init__.py": "",
        "other.py": "import own.part",
        "own/part.py": "",
    },
    "where it runs": {"plugin.py": "def plan():\n    import helper", "HERE/helper.py": ""},
    "a name of Python's": {"plugin.py": "import this", "this.py": ""},
    "an import that may fail": {"plugin.py": "try:\n    import helper\nexcept ImportError: pass", "helper.py": ""},
    "a function's": {"plugin.py": "", "HERE/losses.py": ""},
    "a function's import": {"plugin.py": "", "HERE/losses.py": "from near import x", "HERE/near.py": "x = 1"},
}


@pytest.mark.parametrize("kind", sorted(FOLLOWED))
def test_what_is_imported_counts(folder: Path, kind: str) -> None:
    files = {name.replace("HERE", Path.cwd().name): text for name, text in FOLLOWED[kind].items()}
    write(folder, files)
    before = seen(folder / "plugin.py", "losses")
    assert before is not None
    assert seen(folder / "plugin.py", "losses") == before
    changed = folder / list(files)[-1]  # what the others lead to
    changed.write_text(changed.read_text() + "\ny = 2\n")
    assert seen(folder / "plugin.py", "losses") != before
    (folder / "alone.py").write_text("")
    after = seen(folder / "plugin.py", "losses")
    (folder / "alone.py").write_text("z = 3")
    assert seen(folder / "plugin.py", "losses") == after


def test_a_link_to_a_folder_is_followed(folder: Path) -> None:
    write(folder, {"plugin.py": "import own.part", "elsewhere/__init__.py": "", "elsewhere/part.py": ""})
    (folder / "own").symlink_to("elsewhere")
    before = seen(folder / "plugin.py")
    (folder / "elsewhere" / "part.py").write_text("x = 1")
    assert seen(folder / "plugin.py") != before is not None


def test_what_was_not_there_and_is_now(folder: Path) -> None:
    write(folder, {"plugin.py": "def plan():\n    import helper"})
    before = seen(folder / "plugin.py")
    write(folder, {"helper.py": ""})
    assert seen(folder / "plugin.py") != before is not None


@pytest.mark.parametrize(
    "text",
    [
        "import importlib\ndef plan(): importlib.import_module('helper')",
        "from importlib import import_module as get\ndef plan(): get('helper')",
        "def plan(): __import__('helper')",
        "def plan(): exec(open('helper.py').read())",
        "def plan(): return eval('1')",
        "import runpy\ndef plan(): runpy.run_path('helper.py')",
        "import pkgutil\ndef plan(): pkgutil.resolve_name('helper:f')",
        "from pydoc import locate\ndef plan(): locate('helper.f')",
        "import pydoc as d\ndef plan(): d.locate('helper.f')",
        "import pydantic as p\nread = p.TypeAdapter(p.ImportString)",
        "from importlib import metadata\ndef plan(): metadata.entry_points(group='own')",
        "import sys\ndef plan(): sys.path.insert(0, 'libraries')",
        "from sys import path\ndef plan(): path.insert(0, 'libraries')",
        "import torch\ndef plan(): torch.ops.load_library('own.so')",
        "from torch.utils.cpp_extension import load\ndef plan(): load('own', ['own.cpp'])",
        "import helper\ndef plan(): helper.get('own')",
        "from own import *",
        "__path__ = ['own']",
    ],
)
def test_what_is_known_when_it_runs_is_not_followed(folder: Path, text: str) -> None:
    write(folder, {"plugin.py": text, "helper.py": "from importlib import import_module as get"})
    write(folder, {"own/__init__.py": "__all__ = ['part']", "own/part.py": ""})
    assert seen(folder / "plugin.py") is None


def test_a_compiled_module_is_not_followed(folder: Path) -> None:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    write(folder, {"plugin.py": "def plan(): import compiled", f"compiled{suffix}": ""})
    assert seen(folder / "plugin.py") is None


def test_what_runs_may_be_older_than_its_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, {"plugin.py": "import helper", "helper.py": ""})
    name = import_file(folder / "plugin.py").__name__
    assert sources_of([name]) is not None
    monkeypatch.setattr(graphopt, "IMPORTED", 0.0)
    assert sources_of([name]) is None
    (folder / "plugin.py").write_text("")  # is called after what it was when it was read
    assert sources_of([name]) is None
    assert sources_of([import_file(folder / "plugin.py").__name__]) is not None


@pytest.mark.parametrize(
    ("kind", "counts"), [("installed", False), ("a checkout", True), ("a link to a checkout", True), ("none", True)]
)
def test_what_is_installed_is_known_by_its_version(
    folder: Path, kind: str, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, name = folder / "home", f"installed{next(NUMBERS)}"
    monkeypatch.syspath_prepend(str(folder / "checkout"))
    monkeypatch.syspath_prepend(str(home))
    place = home if kind in ("installed", "none") else folder / "checkout"
    described = {"a checkout": folder / "checkout" / f"{name}.egg-info"}.get(kind, home / f"{name}-1.0.dist-info")
    metadata = described / ("PKG-INFO" if kind == "a checkout" else "METADATA")
    write(folder, {"plugin.py": f"import {name}.part", f"{place.name}/{name}/__init__.py": ""})
    write(folder, {f"{place.name}/{name}/part.py": ""})
    if kind != "none":
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        write(described, {metadata.name: text, "top_level.txt": name, "RECORD": ""})
    if kind == "a checkout":
        (described / "RECORD").unlink()
    monkeypatch.setattr(sources, "_distributions", importlib.metadata.packages_distributions)
    before = seen(folder / "plugin.py")
    (place / name / "part.py").write_text("x = 1")
    assert (seen(folder / "plugin.py") != before) == counts
    assert before is not None
    if kind == "installed":
        assert before[name] == "1.0"
        metadata.write_text(text.replace("1.0", "1.1"))
        sources._homes.cache_clear()
        assert seen(folder / "plugin.py") != before


def test_libraries_are_not_read(folder: Path) -> None:
    source = "import json, os.path, sys, torch.nn.functional as F\nfrom numpy import array\n"
    write(folder, {"plugin.py": f"{source}def plan(model): return model.eval(), sys.version, os.path"})
    found = seen(folder / "plugin.py")
    assert found is not None
    assert set(found) == {str((folder / "plugin.py").resolve()), "torch", "numpy"}

"""The house: who may import whom, what packaging ships, what importing graphopt costs."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "onnxruntime", "onnxsim", "onnx", "onnx_ir", "networkx", "numpy")


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@functools.cache
def _imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _sources(folder: str) -> list[Path]:
    skipped = {ROOT / "graphopt" / "passes", ROOT / "graphopt" / "backends"}
    return [f for f in sorted((ROOT / folder).rglob("*.py")) if not skipped.intersection(f.parents)]


@pytest.mark.parametrize(
    ("folder", "banned"),
    [
        ("graphopt", ("graphopt.passes", "graphopt.backends")),
        ("passes", ("graphopt.backends",)),
        ("backends", ("graphopt.passes",)),
    ],
)
def test_dependency_rule(folder: str, banned: tuple[str, ...]) -> None:
    found = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in _sources(folder)
        for name in _imports(file)
        if name.startswith(banned)
    ]
    assert found == []


def test_passes_share_through_layers_alone() -> None:
    folders = {file.parent.name for file in (ROOT / "passes").glob("*/__init__.py")} - {"layers"}
    owners: dict[str, set[str]] = {}  # by folder the pass that it is the folder of
    crossing = []
    for file in _sources("passes"):
        user, *deeper = file.relative_to(ROOT / "passes").with_suffix("").parts
        used = {name.split(".")[2] for name in _imports(file) if name.startswith("graphopt.passes.")}
        if deeper:
            crossing += [f"{user}/{deeper[-1]} imports {name}" for name in sorted(used - {user, "layers"})]
            continue
        crossing += [f"{user} imports {name}" for name in sorted(used - folders - {"layers"})]
        for name in used & folders:
            owners.setdefault(name, set()).add(user)
    assert crossing == []
    assert {folder: users for folder, users in owners.items() if len(users) > 1} == {}


def test_one_word_one_meaning() -> None:
    places: dict[str, list[str]] = {}
    for folder in ("graphopt", "passes", "backends"):
        for file in _sources(folder):
            for node in _tree(file).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places.setdefault(node.name, []).append(str(file.relative_to(ROOT)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


# A room imports from rooms on lower floors only; those of one floor do not know each other.
FLOORS = (
    ("cli",),
    ("job",),
    ("distillation",),
    ("statistics", "caching"),
    ("pipeline",),
    ("measure",),
    ("capturing",),
    ("data",),
    ("loading",),
    ("targets",),
    ("quantization", "axes"),
    ("ir",),
)
ALONE = (
    "__main__",
    "errors",
    "files",
    "testing",
    "versions",
)  # what lives in no room; `testing` is written in terms of all of them


def _core() -> dict[str, Path]:
    """Map the modules of graphopt itself to their files."""
    found = {}
    for file in _sources("graphopt"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def _edges() -> list[tuple[str, str]]:
    """List who imports whom inside graphopt, wherever in a file: in functions and for type checkers too."""
    core = _core()
    found = []
    for name, file in core.items():
        used = _imports(file) & core.keys()
        packages = {module.rpartition(".")[0] for module in used}  # `from package import module` is about the module
        found += [(name, module) for module in sorted(used) if module not in {name, *packages}]
    return found


def test_everything_lives_in_a_room() -> None:
    rooms = {room for floor in FLOORS for room in floor}
    tops = {name.split(".")[1] for name in _core() if "." in name}
    assert tops == rooms | set(ALONE)


def test_rooms_import_from_lower_floors_only() -> None:
    floor_of = {room: height for height, floor in enumerate(reversed(FLOORS)) for room in floor}
    upwards = []
    for user, used in _edges():
        above, below = (f"{name}.".split(".")[1] for name in (user, used))
        if above in floor_of and below in floor_of and above != below and floor_of[below] >= floor_of[above]:
            upwards.append(f"{user} imports {used}")
        if above in ("errors", "files", "versions") and below not in ("", "errors"):
            upwards.append(f"{user} imports {used}")
    assert upwards == []


def test_no_circle_of_imports() -> None:
    graph = nx.DiGraph(edge for edge in _edges() if "graphopt" not in edge)
    assert [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1] == []


# What of torch is private, or said to be experimental. Of `torch.ops` any name is an operator's.
_PRIVATE = re.compile(r"torch\.(?!ops\.)([a-z]\w*\.)*(_(?!_)\w+|experimental)")
_PRIVATE_ATTRIBUTES = {"_codegen", "_compiled_call_impl", "_in_spec", "_orig_mod", "_out_spec"}
_DOOR = "graphopt/ir/torch_internals.py"
_NAMES_OF_FILES = "graphopt/loading/"  # what files of torch call their operators, as text


def _chain(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_chain(node.value)}.{node.attr}"
    return {"fx": "torch.fx"}.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _private_torch(file: Path) -> set[str]:
    tree = _tree(file)
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    named = _imports(file) | {_chain(node) for node in attributes} | {node.attr for node in attributes}
    if not file.is_relative_to(ROOT / _NAMES_OF_FILES):
        named |= {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return {name for name in named if _PRIVATE.match(name) or name in _PRIVATE_ATTRIBUTES}


@pytest.mark.parametrize("folder", ["graphopt", "passes", "backends"])
def test_one_door_to_what_torch_keeps_private(folder: str) -> None:
    files = {str(file.relative_to(ROOT)): file for file in _sources(folder)}
    found = {name: private for name, file in files.items() if (private := _private_torch(file)) and name != _DOOR}
    assert found == {}
    assert folder != "graphopt" or {"torch._guards", "torch.utils._pytree"} <= _private_torch(files[_DOOR])


@pytest.mark.parametrize("folder", ["graphopt", "passes", "backends", "tests", "tools"])
def test_no_second_copy_of_a_package(folder: str) -> None:
    found = [
        str(file.relative_to(ROOT))
        for file in _sources(folder)
        for name in _imports(file)
        if name.split(".")[0] in ("passes", "backends")
    ]
    assert found == []


def test_every_package_is_shipped() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = set()
    for folder, name in (("graphopt", "graphopt"), ("passes", "graphopt.passes"), ("backends", "graphopt.backends")):
        for init in (ROOT / folder).rglob("__init__.py"):
            if folder == "graphopt" and init.relative_to(ROOT).parts[1] in ("passes", "backends"):
                continue
            on_disk.add(".".join([name, *init.parent.relative_to(ROOT / folder).parts]))
    assert set(settings["packages"]) == on_disk
    data = {
        str(file.relative_to(ROOT))
        for folder, globs in settings["package-data"].items()
        for pattern in globs
        for file in (ROOT / settings["package-dir"].get(folder, folder.replace(".", "/"))).glob(pattern)
    }
    on_disk = {file for name in ("passes", "backends") for file in ROOT.glob(f"{name}/**/*.json")}
    on_disk |= set(ROOT.glob("graphopt/*/**/*.toml"))
    assert data == {str(file.relative_to(ROOT)) for file in on_disk}


@pytest.mark.parametrize("statement", ["import graphopt", "from graphopt.cli.app import run; run(['--help'])"])
def test_importing_is_cheap(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_public_names_resolve() -> None:
    import graphopt

    for name in graphopt.__all__:
        found = getattr(graphopt, name)
        assert callable(found)
        assert found.__module__.startswith("graphopt.")

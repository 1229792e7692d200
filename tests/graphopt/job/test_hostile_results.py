"""Manifests, plans and reports that were made to harm: refused before anything is imported, run or written."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graphopt
from graphopt.cli.app import run
from graphopt.errors import GraphOptError, LoadError, PassError, UsageError, VerifyError
from graphopt.files import sha256
from graphopt.job.replaying import replay
from graphopt.pipeline.registry import PassRegistry
from tests.graphopt.toy_passes import Random

REGISTRY = PassRegistry([Random])


@pytest.fixture(scope="module")
def result() -> graphopt.Result:
    torch.manual_seed(0)
    program = graphopt.capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (torch.randn(2, 4),))
    return graphopt.optimize(program, None, [Random], plugins=[Random], bench=False)


@pytest.fixture(scope="module")
def saved(result: graphopt.Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    result.save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "build"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    change(data)
    (folder / "manifest.json").write_text(json.dumps(data))


@pytest.mark.parametrize("name", ["os:system", "antigravity", "graphopt.passes.prune:Prune", "", "__class__", "../x"])
def test_a_pass_is_looked_up_and_never_imported(name: str, folder: Path, result: graphopt.Result) -> None:
    edit(folder, lambda data: data["plans"][0].update(pass_name=name))
    reads = (lambda: graphopt.open(folder, plugins=[Random]), lambda: replay(original(result), folder / MANIFEST))
    importlib.import_module("graphopt.job.opening")
    before = set(sys.modules)
    for read in reads:
        with pytest.raises(UsageError, match="There is no pass"):
            read()
    assert set(sys.modules) == before


def test_a_backend_is_looked_up_and_never_imported(folder: Path) -> None:
    for field in ("artifacts", "programs"):
        edit(folder, lambda data, field=field: data[field].update(antigravity=data[field]["onnxruntime"]))  # type: ignore[misc]
    with pytest.raises(UsageError, match="There is no target `antigravity`"):
        graphopt.open(folder, plugins=[Random])
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(programs={"x/../../ESCAPED": "program.pt2"}),
        lambda data: data.update(programs={"../ESCAPED": "program.pt2", "onnxruntime": "program.pt2"}),
        lambda data: data["plans"][0].update(target="/ESCAPED"),
        lambda data: data["sha256"].update({"plans.safetensors": "0" * 64}),
        lambda data: data["plans"][0].update(pass_name="no_such_pass"),
        lambda data: data["programs"].update(no_such_target="program.pt2"),
    ],
)
def test_nothing_is_written_of_what_is_refused(
    change: Callable[[dict[str, Any]], object],
    folder: Path,
    result: graphopt.Result,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original(result).save(folder / "model.pt2")
    edit(folder, change)
    plugin = folder / "plugin.py"
    plugin.write_text("import tests.graphopt.toy_passes as toys\nclass Random(toys.Random):\n    '''The same.'''\n")
    before = {path for path in folder.parent.rglob("*") if "__pycache__" not in str(path)}
    words = ["apply", folder / "model.pt2", folder / MANIFEST, "-o", folder.parent / "out", "--plugin", plugin]
    assert run([str(word) for word in words]) in (2, 3)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "This is a bug" not in said
    after = {path for path in folder.parent.rglob("*") if "__pycache__" not in str(path)}
    assert after - before <= {folder.parent / "out"}


MANIFEST = "manifest.json"


def original(result: graphopt.Result) -> graphopt.Program:
    assert result.original is not None
    return result.original


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.half(),
        lambda tensor: tensor.double(),
        lambda tensor: tensor.to(torch.complex64),
        lambda tensor: (tensor * 9).to(torch.int8),
        lambda tensor: tensor > 0,
        lambda tensor: tensor[:1],
        lambda tensor: tensor.T.contiguous(),
        lambda tensor: tensor.sum(),
        lambda tensor: tensor[:0],
        lambda tensor: tensor * float("nan"),
        lambda tensor: None,
    ],
)
def test_a_payload_that_the_plan_does_not_expect(
    change: Callable[[torch.Tensor], torch.Tensor | None], folder: Path, result: graphopt.Result
) -> None:
    tensors = {name: change(tensor) for name, tensor in load_file(folder / "plans.safetensors").items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "plans.safetensors")
    edit(folder, lambda data: data["sha256"].update({"plans.safetensors": sha256(folder / "plans.safetensors")}))
    with pytest.raises((PassError, VerifyError)) as caught:
        replay(original(result), folder / MANIFEST, REGISTRY)
    assert "`random`" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
def test_a_payload_that_torch_would_read_beyond(name: str, tmp_path: Path) -> None:
    program = graphopt.capture(nn.LSTM(8, 8, batch_first=True).eval(), (torch.randn(2, 5, 8),))
    graphopt.optimize(program, None, [Random], plugins=[Random], lower=False).save(tmp_path)
    tensors = load_file(tmp_path / "plans.safetensors")
    replay(program, tmp_path / MANIFEST, REGISTRY)
    save_file({**tensors, f"0/{name}": torch.ones(1, 1)}, tmp_path / "plans.safetensors")
    edit(tmp_path, lambda data: data["sha256"].update({"plans.safetensors": sha256(tmp_path / "plans.safetensors")}))
    with pytest.raises(PassError, match=r"plan of `random` does not fit the model\. The model calls `lstm` with w"):
        replay(program, tmp_path / MANIFEST, REGISTRY)


@pytest.mark.parametrize("sites", [["no such place"], ["0.bias", "0"], ["__class__"], [""], ["0.weight"] * 3])
def test_a_plan_of_places_that_are_not_there(sites: list[str], folder: Path, result: graphopt.Result) -> None:
    edit(folder, lambda data: data["plans"][0].update(sites=sites))
    if sites == ["0.weight"] * 3:
        replay(original(result), folder / MANIFEST, REGISTRY)
        return
    with pytest.raises(GraphOptError, match=r"`random`"):
        replay(original(result), folder / MANIFEST, REGISTRY)


@pytest.mark.parametrize("depth", [100, 480, 900, 2000])
@pytest.mark.parametrize("field", ["measured", "options"])
def test_a_plan_of_any_depth(field: str, depth: int, folder: Path, result: graphopt.Result) -> None:
    text = (
        (folder / MANIFEST)
        .read_text()
        .replace(f'"{field}": {{}}', f'"{field}": {{"x": {"[" * depth}{"]" * depth}}}', 1)
    )
    assert "[[[" in text
    (folder / MANIFEST).write_text(text)
    with contextlib.suppress(GraphOptError):
        replay(original(result), folder / MANIFEST, REGISTRY)
    with contextlib.suppress(GraphOptError):
        graphopt.open(folder, plugins=[Random])


@pytest.mark.parametrize("field", ["session_options", "facts"])
def test_facts_of_any_depth(field: str, folder: Path) -> None:
    """Said at once: as a union of sequences, tried again at every depth, 480 of them took six seconds."""
    nested: list[object] = []
    for _ in range(480):
        nested = [nested]
    edit(folder, lambda data: data["artifacts"]["onnxruntime"][field].update(x=nested))
    with pytest.raises(UsageError, match="maximum validation depth exceeded"):
        graphopt.open(folder, plugins=[Random])


def test_session_options_out_of_bounds(folder: Path) -> None:
    edit(folder, lambda data: data["artifacts"]["onnxruntime"]["session_options"].update(threads=10**6))
    opened = graphopt.open(folder, plugins=[Random])
    for use in (opened.artifact.session, lambda: opened.save(folder / "again")):
        with pytest.raises(UsageError, match="Session option `threads` cannot be 1000000"):
            use()


@pytest.mark.parametrize("name", ["onnxruntime.onnx", "program.pt2"])
def test_a_file_without_a_digest_is_not_opened(name: str, folder: Path) -> None:
    edit(folder, lambda data: data["sha256"].pop(name))
    with pytest.raises(LoadError, match=re.escape(name)):
        graphopt.open(folder, plugins=[Random])


@pytest.mark.parametrize("programs", [{}, {"other": "program.pt2"}, {"": "program.pt2"}])
def test_an_artifact_without_its_program(programs: dict[str, str], folder: Path) -> None:
    edit(folder, lambda data: data.update(programs=programs))
    with pytest.raises(UsageError, match="`artifacts`: the program that was lowered for `onnxruntime` is not named"):
        graphopt.open(folder, plugins=[Random])


@pytest.mark.parametrize("name", ["manifest.json", "report.json"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_what_is_no_file(make: Callable[[Path], object], name: str, folder: Path) -> None:
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(UsageError, match=f"{name} is not a .*: (it is a .*, not a regular file|Is a directory)"):
        graphopt.open(folder, plugins=[Random])

"""What `save` wrote opens again and replays, on a machine that has nothing else; what was changed since is refused."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import graphopt
from graphopt import files
from graphopt.backends.onnx_lowering.artifacts import files_of
from graphopt.capturing.load import _with_signature
from graphopt.cli.app import run
from graphopt.errors import LoadError, LoweringError, UsageError
from graphopt.ir.invariants import check_invariants
from graphopt.job.report import Report, Row
from graphopt.measure.equivalence import Equivalence
from graphopt.testing import fingerprint
from tests.models import GroupedQuery, Residual, example

X = example(Residual, 32).float()
PASSES = "prune:ratio=0.4:round_to=1,int8"


@pytest.fixture(scope="module")
def result() -> graphopt.Result:
    torch.manual_seed(0)
    return graphopt.optimize(Residual().eval(), X, PASSES, ["onnxruntime", "tensorrt"], bench=False)


@pytest.fixture(scope="module")
def linear() -> graphopt.Result:
    return graphopt.optimize(nn.Linear(4, 3).eval(), torch.randn(8, 4), "", bench=False)


@pytest.fixture(scope="module")
def folder(result: graphopt.Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    pickle.loads(pickle.dumps(result)).save(folder)
    return folder


def outputs(artifact: graphopt.Artifact) -> np.ndarray:
    return artifact.session()(X.numpy())[0]


def test_a_saved_result_opens_again(result: graphopt.Result, folder: Path) -> None:
    found = graphopt.open(folder)
    assert found.original is None
    assert list(found.programs) == ["onnxruntime", "tensorrt"]
    assert [plan.to_json() for plan in found.plans] == [plan.to_json() for plan in result.plans]
    assert found.report.to_json() == json.loads((folder / "report.json").read_text())
    for target, artifact in found.artifacts.items():
        np.testing.assert_array_equal(
            artifact.session()(X.numpy())[0], result.artifacts[target].session()(X.numpy())[0]
        )
        assert artifact.session_options == result.artifacts[target].session_options
        assert artifact.facts == result.artifacts[target].facts
        torch.testing.assert_close(found.programs[target](X), result.programs[target](X), rtol=0, atol=0)


def test_an_opened_result_saves_again_as_it_is(folder: Path, tmp_path: Path) -> None:
    graphopt.open(folder).save(tmp_path / "again")
    for path in sorted(folder.iterdir()):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    graphopt.open(tmp_path / "again").save(tmp_path / "again")


def test_an_opened_program_goes_on(folder: Path) -> None:
    program = graphopt.open(folder).programs["onnxruntime"]
    assert graphopt.optimize(program, X, "", bench=False).artifact.session()(X.numpy())[0].shape == (32, 5)


@pytest.mark.parametrize("name", ["onnxruntime.onnx", "program.tensorrt.pt2", "plans.safetensors", "run.tensorrt.py"])
@pytest.mark.parametrize("change", ["changed", "missing"])
def test_a_file_that_is_not_what_was_saved_is_refused(folder: Path, tmp_path: Path, name: str, change: str) -> None:
    there = Path(shutil.copytree(folder, tmp_path / "copy"))
    if change == "missing":
        (there / name).unlink()
    else:
        content = bytearray((there / name).read_bytes())
        content[len(content) // 2] ^= 1
        (there / name).write_bytes(content)
    with pytest.raises(LoadError, match=f"{name} is {'missing' if change == 'missing' else 'not the file'}"):
        graphopt.open(there)


def test_whoever_reads_a_file_of_a_result_looks_at_its_digest(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alone it is read as any other: nothing says then what it should be."""
    there = Path(shutil.copytree(folder, tmp_path / "copy"))
    model, artifact = there / "program.tensorrt.pt2", there / "onnxruntime.onnx"
    for file in (model, artifact):
        file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(LoadError, match=r"program.tensorrt.pt2 is not the file that manifest.json beside it"):
        graphopt.load(model)
    for command in (["verify", artifact, artifact], ["bench", artifact], ["inspect", model], ["optimize", model]):
        assert run([str(word) for word in command]) == 3
        assert "is not the file that manifest.json beside it was written with" in capsys.readouterr().err
    (there / "manifest.json").unlink()
    files.check_against_manifest(artifact)


def test_replay_checks_what_the_plans_carry(folder: Path, result: graphopt.Result, tmp_path: Path) -> None:
    there = Path(shutil.copytree(folder, tmp_path / "copy"))
    content = bytearray((there / "plans.safetensors").read_bytes())
    content[-1] ^= 1
    (there / "plans.safetensors").write_bytes(content)
    assert result.original is not None
    with pytest.raises(LoadError, match=r"plans.safetensors is not the file"):
        graphopt.replay(result.original, there / "manifest.json")


def test_other_library_versions_are_said(
    folder: Path, result: graphopt.Result, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there = Path(shutil.copytree(folder, tmp_path / "copy"))
    data = json.loads((there / "manifest.json").read_text())
    data["libraries"]["torch"] = "1.0"
    (there / "manifest.json").write_text(json.dumps(data))
    assert result.original is not None
    graphopt.replay(result.original, there / "manifest.json")
    assert "torch 1.0, here" in caplog.text


def test_another_processor_is_said(
    folder: Path, result: graphopt.Result, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    graphopt.open(folder)
    assert "a processor with" not in caplog.text
    there = Path(shutil.copytree(folder, tmp_path / "copy"))
    data = json.loads((there / "manifest.json").read_text())
    data["cpu"] = ["aarch64", "asimddp"]
    (there / "manifest.json").write_text(json.dumps(data))
    said = "made on a processor with aarch64, asimddp; this one has"
    graphopt.open(there)
    assert f"{there} was {said}" in caplog.text
    assert result.original is not None
    graphopt.replay(result.original, there / "manifest.json")
    assert f"The plans were {said}" in caplog.text


@pytest.mark.parametrize("target", [None, "onnxruntime", ["onnxruntime", "tensorrt"]])
@pytest.mark.parametrize("passes", ["", "prune:ratio=0.4:round_to=1", PASSES])
def test_replay_makes_what_optimize_made(result: graphopt.Result, tmp_path: Path, target: Any, passes: str) -> None:
    """Without a target too: `int8` decided for one then, and what it made is not dropped."""
    assert result.original is not None
    other = copy.deepcopy(result.original)  # without passes, what was made is the original itself
    found = graphopt.optimize(result.original, X, passes, target, lower=False)
    found.save(tmp_path)
    again = graphopt.replay(other, tmp_path / "manifest.json")
    assert {name: fingerprint(program) for name, program in again.items()} == {
        name: fingerprint(program) for name, program in found.programs.items()
    }
    assert list(graphopt.open(tmp_path).programs) == list(found.programs)


def test_an_artifact_keeps_its_files_alive() -> None:
    artifact = graphopt.optimize(nn.Linear(4, 3).eval(), torch.randn(8, 4), "", bench=False).artifact
    gc.collect()
    assert artifact.session()(np.zeros((2, 4), np.float32))[0].shape == (2, 3)
    path = artifact.path
    del artifact
    gc.collect()
    assert not path.exists()


def test_a_pickled_result_takes_its_files_along(result: graphopt.Result, tmp_path: Path) -> None:
    other = pickle.loads(pickle.dumps(result))
    for target, artifact in other.artifacts.items():
        assert artifact.path != result.artifacts[target].path
        np.testing.assert_array_equal(
            artifact.session()(X.numpy())[0], result.artifacts[target].session()(X.numpy())[0]
        )
    other.save(tmp_path / "build")
    assert graphopt.open(tmp_path / "build").plans[0].sites == result.plans[0].sites


@pytest.mark.parametrize("kind", [Residual, GroupedQuery])
def test_a_pickled_program_is_whole(kind: type[nn.Module]) -> None:
    """Pickle alone keeps a graph that runs and has no shapes, which no pass can work on."""
    x = example(kind, 16)
    x = x.float() if x.is_floating_point() else x
    program = graphopt.capture(kind().eval(), x[:2])
    for other in (pickle.loads(pickle.dumps(program)), copy.deepcopy(program)):
        torch.testing.assert_close(other(x), program(x), rtol=0, atol=0)
        assert (other.inputs, other.outputs) == (program.inputs, program.outputs)
        check_invariants(other, other, "pickle")
        graphopt.optimize(other, x, "prune:ratio=0.4:round_to=1", None)


def _edit(change: Callable[[dict[str, Any]], None], folder: Path, tmp_path: Path) -> Path:
    there = Path(shutil.copytree(folder, tmp_path / "copy"))
    data = json.loads((there / "manifest.json").read_text())
    change(data)
    (there / "manifest.json").write_text(json.dumps(data))
    return there


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(schema=7), "has manifest schema 7; this version reads 2"),
        (lambda d: d.pop("schema"), "has no schema"),
        (lambda d: d.pop("seed"), "`seed`: field required"),
        (lambda d: d.update(seed="1"), "`seed`: input should be a valid integer"),
        (lambda d: d.update(extra=1), "`extra`: a field it does not know"),
        (lambda d: d["programs"].update(x="../escaped.pt2"), "`programs.x`"),
        (lambda d: d["programs"].update(x="/etc/passwd"), "`programs.x`"),
        (lambda d: d["programs"].update({"x/../../escaped": "program.pt2"}), "`programs.x/../../escaped.[key]`"),
        (lambda d: d["plans"][0].update(target="../x"), "`plans.0.target`"),
        (lambda d: d["artifacts"]["tensorrt"].update(file="a/b.onnx"), "`artifacts.tensorrt.file`"),
        (lambda d: d["sha256"].update({"a": "b"}), "`sha256.a`"),
        (lambda d: d["sha256"].update({"x" * 256: "0" * 64}), "`sha256.xxx"),
        (lambda d: d.update(schema=True), "has manifest schema True"),
        (lambda d: d.update(schema=1), "has manifest schema 1;"),
        (lambda d: d.update(sha256=None), "`sha256`"),
        (lambda d: d.update(plans=3), "`plans`"),
        (lambda d: d.update(artifacts=[]), "`artifacts`"),
        (lambda d: d["plans"].insert(0, 3), "`plans.0`"),
        (lambda d: d.update(original="x"), "`original`"),
    ],
)
def test_a_damaged_manifest_is_one_sentence(
    change: Callable[[dict[str, Any]], None], said: str, folder: Path, tmp_path: Path
) -> None:
    there = _edit(change, folder, tmp_path)
    with pytest.raises(UsageError) as caught:
        graphopt.open(there)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "3", '"x"', "null", "{", "[" * 100_000, "\x00\xff"])
@pytest.mark.parametrize("name", ["manifest.json", "report.json"])
def test_what_is_no_json_is_one_sentence(name: str, content: str, folder: Path, tmp_path: Path) -> None:
    there = Path(shutil.copytree(folder, tmp_path / "copy"))
    (there / name).write_text(content)
    with pytest.raises(UsageError, match=f"{name} is not a"):
        graphopt.open(there)


def test_the_report_that_is_missing_is_a_missing_file_like_any_other(folder: Path, tmp_path: Path) -> None:
    there = Path(shutil.copytree(folder, tmp_path / "copy"))
    (there / "report.json").unlink()
    with pytest.raises(LoadError, match=r"report\.json is missing\. Optimise again, or copy the whole directory"):
        graphopt.open(there)


@pytest.mark.parametrize("name", ["manifest.json", "report.json"])
def test_a_file_in_place_of_its_directory(name: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=rf"{name} is a file\. Give the directory .*: {folder}"):
        graphopt.open(folder / name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 99}, "has schema 99, this version reads 1"),
        ({"rows": []}, "has no row of the original"),
        ({"rows": [{"label": 3}]}, "`rows.0.label`: input should be a valid string"),
    ],
)
def test_a_report_of_another_form_is_refused(change: dict[str, Any], said: str, folder: Path, tmp_path: Path) -> None:
    there = Path(shutil.copytree(folder, tmp_path / "copy"))
    data = json.loads((there / "report.json").read_text())
    (there / "report.json").write_text(json.dumps({**data, **change}))
    with pytest.raises(UsageError, match=said):
        graphopt.open(there)


@pytest.mark.parametrize("error", [(0.0, 0.0, math.inf), (math.inf, math.inf, -math.inf), (0.5, 0.1, 20.0)])
def test_a_report_reads_infinities_as_what_they_were(error: tuple[float, float, float]) -> None:
    row = Row("fold", error=Equivalence(*error, None))
    report = Report("m", "p", rows=[row], baselines={"t": row}, facts={"t": {"sqnr": None}})
    again = Report.from_json(json.loads(json.dumps(report.to_json())))
    assert again.rows == [row]
    assert again.baselines == {"t": row}
    assert again.facts == {"t": {"sqnr": None}}


def test_a_result_whose_file_is_gone_says_so(linear: graphopt.Result, tmp_path: Path) -> None:
    found = pickle.loads(pickle.dumps(linear))  # with a file of its own
    found.artifact.path.unlink()
    with pytest.raises(LoadError, match=r"onnxruntime.onnx, which belongs to this result, is gone"):
        found.save(tmp_path / "build")
    assert not (tmp_path / "build").exists()


def test_a_program_trained_after_it_was_lowered_is_not_saved_beside_its_artifact(tmp_path: Path) -> None:
    result = graphopt.optimize(nn.Linear(4, 2), torch.randn(8, 4), passes="", bench=False)
    result.save(tmp_path / "before")
    opened = graphopt.open(tmp_path / "before")
    for made in (result, opened):
        with torch.no_grad():
            next(made.program.parameters()).add_(1.0)
        with pytest.raises(UsageError, match="changed after it was lowered"):
            made.save(tmp_path / "after")
        with pytest.raises(UsageError, match="changed after it was lowered"):
            pickle.dumps(made)
    assert not (tmp_path / "after").exists()
    again = graphopt.optimize(result.program, torch.randn(8, 4), passes="", bench=False)
    again.save(tmp_path / "after")


def test_copies_of_values_cost_nothing(result: graphopt.Result) -> None:
    assert copy.copy(result.artifact) is copy.deepcopy(result.artifact) is result.artifact
    twin = copy.copy(result.program)
    assert twin.graph_module is not result.program.graph_module
    assert all(one is other for one, other in zip(twin.parameters(), result.program.parameters(), strict=True))


def test_a_directory_without_results_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"There is no .*manifest.json: the run that wrote there was interrupted"):
        graphopt.open(tmp_path)


def test_names_of_a_file_reach_no_code(linear: graphopt.Result, tmp_path: Path) -> None:
    """An input of an ONNX file may be called anything; what is written for people to run must not run it."""
    marker = tmp_path / "ran"
    evil = f'x"""\nimport pathlib; pathlib.Path({str(marker)!r}).touch()\n"""'
    artifact = linear.artifact
    spec = dataclasses.replace(artifact.inputs[0], name=evil)
    script = artifact.backend.run_script(dataclasses.replace(artifact, inputs=(spec,)))
    (tmp_path / "run.py").write_text(script)
    subprocess.run([sys.executable, "run.py"], cwd=tmp_path, capture_output=True, check=False)
    assert not marker.exists()


@pytest.mark.parametrize("change", [{"name": 'x"""'}, {"shape": ["a\nb", 4]}])
def test_a_saved_signature_holds_names_only(tmp_path: Path, change: dict[str, Any]) -> None:
    program = graphopt.capture(nn.Linear(4, 3).eval(), (torch.randn(2, 4),))
    signature = program._signature()
    signature["inputs"][0].update(change)
    with pytest.raises(LoadError, match="is no name"):
        _with_signature(program, json.dumps(signature), "file.pt2")


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ([[math.inf, None], [0, None]], "is no range of sizes"),
        ([[1 << 21, None], [0, None]], "is no range of sizes"),
        ([[4, 8]], "has 1 ranges of sizes for 2 axes"),
    ],
)
def test_ranges_of_a_file(ranges: list[Any], said: str) -> None:
    program = graphopt.capture(nn.Linear(4, 3).eval(), (torch.randn(2, 4),))
    signature = program._signature()
    signature["inputs"][0]["ranges"] = ranges
    with pytest.raises(LoadError, match=said):
        _with_signature(program, json.dumps(signature), "file.pt2")


def test_sizes_of_a_file_that_no_call_has() -> None:
    program = graphopt.capture(nn.Bilinear(4, 3, 2).eval(), (torch.randn(2, 4), torch.randn(2, 3)))
    signature = program._signature()
    for stored, ends in zip(signature["inputs"], ([4, None], [0, 3]), strict=True):
        stored["ranges"] = [ends, [0, None]]
    with pytest.raises(LoadError, match="No call has sizes of at most 1048576 that all inputs may have"):
        _with_signature(program, json.dumps(signature), "file.pt2")


@pytest.mark.parametrize(
    "sizes",
    [
        *(("n", name) for name in ("3*n", "n+n+n", "5-n", "n//7", f"{10**30}*n", "1000000-n")),
        (f"{10**20}-n", "2*n"),
        (f"{10**20}-n", "m"),
        ("n+9", "m"),
    ],
)
def test_sizes_of_a_file_that_its_example_does_not_have(sizes: tuple[str, str]) -> None:
    program = graphopt.capture(nn.Bilinear(4, 3, 2).eval(), (torch.randn(2, 4), torch.randn(2, 3)))
    signature = program._signature()
    for stored, size in zip(signature["inputs"], sizes, strict=True):
        stored["shape"][0] = size
    with pytest.raises(LoadError, match=r"in its example inputs\)\. Save the program again"):
        _with_signature(program, json.dumps(signature), "file.pt2")


@pytest.mark.parametrize("name", ["n//2", "n*n", "100-n", "2*n//2"])
def test_sizes_of_a_file_that_torch_has_no_word_for(name: str, tmp_path: Path) -> None:
    program = graphopt.capture(nn.Linear(4, 3).eval(), (torch.randn(2, 4),))
    signature = program._signature()
    signature["inputs"][0]["shape"] = [name, 4]
    _with_signature(program, json.dumps(signature), "file.pt2").export()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{",
        "3",
        '{"schema": 1, "inputs": 3}',
        '{"schema": 1, "inputs": [], "outputs": []}',
        '{"inputs": []}',
    ],
)
def test_a_signature_of_another_form(text: str) -> None:
    program = graphopt.capture(nn.Linear(4, 3).eval(), (torch.randn(2, 4),))
    with pytest.raises(LoadError, match="does not agree with the signature stored in it"):
        _with_signature(program, text, "file.pt2")


def test_notes_of_a_file_hold_nothing_that_a_terminal_obeys() -> None:
    program = graphopt.capture(nn.Linear(4, 3).eval(), (torch.randn(2, 4),))
    signature = {**program._signature(), "notes": [{"subject": "a", "text": "b\x1b[2Jc"}]}
    assert _with_signature(program, json.dumps(signature), "file.pt2").notes[0].text == r"b\x1b[2Jc"


@pytest.mark.parametrize("location", ["/etc/hostname", "../secret", "/dev/zero", "link"])
def test_weights_lie_beside_their_artifact(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(64))
    folder = tmp_path / "build"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    tensor = ir.ExternalTensor(location, 0, 48, ir.DataType.FLOAT, shape=ir.Shape((3, 4)), name="w", base_dir=folder)
    value = ir.Value(name="w", const_value=tensor)
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 20}), ir_version=10)
    with pytest.raises(LoweringError, match="which is no file beside it"):
        files_of(folder / "model.onnx", model)


def test_a_signature_of_another_version() -> None:
    program = graphopt.capture(nn.Linear(4, 3).eval(), (torch.randn(2, 4),))
    with pytest.raises(LoadError, match="it has schema 99, this version reads 1"):
        _with_signature(program, json.dumps({**program._signature(), "schema": 99}), "file.pt2")

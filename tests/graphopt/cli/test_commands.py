"""The commands, end to end on a small model: what they print, write, and can be chained to."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import graphopt
from graphopt.cli.app import run
from graphopt.cli.passes import explained
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.registry import PassRegistry
from tests.graphopt.cli.conftest import Fails, Files

FULL = ("optimize", "model.pt", "--passes", "prune:ratio=0.5,svd,int8", "--data", "data.npz")


WRITTEN = ("onnxruntime.onnx", "program.pt2", "plans.safetensors", "manifest.json", "run.py")

Built = Callable[[str], str]


@pytest.fixture(scope="module")
def builds(original_files: Files, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Run the whole command twice, once for each format: a folder with two results, and what was printed of them."""
    folder = tmp_path_factory.mktemp("builds")
    for file in (original_files.model, original_files.data, original_files.labelled):
        (folder / file.name).symlink_to(file)
    printed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, options in (("model.graphopt", ("--depfile", "model.d")), ("two", ("-o", "two", "--format", "json"))):
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                assert run([*FULL, "--eval", "labelled.npz", *options]) == 0
            printed[name] = stream.getvalue()
    return folder, printed


@pytest.fixture
def built(files: Files, builds: tuple[Path, dict[str, str]]) -> Built:
    """Return a function that copies a result of the command to the test's folder and returns what it printed."""
    folder, printed = builds

    def copy(name: str) -> str:
        shutil.copytree(folder / name, files.folder / name)
        return printed[name]

    shutil.copy(folder / "model.d", files.folder)
    return copy


def test_optimize_writes_everything_a_deployment_needs(files: Files, built: Built) -> None:
    table = built("model.graphopt")
    out = files.folder / "model.graphopt"
    names = {"onnxruntime.onnx", "program.pt2", "manifest.json", "report.json", "run.py", "plans.safetensors"}
    assert {path.name for path in out.iterdir()} == names
    for text in ("original", "prune:ratio=0.5", "fold", "onnxruntime.onnx", "top1", "speed-up", "smaller"):
        assert text in table
    manifest = json.loads((out / "manifest.json").read_text())
    assert [plan["pass_name"] for plan in manifest["plans"]] == ["prune", "svd", "fold", "int8"]
    assert manifest["artifacts"]["onnxruntime"]["session_options"]
    depfile = (files.folder / "model.d").read_text()
    assert depfile.splitlines()[0] == "model.graphopt/onnxruntime.onnx: model.pt data.npz labelled.npz"


def test_the_artifact_runs_without_graphopt(files: Files, built: Built) -> None:
    built("model.graphopt")
    np.save(files.folder / "x.npy", np.load(files.data)["input"][:3])
    script = files.folder / "model.graphopt" / "run.py"
    done = subprocess.run(
        [sys.executable, "-B", str(script), "input=x.npy"], capture_output=True, text=True, cwd=files.folder, check=True
    )
    assert "(3, 4)" in done.stdout
    assert "import graphopt" not in script.read_text()


@pytest.mark.parametrize(("word", "code"), [("--help", 0), ("x.npy", 1)])
def test_the_script_says_how_it_is_called(files: Files, built: Built, word: str, code: int) -> None:
    built("model.graphopt")
    command = [sys.executable, "-B", "model.graphopt/run.py", word]
    done = subprocess.run(command, capture_output=True, text=True, cwd=files.folder)
    assert (done.returncode, done.stderr) == (code, "")
    assert "python run.py [NAME=ARRAY.npy ...]" in done.stdout


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "graphopt", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{importlib.metadata.version('graphopt')}\n"


def test_same_input_same_bytes_and_replay(files: Files, built: Built) -> None:
    for folder in ("model.graphopt", "two"):
        built(folder)
    for name in WRITTEN:
        assert Path("model.graphopt", name).read_bytes() == Path("two", name).read_bytes(), name
    assert run(["apply", "model.pt", "two/manifest.json", "-o", "again"]) == 0
    for name in WRITTEN:
        assert Path("again", name).read_bytes() == Path("two", name).read_bytes(), name
    opened = graphopt.open("again")
    assert opened.artifact.session_options
    assert any("those of two;" in note for note in opened.report.notes)


def test_replay_on_what_a_factory_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("factory_of_linear.py").write_text("import torch\ndef build():\n    return torch.nn.Linear(3, 2)\n")
    torch.save(nn.Linear(3, 2).state_dict(), "w.pt")
    options = ("--factory", "factory_of_linear:build", "--weights", "w.pt", "--input", "x=2x3:float32", "-o")
    served = ("--served", "input:uint8:scale=1/255")  # which the manifest says when it is replayed
    assert run(["optimize", *options, "first", *served, "--passes", "", "--no-bench"]) == 0
    assert run(["apply", "first/manifest.json", *options, "again"]) == 0
    (spec,) = graphopt.open("again").artifact.inputs
    assert (spec.name, spec.dtype) == ("input", torch.uint8)
    for name in ("onnxruntime.onnx", "program.pt2", "manifest.json"):
        assert Path("again", name).read_bytes() == Path("first", name).read_bytes(), name


def test_replay_on_another_model_is_refused(files: Files, built: Built, fails: Fails) -> None:
    built("model.graphopt")
    other = graphopt.load("model.pt")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    other.save("other.pt2")
    said = fails(4, "apply", "other.pt2", "model.graphopt/manifest.json", "-o", "again")
    assert "were made for another program" in said


def test_json_on_stdout_is_nothing_but_json(built: Built) -> None:
    report = json.loads(built("two"))
    original, *_, artifact = report["rows"]
    assert artifact["size"] < original["size"]
    assert artifact["latency"]["speedup"] > 0
    assert original["metric"] == 100.0
    assert report["files"][-1] == "report.json"


def test_plan_prints_decisions_and_writes_nothing(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["optimize", "model.pt", "--passes", "prune:ratio=0.5", "--plan"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["pass_name"] == "prune"
    assert plan["kept"]
    assert not (files.folder / "model.graphopt").exists()


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_plan_decides_for_the_target(files: Files, capsys: pytest.CaptureFixture[str], target: str) -> None:
    code = run(["optimize", "model.pt", "--passes", "int8", "--data", "data.npz", "--plan", "--target", target])
    assert code == 0
    plan = json.loads(capsys.readouterr().out)[-1]
    assert plan["pass_name"] == "int8"
    assert {value["low"] for value in plan["values"]} == ({0} if target == "onnxruntime" else {-128})
    assert not (files.folder / "model.graphopt").exists()


def test_a_failed_gate_still_writes_and_exits_with_1(files: Files, fails: Fails) -> None:
    said = fails(1, "optimize", "model.pt", "--passes", "", "--no-bench", "--fail-if", "size>0.01")
    assert said.startswith("size is ")
    assert said.endswith("The results are in model.graphopt.failed; model.graphopt is as it was.")
    assert (files.folder / "model.graphopt.failed" / "onnxruntime.onnx").exists()
    assert not (files.folder / "model.graphopt").exists()


def test_two_targets_share_what_comes_before_the_fork(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*FULL, "--target", "onnxruntime", "--target", "tensorrt", "--no-bench"]) == 0
    out = files.folder / "model.graphopt"
    for name in ("onnxruntime.onnx", "tensorrt.onnx", "program.onnxruntime.pt2", "program.tensorrt.pt2"):
        assert (out / name).exists()
    plans = [(p["target"], p["pass_name"]) for p in json.loads((out / "manifest.json").read_text())["plans"]]
    assert plans.count(("", "prune")) == 1
    assert plans[-2:] == [("onnxruntime", "int8"), ("tensorrt", "int8")]
    assert "tensorrt.onnx" in capsys.readouterr().out


def test_verify_tells_equal_from_different(
    files: Files, built: Built, capsys: pytest.CaptureFixture[str], fails: Fails
) -> None:
    assert run(["optimize", "model.pt", "--passes", "fold", "--no-bench", "-o", "folded"]) == 0
    capsys.readouterr()
    assert run(["verify", "model.pt", "folded/onnxruntime.onnx", "--data", "data.npz", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] is True
    built("model.graphopt")
    said = fails(4, "verify", "model.pt", "model.graphopt/onnxruntime.onnx", "--data", "data.npz")
    assert "does not compute what model.pt does" in said


class Pair(nn.Module):
    """Two outputs, of which a second model lacks one, or returns them the other way round."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return values of equal shapes by name."""
        values = {"low": x.mean(1), "high": x.mean(1), "place": x.argmax(1)}
        return {name: values[name] for name in self.names}


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("low", "place"), "`high` is int64"),
        (("low", "high"), "output `place` is missing"),
        (("high", "low", "place"), "its outputs are high, low, place, in the order low, high, place there"),
    ],
)
def test_verify_names_outputs_that_differ(
    names: Sequence[str], reason: str, fails: Fails, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = torch.randn(4, 8)
    for file, own in (("one.pt2", ("low", "high", "place")), ("other.pt2", names)):
        graphopt.capture(Pair(own), (x,)).save(tmp_path / file)
    said = fails(4, "verify", tmp_path / "one.pt2", tmp_path / "other.pt2", "--format", "json")
    assert reason in said


def test_bench_tells_files_of_one_name_apart(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = []
    for folder in ("before", "after"):
        (files.folder / folder).mkdir()
        names.append(str(files.folder / folder / "a_name_as_long_as_a_name_may_well_be.pt"))
        shutil.copy(files.model, names[-1])
    assert run(["bench", *names, "--data", "data.npz", "--seconds", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"A: {names[0]}", f"B: {names[1]}"]
    assert [line.split()[:2] for line in lines if line.split()[:1] in (["A"], ["B"])] == [
        [letter, kind] for kind in ("recorded", "plain") for letter in "AB"
    ]
    assert max(map(len, lines[2:8])) <= 80


def test_bench_prints_a_ratio(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "model.pt", "model.pt", "--seconds", "0.2", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["threads"] == 1
    assert found["recorded"]["wall_ratio"]["median"] > 0


def test_inspect_and_passes(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "model.pt", "--format", "json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["inputs"] == ["input: batchx3x8x8 float32"]
    assert facts["operators"]["conv2d"] == 2
    assert run(["passes"]) == 0
    listed = capsys.readouterr().out
    for name in ("fold", "prune", "svd", "int8", "distill_hooks", "recover"):
        assert name in listed
    for name in ("fold", "prune", "svd", "int8", "distill_hooks", "recover"):
        assert run(["passes", "show", name]) == 0
        assert name in capsys.readouterr().out


def test_every_option_of_every_pass_is_explained() -> None:
    for name, found in PassRegistry().working(Pass).items():
        documented = explained(found.options_type).splitlines()
        for option in dataclasses.fields(found.options_type):
            assert any(line.startswith(f"{option.name}: ") for line in documented), (name, option.name)


def test_what_a_pass_does_is_wrapped_to_the_terminal(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert run(["passes", "show", "prune"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (point,) = [line for line in lines if line.startswith("2. ")]
    assert point.rstrip().endswith("what holds it.")
    assert any(line.startswith("flops: ") for line in lines)


def test_a_custom_pass_from_a_file(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    (files.folder / "my_pass.py").write_text(
        "from dataclasses import dataclass\n"
        "from graphopt import Editor, NoOptions, Pass, Plan\n"
        "class HalfBias(Pass[NoOptions, Plan]):\n"
        "    '''Halve every bias.'''\n"
        "    name = 'half_bias'\n"
        "    def plan(self, program, ctx):\n"
        "        names = [name for name, _ in program.graph_module.named_parameters()]\n"
        "        return self.new_plan(sites=[name for name in names if name.endswith('bias')])\n"
        "    def apply(self, program, plan):\n"
        "        program = program.copy()\n"
        "        editor = Editor(program.graph_module, self.name)\n"
        "        for name in plan.sites:\n"
        "            editor.put(name, program.graph_module.get_parameter(name) / 2, trainable=True)\n"
        "        return program.with_graph(editor.finish())\n"
    )
    command = ["optimize", "model.pt", "--passes", "half_bias", "--plugin", "my_pass.py", "--no-bench"]
    assert run(command) == 0
    assert "half_bias" in capsys.readouterr().out
    before, after = graphopt.load("model.pt"), graphopt.load("model.graphopt/program.pt2")
    torch.testing.assert_close(after.state_dict()["0.bias"], before.state_dict()["0.bias"] / 2)


def test_a_pipeline_file(files: Files) -> None:
    Path("passes.toml").write_text('[[pass]]\nname = "prune"\nratio = 0.5\n\n[[pass]]\nname = "fold"\n')
    assert run(["optimize", "model.pt", "--passes", "passes.toml", "--no-bench"]) == 0
    assert json.loads(Path("model.graphopt/manifest.json").read_text())["pipeline"] == "prune:ratio=0.5,fold"


def test_help_is_quick_to_import() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "from graphopt.cli.app import run; run(['--help'])"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "optimize" in done.stdout
    assert "torch" not in {line.split("|")[-1].strip() for line in done.stderr.splitlines()}


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == importlib.metadata.version("graphopt")

"""In a build: a failed gate stays red however often Make runs, and the depfile says what a result depends on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import graphopt
from graphopt.cli.app import run
from graphopt.cli.delivering import directory_of_failure
from graphopt.errors import UsageError
from graphopt.files import SCRATCH
from tests.graphopt.cli.conftest import Fails, Files

ROOT = Path(__file__).parents[3]
TARGET = "build/onnxruntime.onnx"
DEPFILE = "build/model.d"
GRAPHOPT = f"{sys.executable} -B -c 'from graphopt.cli.app import main; main()'"
RULE = """
.DELETE_ON_ERROR:
build/onnxruntime.onnx: model.pt
	{graphopt} optimize model.pt --passes fold {arguments} -o build --depfile build/model.d $(GATES)
-include build/model.d
"""

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
needs_ninja = pytest.mark.skipif(shutil.which("ninja") is None, reason="ninja is not installed")


def make(arguments: str, *gates: str) -> subprocess.CompletedProcess[str]:
    """Run Make on README's rule."""
    Path("Makefile").write_text(RULE.format(graphopt=GRAPHOPT, arguments=arguments))
    texts = " ".join(f'--fail-if "{gate}"' for gate in gates)
    return subprocess.run(
        ["make", f"GATES={texts}"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def later(path: str | Path, than: str | Path) -> None:
    """Make a file newer than another, without waiting."""
    moment = Path(than).stat().st_mtime + 10
    os.utime(path, (moment, moment))


@needs_make
def test_a_failed_gate_stays_red_and_keeps_what_was_there(files: Files) -> None:
    """That nothing is there without a green one before it is tested below, without Make."""

    def would_run() -> bool:
        """Ask Make whether it would run the rule again."""
        return subprocess.run(["make", "-q"], capture_output=True).returncode == 1

    command = ("optimize", "model.pt", "--passes", "fold", "--no-bench", "-o", "build", "--depfile", DEPFILE)
    assert run([*command, "--fail-if", "size>10"]) == 0
    assert Path(TARGET).is_file()
    assert "is up to date" in make("--no-bench", "size>10").stdout
    assert not would_run()
    good = Path(TARGET).read_bytes()
    later("model.pt", TARGET)
    done = make("--no-bench", "size>10", "error>=0")
    assert done.returncode == 2
    assert "gate is error>=0. The results are in build.failed; build is as it was." in done.stderr
    assert Path("build.failed/onnxruntime.onnx").is_file()
    assert Path(TARGET).read_bytes() == good
    assert would_run()


def test_a_gate_on_what_only_the_second_target_has(
    files: Files, fails: Fails, caplog: pytest.LogCaptureFixture
) -> None:
    command = ("optimize", "model.pt", "--passes", "", "--target", "tensorrt", "--target", "onnxruntime", "-o", "build")
    said = fails(1, *command, "--fail-if", "speedup<1000")
    assert "the gate speedup<1000 says nothing of tensorrt.onnx: it was not measured there" in caplog.text
    assert "for onnxruntime.onnx, gate is speedup<1000. The results are in build.failed" in said
    assert not Path("build").exists()


def test_a_failed_gate_replaces_the_results_of_an_earlier_one(files: Files, fails: Fails) -> None:
    command = ("optimize", "model.pt", "--passes", "", "--no-bench", "-o", "build", "--depfile", DEPFILE)
    fails(1, *command, "--fail-if", "error>=0", "--target", "tensorrt")
    assert Path("build.failed/tensorrt.onnx").exists()
    fails(1, *command, "--fail-if", "error>=0")
    assert not Path("build.failed/tensorrt.onnx").exists()
    assert not Path("build").exists()


def test_a_goal_that_cannot_be_met_fails_as_a_gate(files: Files, fails: Fails) -> None:
    command = ("optimize", "model.pt", "--data", "data.npz", "--no-bench", "-o", "build")
    said = fails(1, *command, "--passes", "mixed:bytes=0.01")
    assert "mixed: bytes=0.01: " in said
    assert "of the bytes are left. The results are in build.failed" in said
    assert Path("build.failed/onnxruntime.onnx").exists()
    assert not Path("build").exists()


@pytest.mark.parametrize("foreign", [(), ("diary.txt",)])
def test_results_of_a_failed_gate_go_when_all_gates_pass(files: Files, fails: Fails, foreign: tuple[str, ...]) -> None:
    command = ("optimize", "model.pt", "--passes", "", "--no-bench", "-o", "build", "--fail-if")
    fails(1, *command, "error>=0")
    for name in foreign:
        Path("build.failed", name).write_text("mine")
    assert run([*command, "error>1"]) == 0
    assert [path.name for path in Path().glob("build.failed/*")] == [*foreign]
    assert Path("build.failed").exists() == bool(foreign)


def test_what_no_run_wrote_is_not_replaced(files: Files, fails: Fails) -> None:
    Path("build.failed").mkdir()
    Path("build.failed/diary.txt").write_text("mine")
    command = ("optimize", "model.pt", "--passes", "fold", "--no-bench", "-o", "build", "--fail-if")
    assert fails(2, *command, "error>=0").startswith("build.failed is where results go if a gate fails")
    assert Path("build.failed/diary.txt").read_text() == "mine"


PLACES = ("manifest.json", "report.json", "plans.safetensors", "run.py", "program.pt2", "onnxruntime.onnx")
BOTH = ("run.tensorrt.py", "program.onnxruntime.pt2", "tensorrt.onnx")


@pytest.mark.parametrize(("name", "targets"), [*((name, 1) for name in PLACES), *((name, 2) for name in BOTH)])
def test_a_file_of_somebody_is_found_before_anything_runs(files: Files, fails: Fails, name: str, targets: int) -> None:
    Path("site").mkdir()
    Path("site", name).write_text("{}")
    Path("model.pt").unlink()
    target = ("--target", "onnxruntime", "--target", "tensorrt")[: 2 * targets]
    said = fails(2, "optimize", "model.pt", "--passes", "fold", "-o", "site", *target)
    assert said.startswith(f"site/{name} was not written by graphopt, or the manifest that says so is gone")
    Path("site", name).unlink()
    Path("site", name).mkdir()
    said = fails(2, "optimize", "model.pt", "--passes", "fold", "-o", "site", *target)
    assert said.startswith(f"site/{name} is a folder, not a file. Move it away")
    Path("site", name).rmdir()
    Path("site", "notes.txt").write_text("mine")
    fails(3, "optimize", "model.pt", "--passes", "fold", "-o", "site", *target)


@pytest.mark.parametrize("left", ["", f"{SCRATCH}abcdefgh/new", "report.json"])
def test_a_run_that_was_killed_where_failures_go_keeps_no_other_from_going_there(files: Files, left: str) -> None:
    Path("build.failed", left).mkdir(parents=True)
    assert directory_of_failure(Path("build"), expected=True) == Path("build.failed")
    Path("build.failed/diary.txt").write_text("mine")
    if not left:
        with pytest.raises(UsageError, match="holds something else"):
            directory_of_failure(Path("build"), expected=True)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--depfile", "/dev/null"), "/dev/null is no file. Give --depfile the name of one."),
        (("--depfile", "."), ". is no file. Give --depfile the name of one."),
        (("-o", "/dev/null"), "/dev/null is a file. Give -o a directory."),
        (("-o", "link"), "link is a link to nothing. Give -o a directory."),
        (("--dump", "data.npz"), "data.npz is a file. Give --dump a directory."),
        (("--depfile", "model.d", "--data", "it's"), """--depfile cannot name "it's": no way of writing "'" there"""),
    ],
)
def test_where_nothing_can_be_written_is_said_before_anything_runs(
    files: Files, fails: Fails, option: tuple[str, ...], said: str
) -> None:
    Path("model.pt").unlink()
    Path("it's").mkdir()
    Path("link").symlink_to("nothing")
    assert fails(2, "optimize", "model.pt", *option).startswith(said)


def test_a_directory_without_a_name_of_its_own(files: Files, fails: Fails) -> None:
    Path("sub").mkdir()
    failed = Path(f"{files.folder}.failed")
    assert directory_of_failure(Path(), expected=True) == failed
    said = fails(1, "optimize", "model.pt", "--passes", "", "--no-bench", "-o", "sub/..", "--fail-if", "error>=0")
    assert f"The results are in {failed}" in said
    assert (failed / "onnxruntime.onnx").is_file()
    assert not Path("onnxruntime.onnx").exists()


def test_a_gate_that_cannot_be_told_keeps_the_results_apart(files: Files, fails: Fails) -> None:
    graphopt.capture(nn.Linear(8, 1), (torch.zeros(2, 8),)).save("score.pt2")
    said = fails(2, "optimize", "score.pt2", "--passes", "", "--no-bench", "-o", "build", "--fail-if", "agreement<1")
    assert "The gate agreement<1 has nothing to look at" in said
    assert Path("build.failed/onnxruntime.onnx").is_file()
    assert not Path("build").exists()


@pytest.mark.parametrize(
    ("arguments", "gate", "advice"),
    [
        ((), "drop>1", "Give --eval."),
        ((), "drop%>1", "Give --eval."),
        (("--no-bench",), "speedup<2", "with timing on"),
        (("--target", "tensorrt"), "speedup<2", "executes on this machine"),
        (("--plan",), "speedup<2", "without --plan"),
        (("--plan",), "size>0.5", "Leave out --plan."),
    ],
)
def test_what_a_run_will_not_measure_is_said_before_it(
    files: Files, fails: Fails, arguments: tuple[str, ...], gate: str, advice: str
) -> None:
    Path("model.pt").unlink()  # so that only what reads no model is reached
    said = fails(2, "optimize", "model.pt", "--passes", "fold", *arguments, "--fail-if", "error>1", "--fail-if", gate)
    assert said.startswith(f"The gate {gate} has nothing to look at")
    assert advice in said


NINJA = """
rule copy
  command = mkdir -p build && cp kept.onnx $out && cp kept.d build/model.d && echo ran >> log
  depfile = build/model.d
  {deps}
build build/onnxruntime.onnx: copy model.pt
"""


@needs_ninja
def test_ninja_builds_again_when_what_the_depfile_names_changes(files: Files, tmp_path: Path) -> None:
    Path("many samples").mkdir()
    for index in range(2):
        np.savez(f"many samples/{index}.npz", input=np.load("data.npz")["input"])
    command = ["optimize", "model.pt", "--passes", "", "--no-bench", "--data", "many samples", "-o", "build"]
    assert run([*command, "--depfile", DEPFILE]) == 0
    assert Path(DEPFILE).read_text().splitlines() == [
        r"build/onnxruntime.onnx: model.pt many\ samples many\ samples/0.npz many\ samples/1.npz",
        "model.pt:",
        r"many\ samples:",
        r"many\ samples/0.npz:",
        r"many\ samples/1.npz:",
    ]
    shutil.move(TARGET, "kept.onnx")
    shutil.move(DEPFILE, "kept.d")
    shutil.rmtree("build")
    for name, deps in (("depfile", ""), ("deps", "deps = gcc")):
        folder = Path(shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-{name}"), symlinks=True))
        (folder / "build.ninja").write_text(NINJA.format(deps=deps))
        _check_ninja(folder)


SOURCES = {
    "build_it": "import building.net as net\ndef build():\n    return net.Net()\n",
    "building/__init__": "",
    "building/net": "from torch import nn\nimport importlib\n_ = importlib.import_module('building.sizes')\n"
    "def Net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))\n",
    "building/sizes": "",
    "judge": "def score(model):\n    import judge_more\n    return 1.0\n",
    "judge_more": "",
    "plugin": "import plugin_options\nfrom graphopt import NoOptions, Pass, Plan\n"
    "class Nothing(Pass[NoOptions, Plan]):\n    'Do nothing.'\n    name = 'nothing'\n"
    "    def plan(self, program, ctx):\n        return self.new_plan(sites=())\n"
    "    def apply(self, program, plan):\n        import plugin_lazily\n        return program\n",
    "plugin_options": "",
    "plugin_lazily": "",
    "not_used": "",
}


def test_the_depfile_names_the_users_own_source(files: Files) -> None:
    """What only some runs import counts too: passes whose plans are found in the cache do not plan."""
    Path("building").mkdir()
    for name, text in SOURCES.items():
        Path(f"{name}.py").write_text(text)
    command = (
        "--factory build_it:build --eval judge:score --plugin plugin.py --passes nothing --no-bench --data data.npz"
    )
    code = f"from graphopt.cli.app import run; print(run('optimize {command} --depfile found.d -o out'.split()))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.endswith("\n0\n"), done
    found = Path("found.d").read_text().splitlines()[0].split()[1:]
    assert sorted(found) == sorted(["data.npz", *(f"{name}.py" for name in SOURCES if name != "not_used")])


def _check_ninja(folder: Path) -> None:
    def ninja() -> int:
        """Run it; return how often the command has run by then."""
        done = subprocess.run(["ninja"], capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stdout
        return len((folder / "log").read_text().splitlines())

    samples = folder / "many samples"
    assert [ninja(), ninja()] == [1, 1]
    later(samples / "0.npz", folder / TARGET)
    assert ninja() == 2
    for path in (samples / "0.npz", samples):
        os.utime(path, (0, 0))
    assert [ninja(), ninja()] == [2, 2]
    (samples / "1.npz").unlink()
    os.utime(samples, (0, 0))
    assert ninja() == 3

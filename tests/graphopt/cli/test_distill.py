"""`graphopt distill` and `graphopt presets`, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import graphopt
from graphopt.cli.app import run
from graphopt.pipeline.preset_files import preset_called, preset_names
from tests.graphopt.cli.conftest import Fails, Files, small_net

STUDENT = """
import torch
from torch import nn

def small():
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return nn.Sequential(*layers)
"""
COMMAND = ("distill", "--data", "labelled.npz", "--no-bench", "--epochs", "2")


def test_a_program_teaches_by_a_preset_and_the_result_is_int8(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    Path("one_student.py").write_text(STUDENT)
    command = [*COMMAND, "--factory", "one_student:small", "--teacher", "model.pt", "--eval", "labelled.npz"]
    assert run([*command, "--preset", "distill-int8", "--alpha", "0.7", "-o", "out", "--format", "json"]) == 0
    rows = [row["label"] for row in json.loads(capsys.readouterr().out)["rows"]]
    assert rows == ["original", "fold (for int8)", "int8", "onnxruntime.onnx"]
    found = graphopt.open("out").distillation
    assert found["teachers"] == ["model.pt"]
    plan = found["plan"]
    assert isinstance(plan, dict)
    assert (plan["temperature"], plan["alpha"], plan["epochs"]) == (4.0, 0.7, 2)


def test_an_onnx_file_and_a_factory_with_weights_teach_together(files: Files) -> None:
    assert run(["optimize", "model.pt", "--passes", "", "--no-bench", "-o", "teacher"]) == 0
    torch.save(small_net().state_dict(), "weights.pt")
    Path("another_student.py").write_text(STUDENT)
    Path("plan.toml").write_text("batch_size = 8\n[[teachers]]\nweight = 2.0\n[[teachers]]\n")
    factory = "tests.graphopt.cli.conftest:small_net"
    teachers = ["--teacher", "teacher/onnxruntime.onnx", "--teacher", f"{factory}@weights.pt"]
    assert run([*COMMAND, "--factory", "another_student:small", *teachers, "--plan", "plan.toml", "-o", "out"]) == 0
    found = graphopt.open("out").distillation
    assert found["teachers"] == ["onnxruntime.onnx", factory]
    assert found["outputs"] == {
        "output by onnxruntime.onnx": pytest.approx(1 / 3),
        f"output by {factory}": pytest.approx(1 / 6),
    }


def test_presets_are_listed_printed_and_their_plans_are_plans(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["presets"]) == 0
    listed = capsys.readouterr().out
    for name in preset_names():
        assert name in listed
        assert run(["presets", "show", name]) == 0
        assert (
            capsys.readouterr().out
            == Path(graphopt.__file__).with_name("pipeline").joinpath("presets", f"{name}.toml").read_text()
        )
        found = preset_called(name)
        graphopt.DistillPlan.of(found.plan)
        graphopt.Pipeline.parse(found.passes)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("optimize", "model.pt", "--preset", "distill-int8"),
            "is of a distillation: graphopt distill STUDENT",
        ),
        (("optimize", "model.pt", "--preset", "nothing"), "There is no preset `nothing`. There are distill-int8,"),
        (
            ("optimize", "model.pt", "--preset", "prune-recover-int8", "--passes", "int8"),
            "Leave out --passes, or the preset",
        ),
        (("distill", "model.pt", "--preset", "prune-recover-int8"), "none of a distillation: graphopt optimize MODEL"),
        (("distill", "model.pt", "--preset", "distill-int8", "--plan", "p.toml"), "Leave out --plan, or the preset"),
        (("distill", "model.pt", "--features", "all"), "`features`: input should be 'auto', 'stages' or 'none'"),
    ],
)
def test_what_does_not_go_together_is_said(files: Files, fails: Fails, arguments: tuple[str, ...], said: str) -> None:
    assert said in fails(2, *arguments)


def test_a_distillation_without_data_is_refused(files: Files, fails: Fails) -> None:
    assert "needs data to learn on" in fails(6, "distill", "model.pt", "--teacher", "model.pt")

"""What is sure to fail when it is lowered fails before a pass works on it, and a pass that changed nothing says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt.cli.app import run
from graphopt.errors import LoweringError
from graphopt.ir.program import Program
from graphopt.pipeline.hooks import Hook
from graphopt.pipeline.order import Step


class Untouched(Hook):
    """Fails when a step begins."""

    def before(self, step: Step, program: Program, target: str) -> None:
        """Called before a step plans."""
        raise AssertionError(step.text)


def net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).to(dtype).eval()


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.bfloat16, r"`input` is bfloat16, which numpy arrays cannot hold.*`model\.float\(\)`"),
        (torch.float64, r"Conv.* Parts are in double precision: convert them with `model\.float\(\)`\."),
    ],
)
def test_types_that_the_runtime_lacks(dtype: torch.dtype, said: str) -> None:
    x = torch.randn(32, 3, 8, 8, dtype=dtype)
    with pytest.raises(LoweringError, match=said):
        graphopt.optimize(net(dtype), x, "prune", hooks=[Untouched()])
    assert graphopt.optimize(net(dtype), x, "fold", lower=False).artifacts == {}


def test_types_that_the_stand_in_of_the_runtime_lacks() -> None:
    x = torch.randn(32, 3, 8, 8, dtype=torch.float64)
    with pytest.raises(LoweringError, match=r"Parts are in double precision: convert them with `model\.float\(\)`\."):
        graphopt.optimize(net(torch.float64), x, "int8", target="tensorrt", hooks=[Untouched()])


def test_what_has_another_reason_is_not_blamed_on_double_precision() -> None:
    class Bessel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.i0e(x)

    with pytest.raises(LoweringError, match="has no ONNX form") as caught:
        graphopt.optimize(Bessel(), torch.randn(32, 8, dtype=torch.float64), "fold", hooks=[Untouched()])
    assert "double precision" not in str(caught.value)


def test_double_precision_that_the_runtime_computes_in() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double().eval()
    found = graphopt.optimize(model, torch.randn(32, 8, dtype=torch.float64), "fold", bench=False)
    assert found.report.artifact_rows()[0].error is not None


def test_a_pass_that_changed_nothing_says_so() -> None:
    x = torch.randn(32, 3, 8, 8).half()
    notes = graphopt.optimize(net(torch.float16), x, "int8", lower=False).report.notes
    assert [note for note in notes if note.startswith("int8: it changed nothing (matched ")] != []
    assert not [note for note in notes if "fold" in note]
    (said,) = [note for note in notes if note.startswith("model: it has weights of float16")]
    assert "passes that quantize leave alone" in said
    assert said.endswith("convert it with `model.float()`")


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.export.save(torch.export.export(net(torch.bfloat16), (torch.zeros(1, 3, 8, 8).bfloat16(),)), "model.pt2")
    monkeypatch.setattr("graphopt.pipeline.runner.run", lambda *_: pytest.fail("a pass ran"))
    assert run(["optimize", "model.pt2", "--passes", "prune"]) == 5
    assert "`input` is bfloat16" in capsys.readouterr().err

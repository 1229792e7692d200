"""The TensorRT backend: accepted by the parser and builder, refused with a reason, executed literally."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from graphopt import capture
from graphopt.backends.onnx_lowering.lowering import Style, lower
from graphopt.backends.onnx_lowering.saving import save
from graphopt.backends.tensorrt import TensorRTBackend, engine
from graphopt.errors import LoweringError
from graphopt.ir.program import Program
from graphopt.targets.backend import Artifact
from tests.backends.quantized import IntegerResNet, Rounded, SignedResidual
from tests.models import FusedAttention, Residual

BACKEND = TensorRTBackend()
needs_parser = pytest.mark.skipif(not engine.available(), reason="the extra graphopt[tensorrt] is not installed")


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Artifact]:
    torch.manual_seed(0)
    program = capture(SignedResidual().eval(), torch.randn(2, 3, 16, 16))
    return program, BACKEND.lower(program, tmp_path_factory.mktemp("signed") / "tensorrt.onnx")


@needs_parser
def test_accepted_and_its_weights_are_a_quarter(signed: tuple[Program, Artifact]) -> None:
    _, artifact = signed
    assert str(artifact.facts["engine"]).startswith("built by tensorrt-rtx 1.7")
    floats = 4 * (3 * 32 * 9 + 32 * 32 * 9 + 32 * 10)
    assert int(artifact.facts["weights_memory"]) < 0.4 * floats  # type: ignore[call-overload]
    assert BACKEND.summary(artifact) == "built for SM86, weights 0.0 MB"


def test_no_rule_is_broken(signed: tuple[Program, Artifact]) -> None:
    assert BACKEND.check(signed[1]) == []


def test_verified_and_run_on_the_cpu(signed: tuple[Program, Artifact]) -> None:
    program, artifact = signed
    assert BACKEND.verify(artifact, program) < 1e-4
    assert artifact.session_options == {"threads": 0, "optimization": "disabled"}
    (found,) = artifact.session(threads=1)(np.zeros((3, 3, 16, 16), np.float32))
    assert found.shape == (3, 10)
    assert not BACKEND.times_here


@needs_parser
@pytest.mark.parametrize(("model", "shape"), [(Residual, (2, 3, 8, 8)), (FusedAttention, (2, 6, 7))])
def test_float_models_are_accepted(model: type[nn.Module], shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = capture(model().float().eval(), torch.randn(shape))
    artifact = BACKEND.lower(program, tmp_path / "tensorrt.onnx")
    assert BACKEND.check(artifact) == []
    assert BACKEND.verify(artifact, program) < 1e-4


def test_what_suits_onnxruntime_is_refused_with_reasons(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = capture(IntegerResNet().eval(), torch.randn(2, 3, 16, 16))
    with pytest.raises(LoweringError, match=r"input/QuantizeLinear: its zero point is not 0.* And \d+ more\."):
        BACKEND.lower(program, tmp_path / "tensorrt.onnx")
    assert list(tmp_path.iterdir()) == []


@needs_parser
def test_what_the_parser_refuses_leaves_nothing_behind(tmp_path: Path) -> None:
    class Unique(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.max_pool2d(x, 2, return_indices=True)[1]

    program = capture(Unique(), torch.randn(2, 3, 4, 4))
    with pytest.raises(LoweringError, match=r"TensorRT (refuses|parses) tensorrt\.onnx"):
        BACKEND.lower(program, tmp_path / "tensorrt.onnx")
    assert list(tmp_path.iterdir()) == []


@needs_parser
def test_the_rules_agree_with_the_parser(tmp_path: Path) -> None:
    """What a rule calls refused, the parser refuses: the rules are not from hearsay."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rounded = Rounded(0.5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.rounded(x)

    save(lower(capture(Shifted(), torch.randn(2, 4)), Style(20)), tmp_path / "model.onnx")
    with pytest.raises(LoweringError, match="zero point is not supported"):
        engine.build(tmp_path / "model.onnx", [((1, 4),), ((3, 4),), ((8, 4),)])
    (finding, *_) = BACKEND.check(BACKEND.open(tmp_path / "model.onnx"))
    assert finding.severity == "error"


@needs_parser
def test_external_data_is_parsed(signed: tuple[Program, Artifact], tmp_path: Path) -> None:
    artifact = TensorRTBackend(external_data_above=100).lower(signed[0], tmp_path / "large.onnx")
    assert [file.name for file in artifact.files] == ["large.onnx", "large.onnx.data"]
    assert artifact.facts["weights_memory"] == signed[1].facts["weights_memory"]


def test_without_the_extra_it_says_so(
    signed: tuple[Program, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "available", lambda: False)
    artifact = BACKEND.lower(signed[0], tmp_path / "tensorrt.onnx")
    assert "pip install 'graphopt[tensorrt]'" in str(artifact.facts["engine"])
    assert BACKEND.summary(artifact) == "not built"


def test_means_stay_reductions(signed: tuple[Program, Artifact]) -> None:
    operators = [node.op_type for node in ir.load(signed[1].path).graph]
    assert "ReduceMean" in operators
    assert "GlobalAveragePool" not in operators


def test_run_script_says_what_stands_in(signed: tuple[Program, Artifact], tmp_path: Path) -> None:
    artifact = signed[1]
    script = BACKEND.run_script(artifact)
    assert "ONNX Runtime stands in for TensorRT" in script
    (artifact.path.parent / "run.py").write_text(script)
    command = [sys.executable, "-I", str(artifact.path.parent / "run.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.startswith("output (1, 10) float32\n")

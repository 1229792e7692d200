"""Artifacts are verified in the runtime of another Python, and what is wrong there is said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from graphopt.backends.onnx_execution.session import OnnxSession, SessionSettings
from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.capturing.capture import capture
from graphopt.errors import LoweringError
from tools.check_arm import error_in
from tools.other_runtime import OtherRuntime, OtherSession, verified_by


def test_verification_runs_there(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program, other_program = (capture(nn.Linear(4, 3), torch.randn(2, 4)) for _ in range(2))
    backend = OnnxRuntimeBackend()
    artifact = backend.lower(program, tmp_path / "onnxruntime.onnx")
    with OtherRuntime([sys.executable]) as other, verified_by(other):
        assert "onnxruntime" in other.machine
        before = other.file()
        assert backend.verify(artifact, program) < 1e-6
        asked = int(other.file().name)
        assert asked > int(before.name) + 2  # arrays went there and came back
        assert error_in(OnnxSession, artifact, program) < 1e-6
        assert int(other.file().name) == asked + 1  # nothing went there
        assert error_in(OtherSession, artifact, program) < 1e-6
        assert int(other.file().name) > asked + 2
        with pytest.raises(LoweringError, match="computes something else"):
            backend.verify(artifact, other_program)
        with pytest.raises(LoweringError, match="INVALID_PROTOBUF"):
            OtherSession(b"no model", SessionSettings())

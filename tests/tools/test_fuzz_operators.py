"""An operator of torch that reads beyond its arguments is told from one that does not; what is refused is not run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.fuzz_operator_runs import run_as_loaded

TOOL = Path(__file__).parents[2] / "tools" / "fuzz_operators.py"
WEIGHT_NORM = "aten._weight_norm_interface.default"  # reads an element of g for each row of v, of which g may have less


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="memory is guarded by a C library")
def test_reads_beyond_a_tensor_are_found() -> None:
    command = [sys.executable, str(TOOL), "--unchecked", "--calls", "20"]
    names = ["--only", WEIGHT_NORM, "--only", "aten.relu.default"]
    done = subprocess.run([*command, *names], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert f"SIGSEGV {WEIGHT_NORM}:10 float32(2,)" in done.stdout
    assert "relu" not in done.stdout
    assert "2 overloads" in done.stdout


def test_what_graphopt_refuses_is_not_run() -> None:
    v, g = torch.ones(8, 3), torch.ones(8, 1)
    assert not run_as_loaded(torch.ops.aten._weight_norm.default, ((v, g, 0), {}))
    assert run_as_loaded(torch.ops.aten._weight_norm.default, ((v, g[:2], 0), {}))

"""The same input gives the same bytes, wherever and however it runs; `tools/same_bytes.py` tries more."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn

from graphopt.cli.app import run
from tools.same_bytes import command_line, digests, run_elsewhere, write_model

PASSES = "prune:ratio=0.4:round_to=1,int8"
TARGETS = ["onnxruntime"]


def test_hash_seed_threads_folder_locale_and_time_zone_change_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    write_model(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(16, 16), tmp_path)
    model, data, there = tmp_path / "model.pt2", tmp_path / "data.npz", tmp_path / "ü ü"
    assert run(command_line(model, data, PASSES, tmp_path / "out", TARGETS)) == 0
    there.mkdir()
    shutil.copy(model, there)
    threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    environment = {"PYTHONHASHSEED": "99", "LC_ALL": "POSIX", "TZ": "Asia/Kathmandu", **threads}
    run_elsewhere(command_line(Path("model.pt2"), data, PASSES, Path("deep/er"), TARGETS), there, environment)
    assert digests(there / "deep" / "er") == digests(tmp_path / "out")
    assert {*digests(tmp_path / "out")} > {"manifest.json", "onnxruntime.onnx", "plans.safetensors", "program.pt2"}

"""The kinds of file that graphopt reads: a whole one of each, how it is damaged, and what reads it."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from rich.console import Console
from torch import nn

import graphopt
from graphopt.cli.table import print_report
from graphopt.data import InputSpec, Samples
from graphopt.files import sha256
from graphopt.loading import load_model
from graphopt.measure.evaluate import evaluator
from graphopt.pipeline.pipeline import Pipeline
from tools.fuzz_mutations import (
    Mutation,
    json_mutated,
    npy_mutated,
    pickle_mutated,
    safetensors_mutated,
    text_mutated,
    zip_mutated,
)

_SPEC = InputSpec("x", (1, 2, 3))
_PIPELINE = """
[[pass]]
name = "prune"
ratio = 0.5
criterion = "l2"
skip = ["a", "b.*"]

[[pass]]
name = "svd"
energy = 0.9

[[pass]]
name = "int8"
"""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        path: where the file lies, what belongs to it beside it.
        content: a whole one.
        mutate: damages it.
        read: what a user would have read it with.
    """

    path: Path
    content: bytes
    mutate: Mutation
    read: Callable[[Path], object]


def network() -> nn.Module:
    """Return the network that the state dict is for."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4)).eval()


def kinds(folder: Path, *names: str) -> dict[str, Kind]:
    """Write a whole file of each of these kinds, and what belongs to it, below a folder."""
    found: dict[str, Kind] = {}
    for group, make in _GROUPS.items():
        if set(group) & set(names):
            torch.manual_seed(0)
            found.update(make(folder))
    return {name: found[name] for name in names}


def _models(folder: Path) -> dict[str, Kind]:
    module, weights, program = folder / "module.pt", folder / "weights.pt", folder / "program.pt2"
    torch.save(network(), module)
    beside = {"best": np.float64(0.5), "curve": np.arange(6.0).reshape(2, 3), "last": deque([0.5, 0.25], maxlen=2)}
    torch.save({"state_dict": network().state_dict(), **beside}, weights)
    graphopt.capture(network(), (torch.randn(2, 6),)).save(program)
    pickles = zip_mutated([(".pkl", pickle_mutated)])
    schema = zip_mutated([(".json", json_mutated)])
    spec = InputSpec("input", (2, 6))
    reads: tuple[tuple[str, Path, Mutation, Callable[[Path], object]], ...] = (
        ("module", module, pickles, lambda path: graphopt.load(path, inputs=[spec])),
        ("state dict", weights, pickles, lambda path: load_model(path, factory="tools.fuzz_kinds:network")),
        ("program", program, schema, graphopt.load),
    )
    return {name: Kind(path, path.read_bytes(), mutate, read) for name, path, mutate, read in reads}


def _data(folder: Path) -> dict[str, Kind]:
    x, labels = np.arange(48, dtype=np.float32).reshape(8, 2, 3), np.arange(8) % 3
    np.save(folder / "x.npy", x)
    np.savez_compressed(folder / "x.npz", x=x, labels=labels)
    tensors = {"x": torch.from_numpy(x), "labels": torch.from_numpy(labels)}
    safetensors.torch.save_file(tensors, folder / "x.safetensors")
    (folder / "passes.toml").write_text(_PIPELINE)
    archive = zip_mutated([(".npy", npy_mutated)], zipfile.ZIP_DEFLATED)
    reads: tuple[tuple[str, str, Mutation, Callable[[Path], object]], ...] = (
        ("npy", "x.npy", npy_mutated, _read_data),
        ("npz", "x.npz", archive, _read_data),
        ("safetensors", "x.safetensors", safetensors_mutated, _read_data),
        ("toml", "passes.toml", text_mutated, Pipeline.from_toml),
    )
    return {name: Kind(folder / file, (folder / file).read_bytes(), mutate, read) for name, file, mutate, read in reads}


def _results(folder: Path) -> dict[str, Kind]:
    layers = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 4)).eval()
    original = graphopt.capture(layers, (torch.randn(2, 8),))
    build, bare = folder / "build", folder / "bare"
    graphopt.optimize(original, None, "prune:ratio=0.2:round_to=1,svd:ratio=0.3", bench=False, cache=False).save(build)
    shutil.copytree(build, bare)
    stored = json.loads((build / "manifest.json").read_text())
    (bare / "manifest.json").write_text(json.dumps({**stored, "programs": {}, "artifacts": {}}))  # quick to open

    def read_manifest(path: Path) -> None:
        graphopt.replay(original, path)
        graphopt.open(path.parent).artifact.session()

    def read_payload(path: Path) -> None:
        digests = {**stored["sha256"], path.name: sha256(path)}
        path.with_name("manifest.json").write_text(json.dumps({**stored, "sha256": digests}))
        graphopt.replay(original, path.with_name("manifest.json"))

    def read_report(path: Path) -> None:
        print_report(graphopt.open(path.parent).report, Console(file=io.StringIO()))

    payload = folder / "payload" / "plans.safetensors"
    shutil.copytree(build, payload.parent)
    return {
        "manifest": Kind(build / "manifest.json", (build / "manifest.json").read_bytes(), json_mutated, read_manifest),
        "payload": Kind(payload, payload.read_bytes(), safetensors_mutated, read_payload),
        "report": Kind(bare / "report.json", (bare / "report.json").read_bytes(), json_mutated, read_report),
    }


def _read_data(path: Path) -> None:
    """Read what a run would: checked against a model, as what a module is captured on, and as labelled data."""
    samples = Samples.open(path, ["x"])
    samples.first(2)
    samples.check([_SPEC])
    assert sum(len(batch[0]) for batch in samples.batches(3, 64)) <= 64
    assert samples.count is not None
    if path.suffix != ".npy":
        evaluator(str(path), specs=[_SPEC], limit=64)(lambda x: x.flatten(1))


_GROUPS = {
    ("module", "state dict", "program"): _models,
    ("npy", "npz", "safetensors", "toml"): _data,
    ("manifest", "payload", "report"): _results,
}
NAMES = [name for names in _GROUPS for name in names]

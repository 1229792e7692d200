"""Run one command line in many environments: every file of the results holds the same bytes.

    python tools/same_bytes.py

Two models go through every kind of decision to both targets. What differs from run to run: the
seed of hashes, threads, folder and working directory, locale, time zone, user's mask and home. Of `report.json` all but
the times must be the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import graphopt

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.models import FusedAttention, Residual, example

ROOT = Path(__file__).parents[1]

_PASSES = ("prune:ratio=0.4:round_to=1,svd:energy=0.9,int8", "fold,recover:epochs=1:samples=16,sparsity24,int8")
_TARGETS = ("onnxruntime", "tensorrt")


def write_model(model: nn.Module, x: torch.Tensor, folder: Path) -> None:
    """Write `model.pt2` and `data.npz`."""
    program = graphopt.capture(model.eval(), (x[:2],))
    program.save(folder / "model.pt2")
    np.savez(folder / "data.npz", **{program.inputs[0].name: x.numpy()})


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file by its name; of the report without its times."""
    found = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        if path.name == "report.json":
            content = json.dumps(_without_times(json.loads(content))).encode()
        found[path.name] = hashlib.sha256(content).hexdigest()
    return found


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_times(item) for name, item in value.items() if name != "seconds"}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def command_line(model: Path, data: Path, passes: str, output: Path, targets: Sequence[str] = _TARGETS) -> list[str]:
    """Return the arguments of an untimed run."""
    places = ["--data", str(data), "-o", str(output)]
    chosen = [word for target in targets for word in ("--target", target)]
    return ["optimize", str(model), "--passes", passes, "--no-bench", "--no-cache", *chosen, *places]


def run_elsewhere(arguments: list[str], folder: Path, environment: Mapping[str, str], umask: int = 0o022) -> None:
    """Run a command line in a process of its own.

    Raises:
        CalledProcessError: it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    code = "from graphopt.cli.app import main; main()"
    subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        umask=umask,
        stdout=subprocess.DEVNULL,
        check=True,
    )


def environments() -> Iterator[tuple[str, dict[str, str], int]]:
    """Yield a name for the folder, variables, and a mask; the first is the plain one."""
    found = subprocess.run(["locale", "-a"], capture_output=True, text=True, check=True).stdout.split()
    zones = ("UTC", "Asia/Kathmandu", "America/St_Johns", "Pacific/Kiritimati")
    threads = ("1", "2", "4")
    yield "plain", {"PYTHONHASHSEED": "0", "LC_ALL": "C", "TZ": "UTC", "OMP_NUM_THREADS": "1"}, 0o022
    for index, locale in enumerate(found):
        variables = {
            "PYTHONHASHSEED": str(1000 * index + 7),
            "LC_ALL": locale,
            "TZ": zones[index % len(zones)],
            "OMP_NUM_THREADS": threads[(index + 1) % len(threads)],
            "HOME": "/nonexistent",
        }
        yield f"{index} ü/deeper", variables, (0o077, 0o002)[index % 2]


def main() -> None:
    """Run everything, compare with the plain run; the exit code is 1 where something differs."""
    different = []
    with tempfile.TemporaryDirectory() as home:
        place = Path(home)
        for kind, passes in zip((Residual, FusedAttention), _PASSES, strict=True):
            torch.manual_seed(0)
            write_model(kind(), example(kind, 64).float(), place)
            first: dict[str, str] = {}
            for name, variables, umask in environments():
                folder = place / name
                folder.mkdir(parents=True, exist_ok=True)
                files = [Path(shutil.copy(place / file, folder)) for file in ("model.pt2", "data.npz")]
                arguments = command_line(files[0], files[1], passes, folder / "out")
                run_elsewhere(arguments, folder / "cwd", variables, umask)
                found = digests(folder / "out")
                first = first or found
                changed = sorted(name for name in {*first, *found} if first.get(name) != found.get(name))
                different += changed
                shown = ", ".join(f"{name}={value}" for name, value in variables.items())
                said = ", ".join(changed) or f"{len(found)} files are the same"
                print(f"{kind.__name__}, {shown}: {said}", flush=True)
                shutil.rmtree(folder)
    sys.exit(bool(different))


if __name__ == "__main__":
    main()

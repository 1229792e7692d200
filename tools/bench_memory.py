"""Peak of host memory of each step of a run, as a multiple of the model's float weights.

    python tools/bench_memory.py                                          # 100 M parameters, "" and prune,svd,int8
    python tools/bench_memory.py --parameters 400 --passes ""

Models are perceptrons of random weights and four layers of one width, on random data. Every run is a process of its
own; the peak is of what it holds in memory (Linux: VmHWM, reset before each step), less what it held before there was
a model: Python and its libraries.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from graphopt.job.job import Job
from graphopt.pipeline.pipeline import Pipeline

_LAYERS = 4
_SAMPLES = 64
_STEPS = ("capture", "passes", "deliver", "save")


def main(
    parameters: Annotated[list[int] | None, typer.Option(help="millions; repeat for several")] = None,
    passes: Annotated[list[str] | None, typer.Option(help="pipelines; repeat for several")] = None,
    one: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measure every size with every pipeline and print a table."""
    if not Path("/proc/self/clear_refs").exists():
        raise typer.BadParameter("Peaks are read from /proc, which this system does not have: run it on Linux.")
    sizes, pipelines = parameters or [100], ["", "prune,svd,int8"] if passes is None else passes
    if one:
        print(json.dumps(_peaks(sizes[0], pipelines[0])))
        return
    table = Table("parameters", "passes", *_STEPS, "peak")
    for millions in sizes:
        for text in pipelines:
            command = [sys.executable, __file__, "--one", "--parameters", str(millions), "--passes", text]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                raise SystemExit(run.stderr)
            peaks: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
            shown = [f"{peaks[step]:.2f}x" for step in _STEPS]
            table.add_row(f"{millions} M", repr(text), *shown, f"{max(peaks.values()):.2f}x")
    Console().print(table)


def _peaks(millions: int, passes: str) -> dict[str, float]:
    """Run one pipeline; return the peak of each step over the bytes of the weights."""
    width = math.isqrt(millions * 10**6 // _LAYERS) // 8 * 8
    started = _status("VmRSS")
    torch.manual_seed(0)
    layers = [layer for _ in range(_LAYERS) for layer in (nn.Linear(width, width), nn.ReLU())]
    model, data = nn.Sequential(*layers), torch.randn(_SAMPLES, width)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    peaks: dict[str, float] = {}

    def note(step: str) -> None:
        peaks[step] = (_status("VmHWM") - started) / weights
        Path("/proc/self/clear_refs").write_text("5")

    Path("/proc/self/clear_refs").write_text("5")
    job = Job.open(model, data)
    note("capture")
    outcome = job.run(Pipeline.parse(passes))
    note("passes")
    result = job.deliver(outcome)
    note("deliver")
    with tempfile.TemporaryDirectory() as directory:
        result.save(Path(directory) / "result")
        note("save")
    return peaks


def _status(field: str) -> int:
    """Return a figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


if __name__ == "__main__":
    typer.run(main)

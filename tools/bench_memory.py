"""Peak of host memory of each step of a run, as a multiple of the model's float weights.

    python tools/bench_memory.py                                          # the three cases below
    python tools/bench_memory.py --case mlp:100: --case mlp:100:prune

A case is a model, its millions of parameters, and a pipeline: `mlp`, layers of 2048 units; `decoder`, a transformer
with a head of 8192 words, whose blocks are 2048 wide, and which is not lowered. Weights are random, data too. Every run
is a process of its own; the peak is of what it holds in memory (Linux: VmHWM, reset before each step), the user's model
included, less what it held after a small model went through the same steps: Python and its libraries.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F  # noqa: N812

from graphopt.job.job import Job
from graphopt.pipeline.pipeline import Pipeline

sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.process_memory import memory

_CASES = ["mlp:400:", "mlp:100:prune,svd,int8", "decoder:700:prune"]
_SAMPLES = 64
_WIDTH = 2048
_STEPS = ("capture", "passes", "deliver", "save")
_WORDS, _TOKENS = 8192, 32


def main(
    case: Annotated[list[str] | None, typer.Option(help="MODEL:MILLIONS:PASSES; repeat for several")] = None,
    one: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measure every case and print a table."""
    if not Path("/proc/self/clear_refs").exists():
        raise typer.BadParameter("Peaks are read from /proc, which this system does not have: run it on Linux.")
    cases = case or _CASES
    if one:
        print(json.dumps(_measure(*cases[0].split(":", 2))))
        return
    table = Table("model", "parameters", "passes", *_STEPS, "peak", "seconds")
    for text in cases:
        kind, millions, passes = text.split(":", 2)
        run = subprocess.run([sys.executable, __file__, "--one", "--case", text], capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(run.stderr)
        peaks: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
        seconds = peaks.pop("seconds")
        shown = [f"{peaks[step]:.2f}x" if step in peaks else "" for step in _STEPS]
        table.add_row(kind, f"{millions} M", repr(passes), *shown, f"{max(peaks.values()):.2f}x", f"{seconds:.0f}")
    Console(width=120).print(table)


def _measure(kind: str, millions: str, passes: str) -> dict[str, float]:
    """Run one pipeline; return the peak of each step over the bytes of the weights."""
    make = {"mlp": _perceptron, "decoder": _decoder}[kind]
    _steps(*make(1, 64), passes, lowered=kind == "mlp", note=lambda _: None)
    torch.manual_seed(0)
    empty = memory("VmRSS")
    model, data = make(int(millions), _WIDTH)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    peaks: dict[str, float] = {}

    def note(step: str) -> None:
        if step:
            peaks[step] = (memory("VmHWM") - empty) / weights
        Path("/proc/self/clear_refs").write_text("5")

    note("")
    began = time.perf_counter()
    _steps(model, data, passes, lowered=kind == "mlp", note=note)
    return {**peaks, "seconds": time.perf_counter() - began}


def _steps(model: nn.Module, data: torch.Tensor, passes: str, *, lowered: bool, note: Callable[[str], None]) -> None:
    job = Job.open(model, data, target="onnxruntime" if lowered else None, cache=False)
    note("capture")
    outcome = job.run(Pipeline.parse(passes))
    note("passes")
    if lowered:
        result = job.deliver(outcome)
        note("deliver")
    else:
        result = job.undelivered(outcome)
    with tempfile.TemporaryDirectory() as directory:
        result.save(Path(directory) / "result")
        note("save")


def _perceptron(millions: int, width: int) -> tuple[nn.Module, torch.Tensor]:
    count = max(2, round(millions * 10**6 / width**2)) if width > 64 else 2
    layers = [layer for _ in range(count) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(_SAMPLES, width)


def _decoder(millions: int, width: int) -> tuple[nn.Module, torch.Tensor]:
    count = max(1, round((millions * 10**6 / width - 2 * _WORDS) / width / 12)) if width > 64 else 1
    return _Decoder(width, count), torch.randint(0, _WORDS, (_SAMPLES, _TOKENS))


class _Decoder(nn.Module):
    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_WORDS, width)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(count)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, _WORDS, bias=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.embedding(words))))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.before(x)
        heads = [layer(seen).unflatten(2, (16, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        attended = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.between(x))))


if __name__ == "__main__":
    typer.run(main)

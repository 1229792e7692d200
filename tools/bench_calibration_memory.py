"""By how much host memory grows while int8 calibrates an encoder, by the number of sequences.

    python tools/bench_calibration_memory.py                                                    # two layers, in minutes
    python tools/bench_calibration_memory.py --layers 12 --width 768 --tokens 128 --sequences 100 --sequences 1000

A row for each observer, every run a process of its own: the peak of what it holds while the pass plans (Linux: VmHWM,
reset before), less what it held when model and data were there and a first plan was made. It includes the integer
weights that the plan holds. Weights are random, tokens too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from process_memory import memory
from quantization_subjects import Encoder
from rich.console import Console
from rich.table import Table

from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.capturing.capture import capture
from graphopt.passes.int8 import Int8, Int8Options
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import build
from graphopt.testing import TensorSamples

_OBSERVERS = ("percentile", "entropy", "average")
_WORDS = 8192


def main(
    layers: Annotated[int, typer.Option(help="Blocks of the encoder.")] = 2,
    width: Annotated[int, typer.Option(help="Features of a token.")] = 384,
    tokens: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 64,
    sequences: Annotated[list[int] | None, typer.Option(help="How many; may be repeated.")] = None,
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure every observer with every number of sequences and print a table."""
    if not Path("/proc/self/clear_refs").exists():
        raise typer.BadParameter("Peaks are read from /proc, which this system does not have: run it on Linux.")
    counts = sequences or [32, 256]
    if one:
        print(json.dumps(_growth(layers, width, tokens, counts[0], one)))
        return
    table = Table("observer", *(f"{count} sequences, MB" for count in counts))
    size = [f"--layers={layers}", f"--width={width}", f"--tokens={tokens}"]
    for observer in _OBSERVERS:
        grown = []
        for count in counts:
            command = [sys.executable, __file__, *size, f"--sequences={count}", f"--one={observer}"]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                raise SystemExit(run.stderr)
            grown.append(f"{json.loads(run.stdout.splitlines()[-1]) / 1e6:.0f}")
            print(observer, count, grown[-1], file=sys.stderr, flush=True)
        table.add_row(observer, *grown)
    Console(width=120).print(table)


def _growth(layers: int, width: int, tokens: int, count: int, observer: str) -> int:
    """Return by how many bytes memory grows while one plan is made."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(0, _WORDS, (count, tokens))
    data = (ids, torch.ones_like(ids))
    program = capture(Encoder(_WORDS, width, layers).eval(), tuple(tensor[:2] for tensor in data))

    def plan(used: int) -> None:
        target = OnnxRuntimeBackend().description
        samples = TensorSamples(tuple(tensor[:used] for tensor in data))
        ctx = Context(original=program, targets=(target,), target=target, samples=samples)
        options = build("int8", Int8Options, {"observer": observer, "mode": "static", "samples": used})
        Int8(options).plan(program, ctx)

    plan(4)
    held = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    plan(count)
    return memory("VmHWM") - held


if __name__ == "__main__":
    typer.run(main)

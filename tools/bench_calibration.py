"""What each way to calibrate brings: an ablation of int8 over observers, corrections, equalization and rounding.

    python tools/bench_calibration.py --data DIR [--model resnet20 --model resnet8] [--seeds 3] [--test 10000]
                                      [--pipeline int8:observer=mse --pipeline equalize,int8]

A row per model and pipeline, run in ONNX Runtime on the test images of CIFAR-10: points of top-1 lost against float32,
and the signal-to-noise ratio of the logits in dB, each the mean (lowest, highest) over seeds, which draw other 1,024
calibration images; and the processor time of the passes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.capturing.capture import capture
from graphopt.ir.program import Program
from graphopt.measure.processor import said_of_processor
from graphopt.pipeline.context import Context
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.runner import run
from graphopt.testing import TensorSamples
from tools.cifar10 import images, trained_resnet

_CALIBRATION = 1024
_OBSERVERS = ("auto", "minmax", "average", "percentile", "mse", "entropy")
_PIPELINES = [
    *(f"int8:observer={observer}" for observer in _OBSERVERS),
    *(
        "int8:accuracy=fast",
        "int8:accuracy=best",
        "equalize,int8",
        "int8:weights=tensor",
        "equalize,int8:weights=tensor",
    ),
    *(f"int8:weight_bits=4:accuracy={accuracy}" for accuracy in ("fast", "balanced", "best")),
]


def main(
    data: Annotated[Path, typer.Option(help="Where CIFAR-10 and the trained ResNets lie.")],
    model: Annotated[list[str] | None, typer.Option(help="resnet8, resnet20 or resnet56; may be repeated.")] = None,
    pipeline: Annotated[list[str] | None, typer.Option(help="A pipeline; may be repeated.")] = None,
    seeds: Annotated[int, typer.Option(help="Draws of calibration images.")] = 3,
    test: Annotated[int, typer.Option(help="Test images used.")] = 10000,
) -> None:
    """Print a row for each model and pipeline."""
    torch.set_num_threads(1)
    table = Table(title=f"int8 on CIFAR-10, {test} test images, {seeds} seeds, {said_of_processor('model name')}")
    for column in ("model", "pipeline", "points lost", "SQNR, dB", "seconds"):
        table.add_column(column, justify="left" if column in ("model", "pipeline") else "right")
    with tempfile.TemporaryDirectory() as home, torch.no_grad():
        for name in model or ["resnet20", "resnet8"]:
            subject = _Subject(name, data, test, Path(home))
            for passes in pipeline or _PIPELINES:
                found = [subject.measured(passes, seed) for seed in range(seeds)]
                lost, ratio, seconds = ([one[i] for one in found] for i in range(3))
                row = (name, passes, _spread(lost, ".2f"), _spread(ratio, ".1f"), f"{np.median(seconds):.1f}")
                print(*row, sep="  ", file=sys.stderr, flush=True)
                table.add_row(*row)
    Console(width=120).print(table)


class _Subject:
    """One trained network with its images."""

    def __init__(self, name: str, data: Path, test: int, home: Path) -> None:
        normalised = name != "resnet8"
        self._pictures, self._labels = (part[:test] for part in images(data, "cifar10_test", normalised=normalised))
        self._training, _ = images(data, "cifar10_train_5k", normalised=normalised)
        self._program = capture(trained_resnet(data, int(name.removeprefix("resnet"))), (self._training[:2],))
        self._path = home / f"{name}.onnx"
        self._backend = OnnxRuntimeBackend()
        self._logits = self._run(
            run(Pipeline.parse("fold"), self._program, Context(original=self._program)).programs[""]
        )

    def measured(self, passes: str, seed: int) -> tuple[float, float, float]:
        """Return points of top-1 lost, SQNR of the logits in dB, and seconds of processor time that the passes took."""
        drawn = torch.randperm(len(self._training), generator=torch.Generator().manual_seed(seed))[:_CALIBRATION]
        ctx = Context(original=self._program, targets=(self._backend.description,), seed=seed)
        began = time.process_time()
        programs = run(
            Pipeline.parse(passes), self._program, ctx.with_data(TensorSamples((self._training[drawn],)))
        ).programs
        seconds = time.process_time() - began
        logits = self._run(programs[self._backend.name])
        noise = (logits - self._logits).square().sum()
        ratio = float(10 * torch.log10(self._logits.square().sum() / noise))
        return self._top1(self._logits) - self._top1(logits), ratio, seconds

    def _run(self, program: Program) -> Tensor:
        session = self._backend.lower(program, self._path).session(threads=1)
        return torch.cat([torch.from_numpy(session(part.numpy())[0]) for part in self._pictures.split(500)])

    def _top1(self, logits: Tensor) -> float:
        return 100 * float((logits.argmax(1) == self._labels).double().mean())


def _spread(values: Sequence[float], form: str) -> str:
    return f"{np.mean(values):{form}} ({min(values):{form}}, {max(values):{form}})"


if __name__ == "__main__":
    typer.run(main)

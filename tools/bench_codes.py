"""What weights in few bits cost: top-1 of ResNets on CIFAR-10 and the size of the file, with `codebook`.

    python tools/bench_codes.py --data DIR [--model resnet20 --model resnet56] [--seeds 1] [--test 10000]
                                [--pipeline codebook:bits=4 --pipeline codebook:codes=ternary]

A row per model and pipeline, run in ONNX Runtime on the test images: top-1 in percent, the mean (lowest, highest) over
seeds, which draw other 256 training images and begin clusters elsewhere; mean MB of the file; and processor seconds of
`graphopt.optimize`, the median: passes, capturing, lowering and verification, nothing cached. Float32 is the
first row of a model.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
import graphopt
from tools.cifar10 import images, top1, trained_resnet

_CALIBRATION = 256
_PIPELINES = [
    *(f"codebook:bits={bits}" for bits in (8, 4, 3, 2)),
    *("codebook:bits=3:group=1", "codebook:bits=2:group=1"),
    *("codebook:bits=8:vector=4", "codebook:codes=ternary", "codebook:codes=binary"),
    "codebook:bits=2:inputs=no",
]


def main(
    data: Annotated[Path, typer.Option(help="Where CIFAR-10 and the trained ResNets lie.")],
    model: Annotated[list[str] | None, typer.Option(help="resnet20 or resnet56; may be repeated.")] = None,
    pipeline: Annotated[list[str] | None, typer.Option(help="A pipeline; may be repeated.")] = None,
    seeds: Annotated[int, typer.Option(help="Draws of calibration images.")] = 1,
    test: Annotated[int, typer.Option(help="Test images used.")] = 10000,
) -> None:
    """Print a row for each model and pipeline."""
    torch.set_num_threads(1)
    table = Table(title=f"CIFAR-10, {test} test images, {seeds} seeds")
    for column in ("model", "pipeline", "top-1", "MB", "seconds"):
        table.add_column(column, justify="left" if column in ("model", "pipeline") else "right")
    training, _ = images(data, "cifar10_train_5k")
    pictures, labels = (part[:test] for part in images(data, "cifar10_test"))
    with tempfile.TemporaryDirectory() as home:
        for name in model or ["resnet20", "resnet56"]:
            resnet = trained_resnet(data, int(name.removeprefix("resnet")))
            for passes in ["fold", *(pipeline or _PIPELINES)]:
                found, sizes, seconds = [], [], []
                for seed in range(1 if passes == "fold" else seeds):
                    drawn = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))[:_CALIBRATION]
                    began = time.process_time()
                    result = graphopt.optimize(resnet, training[drawn], passes, seed=seed, bench=False, cache=False)
                    seconds.append(time.process_time() - began)
                    result.save(Path(home))
                    session = result.artifact.session(threads=1)
                    found.append(top1(lambda x, run=session: torch.from_numpy(run(x.numpy())[0]), pictures, labels))
                    sizes.append(result.artifact.size)
                spread = f"{np.mean(found):.2f} ({min(found):.2f}, {max(found):.2f})"
                row = (name, passes, spread, f"{np.mean(sizes) / 1e6:.3f}", f"{np.median(seconds):.0f}")
                print(*row, sep="  ", file=sys.stderr, flush=True)
                table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)

"""What 2:4 sparsity costs in accuracy before any training: CIFAR-10 ResNets, by criterion, refitted or not.

    python tools/bench_sparsity24.py --data DIR [--depths 20 56] [--samples 512] [--test 10000]

Every layer that TensorRT has sparse kernels for loses two of every four weights; the stem and the classifier stay
dense. Columns are the layers and the share of their weights that is zero, top-1, and the mean signal-to-noise ratio of
the layers' outputs on the calibration images.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from cifar10 import images, top1, trained_resnet
from rich.console import Console
from rich.table import Table

from graphopt.backends.tensorrt import TensorRTBackend
from graphopt.capturing import capture
from graphopt.context import Context
from graphopt.options import build
from graphopt.passes.sparsity24 import Sparsity24, Sparsity24Options
from graphopt.program import Program
from graphopt.testing import TensorSamples

_CHOICES = [("magnitude", False), ("sqnr", False), ("magnitude", True), ("sqnr", True)]
_TARGET = TensorRTBackend().description


def main() -> None:
    """Measure every combination and print the table."""
    options = _arguments()
    torch.set_num_threads(options.threads)
    test = tuple(tensor[: options.test] for tensor in images(options.data, "cifar10_test"))
    calibration = images(options.data, "cifar10_train_5k")[0][: options.samples]
    table = Table(title="top-1 in % before any training")
    for column in ("model", "criterion", "refit", "layers", "zeros", "dense", "sparse", "mean sqnr", "seconds"):
        table.add_column(column, justify="right")
    for depth in options.depths:
        program = capture(trained_resnet(options.data, depth), (calibration[:2],))
        dense = top1(program, *test)
        for criterion, refit in _CHOICES:
            cells = _measure(program, criterion, refit, calibration, test)
            row = (f"ResNet-{depth}", criterion, "yes" if refit else "no", *cells[:2], f"{dense:.2f}", *cells[2:])
            table.add_row(*row)
            print(row, flush=True)
    Console().print(table)


def _measure(
    program: Program, criterion: str, refit: bool, calibration: torch.Tensor, test: tuple[torch.Tensor, ...]
) -> tuple[str, ...]:
    given = {"criterion": criterion, "refit": refit, "samples": len(calibration)}
    pass_ = Sparsity24(build("sparsity24", Sparsity24Options, given))
    ctx = Context(original=program, targets=(_TARGET,), target=_TARGET, samples=TensorSamples((calibration,)))
    start = time.perf_counter()
    plan = pass_.plan(program, ctx)
    seconds = time.perf_counter() - start
    sparse = pass_.apply(program, plan)
    ratios = [float(str(entry["sqnr"])) for entry in plan.layers.values()]
    zeros = sum(int((tensor == 0).sum()) for tensor in plan.tensors.values())
    share = zeros / sum(tensor.numel() for tensor in plan.tensors.values())
    mean = sum(ratios) / len(ratios)
    return str(len(plan.sites)), f"{share:.2f}", f"{top1(sparse, *test):.2f}", f"{mean:.1f} dB", f"{seconds:.1f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with CIFAR-10 and the trained ResNets")
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--samples", type=int, default=512, help="calibration images")
    parser.add_argument("--test", type=int, default=10000, help="test images")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()

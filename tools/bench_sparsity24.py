"""What 2:4 sparsity costs in accuracy before any training: CIFAR-10 ResNets, by criterion, refitted or not.

    python tools/bench_sparsity24.py --data DIR [--depths 20 56] [--samples 512] [--test 10000] [--repeats 3]

Every layer that TensorRT has sparse kernels for loses two of every four weights; the stem and the classifier stay
dense. Each row is repeated with other calibration images, and the control with another random choice of weights in
the same layers: top-1 is the mean, in brackets the lowest and the highest. Other columns are the layers, the share of
their weights that is zero, and the mean signal-to-noise ratio of the layers' outputs on the calibration images.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from cifar10 import images, top1, trained_resnet
from rich.console import Console
from rich.table import Table

from graphopt.backends.tensorrt import TensorRTBackend
from graphopt.capturing.capture import capture
from graphopt.ir.program import Program
from graphopt.passes.sparsity24 import Sparsity24, Sparsity24Options, Sparsity24Plan
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import build
from graphopt.testing import TensorSamples

_WIDTH = 150  # columns that the table needs, whatever it is printed to
_CHOICES = [("magnitude", False), ("sqnr", False), ("magnitude", True), ("sqnr", True)]
_TARGET = TensorRTBackend().description


def main() -> None:
    """Measure every combination and print the table."""
    options = _arguments()
    torch.set_num_threads(options.threads)
    test = tuple(tensor[: options.test] for tensor in images(options.data, "cifar10_test"))
    draws = _draws(images(options.data, "cifar10_train_5k")[0], options.samples, options.repeats)
    table = Table(title="top-1 in % before any training")
    for column in ("model", "criterion", "refit", "layers", "zeros", "dense", "sparse", "mean sqnr", "seconds"):
        table.add_column(column, justify="right")
    for depth in options.depths:
        program = capture(trained_resnet(options.data, depth), (draws[0][:2],))
        dense = top1(program, *test)
        for criterion, refit in _CHOICES:
            found = [_measure(program, criterion, refit, calibration, test) for calibration in draws]
            _add(table, (f"ResNet-{depth}", criterion, "yes" if refit else "no"), dense, found)
        layers = _plan(program, "magnitude", False, draws[0])[0]
        control = [_control(program, layers, seed, test) for seed in range(options.repeats)]
        _add(table, (f"ResNet-{depth}", "random", "no"), dense, control)
    Console(width=max(Console().width, _WIDTH)).print(table)


@dataclass(frozen=True)
class _Found:
    layers: int
    zeros: float  # share of the weights of those layers
    top1: float  # in %
    sqnr: float | None  # mean of the layers in dB
    seconds: float


def _draws(source: torch.Tensor, samples: int, repeats: int) -> list[torch.Tensor]:
    """Draw calibration images, other ones for each repeat."""
    orders = (torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)) for seed in range(repeats))
    return [source[order[:samples]] for order in orders]


def _add(table: Table, head: tuple[str, ...], dense: float, found: list[_Found]) -> None:
    """Add one row, and print it as it is found."""
    values = [each.top1 for each in found]
    top = f"{sum(values) / len(values):.2f} ({min(values):.2f}-{max(values):.2f})"
    ratios = [each.sqnr for each in found if each.sqnr is not None]
    sqnr = f"{sum(ratios) / len(ratios):.1f} dB" if ratios else ""
    seconds = sum(each.seconds for each in found) / len(found)
    row = (*head, str(found[0].layers), f"{found[0].zeros:.2f}", f"{dense:.2f}", top, sqnr, f"{seconds:.1f}")
    table.add_row(*row)
    print(row, flush=True)


def _plan(program: Program, criterion: str, refit: bool, calibration: torch.Tensor) -> tuple[Sparsity24Plan, float]:
    given = {"criterion": criterion, "refit": refit, "samples": len(calibration)}
    pass_ = Sparsity24(build("sparsity24", Sparsity24Options, given))
    ctx = Context(original=program, targets=(_TARGET,), target=_TARGET).with_data(TensorSamples((calibration,)))
    start = time.perf_counter()
    plan = pass_.plan(program, ctx)
    return plan, time.perf_counter() - start


def _measure(
    program: Program, criterion: str, refit: bool, calibration: torch.Tensor, test: tuple[torch.Tensor, ...]
) -> _Found:
    plan, seconds = _plan(program, criterion, refit, calibration)
    ratios = [float(str(entry["sqnr"])) for entry in plan.layers.values()]
    return _found(program, plan, test, sum(ratios) / len(ratios), seconds)


def _control(program: Program, plan: Sparsity24Plan, seed: int, test: tuple[torch.Tensor, ...]) -> _Found:
    """Zero a random two of every four input channels' weights in the layers of a plan."""
    generator = torch.Generator().manual_seed(seed)
    state, tensors = program.state_dict(), {}
    for name in plan.tensors:
        weight = state[name].detach().movedim(1, -1)  # channels last; convolutions and linear layers
        scores = torch.rand((*weight.shape[:-1], weight.shape[-1] // 4, 4), generator=generator)
        kept = scores.argsort(-1).argsort(-1) < 2
        tensors[name] = (weight * kept.reshape(weight.shape)).movedim(-1, 1).contiguous()
    return _found(program, replace(plan, tensors=tensors), test, None, 0.0)


def _found(
    program: Program, plan: Sparsity24Plan, test: tuple[torch.Tensor, ...], sqnr: float | None, seconds: float
) -> _Found:
    zeros = sum(int((tensor == 0).sum()) for tensor in plan.tensors.values())
    share = zeros / sum(tensor.numel() for tensor in plan.tensors.values())
    return _Found(len(plan.sites), share, top1(Sparsity24().apply(program, plan), *test), sqnr, seconds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with CIFAR-10 and the trained ResNets")
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--samples", type=int, default=512, help="calibration images")
    parser.add_argument("--test", type=int, default=10000, help="test images")
    parser.add_argument("--repeats", type=int, default=3, help="draws of calibration images, and of the control")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""What pruning costs in accuracy before any training: CIFAR-10 ResNets, plain and compensated.

    python tools/bench_prune.py --data DIR [--depths 20 56] [--ratios 0.3 0.5] [--json OUT]

One row for each model, ratio and choice of axes: all of them, or the inner channels of every block alone. Columns are
the share of parameters left, how many times fewer operations, top-1 after plain removal, after re-estimating the
BatchNorm statistics, and after compensation, which is what the pass does by default; and the seconds that took.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
from cifar10 import images, top1, trained_resnet
from rich.console import Console
from rich.table import Table

from graphopt.capturing import capture
from graphopt.context import Context
from graphopt.cost import cost
from graphopt.distillation.statistics import estimate_statistics
from graphopt.options import build
from graphopt.passes.prune import Prune, PruneOptions
from graphopt.passes.pruning.reconstruction import with_tensors
from graphopt.program import Program
from graphopt.testing import TensorSamples

_AXES: dict[str, dict[str, object]] = {"all": {}, "inner": {"kinds": ("channels",), "skip": ("conv1*",)}}


@dataclasses.dataclass(frozen=True)
class Row:
    """One pruned model; accuracies in percent."""

    model: str
    axes: str
    ratio: float
    criterion: str
    parameters: float  # share that is left
    fewer_operations: float
    original: float
    plain: float
    statistics: float
    compensated: float
    seconds: float


def main() -> None:
    """Measure every combination and print the table."""
    options = _arguments()
    torch.set_num_threads(options.threads)
    test = tuple(tensor[: options.test] for tensor in images(options.data, "cifar10_test"))
    calibration = images(options.data, "cifar10_train_5k")[0][: options.samples]
    rows = []
    for depth in options.depths:
        program = capture(trained_resnet(options.data, depth), (calibration[:2],))
        accuracy = top1(program, *test)
        for axes in _AXES:
            for ratio in options.ratios:
                row = _measure(program, f"ResNet-{depth}", axes, ratio, options.criterion, calibration, test, accuracy)
                rows.append(row)
                print(row, flush=True)
    Console().print(_table(rows))
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


def _measure(
    program: Program,
    model: str,
    axes: str,
    ratio: float,
    criterion: str,
    calibration: torch.Tensor,
    test: tuple[torch.Tensor, ...],
    accuracy: float,
) -> Row:
    given = {"ratio": ratio, "criterion": criterion, "samples": len(calibration), "round_to": 1, **_AXES[axes]}
    pass_ = Prune(build("prune", PruneOptions, given))
    samples = TensorSamples((calibration,))
    start = time.perf_counter()
    plan = pass_.plan(program, Context(original=program, samples=samples))
    compensated = pass_.apply(program, plan)
    seconds = time.perf_counter() - start
    plain = pass_.apply(program, dataclasses.replace(plan, tensors={}))
    statistics = with_tensors(plain, estimate_statistics(plain, samples.batches(128)), "prune")
    before, after = cost(program), cost(plain)
    return Row(
        model,
        axes,
        ratio,
        criterion,
        after.parameters / before.parameters,
        before.flops / after.flops,
        accuracy,
        top1(plain, *test),
        top1(statistics, *test),
        top1(compensated, *test),
        seconds,
    )


def _table(rows: list[Row]) -> Table:
    table = Table(title="top-1 in % before any training")
    for field in dataclasses.fields(Row):
        table.add_column(field.name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in dataclasses.astuple(row)))
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with CIFAR-10 and the trained ResNets")
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--criterion", default="l2")
    parser.add_argument("--samples", type=int, default=1024, help="calibration images")
    parser.add_argument("--test", type=int, default=10000, help="test images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""What dropping residual blocks costs in accuracy before any training: CIFAR-10 ResNets, criteria side by side.

    python tools/bench_drop_blocks.py --data DIR [--depths 56] [--blocks 1 3 6 9] [--repeats 3] [--json OUT]

One row for each model and number of blocks; columns are the criteria, `random` as control. "output once" measures every
block once instead of again after each drop. Below: after re-estimating the BatchNorm statistics on the same unlabelled
images. Each is repeated with other calibration images and another seed: the mean, in brackets lowest and highest.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from cifar10 import images, top1, trained_resnet
from rich.console import Console
from rich.table import Table

from graphopt.capturing.capture import capture
from graphopt.distillation.statistics import estimate_statistics
from graphopt.ir.program import Program
from graphopt.measure.cost import cost
from graphopt.passes.drop_blocks import DropBlocks, DropBlocksOptions
from graphopt.passes.pruning.reconstruction import with_tensors
from graphopt.passes.residuals.removal import without
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import build
from graphopt.testing import TensorSamples

_WIDTH = 150  # columns that the table needs, whatever it is printed to
_CRITERIA: dict[str, dict[str, object]] = {
    "output": {"criterion": "output"},
    "output once": {"criterion": "output", "rescore": False},
    "influence": {"criterion": "influence"},
    "last": {"criterion": "last"},
    "random": {"criterion": "random"},
}


def main() -> None:
    """Measure every combination and print the table."""
    options = _arguments()
    torch.set_num_threads(options.threads)
    test = tuple(tensor[: options.test] for tensor in images(options.data, "cifar10_test"))
    draws = _draws(images(options.data, "cifar10_train_5k")[0], options.samples, options.repeats)
    table = Table(title="top-1 in % before any training; below, with statistics re-estimated", show_lines=True)
    for column in ("model", "blocks", "fewer operations", *_CRITERIA):
        table.add_column(column, justify="right")
    rows = []
    for depth in options.depths:
        program = capture(trained_resnet(options.data, depth), (draws[0][:2],))
        table.add_row(f"ResNet-{depth}", "0", "1.00", *[f"{top1(program, *test):.2f}"] * len(_CRITERIA))
        dropped = {
            name: [_order(program, given, max(options.blocks), draw, seed) for seed, draw in enumerate(draws)]
            for name, given in _CRITERIA.items()
        }
        for blocks in options.blocks:
            found = {
                name: [_measure(program, order[:blocks], draw, test) for order, draw in zip(orders, draws, strict=True)]
                for name, orders in dropped.items()
            }
            left = without(program, dropped["output"][0][:blocks], "drop_blocks")
            ratio = cost(program).flops / cost(left).flops
            cells = ["\n".join(map(_spread, zip(*each, strict=True))) for each in found.values()]
            table.add_row(f"ResNet-{depth}", str(blocks), f"{ratio:.2f}", *cells)
            rows.append({"model": f"ResNet-{depth}", "blocks": blocks, "fewer_operations": ratio, "top1": found})
            print(rows[-1], flush=True)
    Console(width=max(Console().width, _WIDTH)).print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def _draws(source: torch.Tensor, samples: int, repeats: int) -> list[torch.Tensor]:
    """Draw calibration images, other ones for each repeat."""
    orders = (torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)) for seed in range(repeats))
    return [source[order[:samples]] for order in orders]


def _spread(values: tuple[float, ...]) -> str:
    """Return "71.2 (70.1-72.4)"."""
    return f"{sum(values) / len(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def _order(program: Program, given: dict[str, object], blocks: int, calibration: torch.Tensor, seed: int) -> list[str]:
    """Return the results of the branches that go, in the order they go: a shorter run drops a prefix of it."""
    pass_ = DropBlocks(
        build("drop_blocks", DropBlocksOptions, {"blocks": blocks, "samples": len(calibration), **given})
    )
    start = time.perf_counter()
    plan = pass_.plan(program, Context(original=program, seed=seed).with_data(TensorSamples((calibration,))))
    names = {str(entry["result"]): name for name, entry in plan.blocks.items()}
    print(f"{given}: {time.perf_counter() - start:.0f} s, {[names[result] for result in plan.dropped]}", flush=True)
    return list(plan.dropped)


def _measure(
    program: Program, dropped: list[str], calibration: torch.Tensor, test: tuple[torch.Tensor, ...]
) -> tuple[float, float]:
    plain = without(program, dropped, "drop_blocks")
    batches = list(TensorSamples((calibration,)).batches(128))
    statistics = with_tensors(plain, estimate_statistics(plain, batches), "drop_blocks")
    return top1(plain, *test), top1(statistics, *test)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with CIFAR-10 and the trained ResNets")
    parser.add_argument("--depths", type=int, nargs="+", default=[56])
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 3, 6, 9])
    parser.add_argument("--samples", type=int, default=256, help="calibration images")
    parser.add_argument("--test", type=int, default=10000, help="test images")
    parser.add_argument("--repeats", type=int, default=3, help="draws of calibration images and of the control")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    return parser.parse_args()


if __name__ == "__main__":
    main()

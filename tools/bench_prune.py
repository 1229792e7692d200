"""What pruning costs in accuracy before any training: ResNet-56 on CIFAR-10, criteria against each other and a peer.

    python tools/bench_prune.py --data DIR [--flops 0.7 0.476] [--criteria l2 taylor random] [--scope local]
                                [--axes inner] [--samples 1024] [--peer] [--json OUT]

A row for each criterion and share of the operations to keep. Columns: how many times fewer operations, the share of
parameters left; top-1 in % after plain removal, after re-estimating the BatchNorm statistics on unlabelled images, and
after the least-squares compensation from the same images that the pass does by default; seconds that took. Random is
the control.

--axes inner leaves the residual widths whole and prunes the inner channels of every block, which Torch-Pruning can do
too: with --peer (pip install --no-deps torch-pruning) the same criterion, images and budget are given to it, and its
rows stand below ours: plain, and with the statistics re-estimated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
from cifar10 import BasicBlock, CifarResNet, images, top1, trained_resnet
from rich.console import Console
from rich.table import Table
from torch_pruning_peer import pruned_by_peer, with_statistics

from graphopt.capturing.capture import capture
from graphopt.distillation.statistics import estimate_statistics
from graphopt.ir.program import Program
from graphopt.measure.cost import cost
from graphopt.passes.prune import Prune, PruneOptions
from graphopt.passes.pruning.criteria import CRITERIA
from graphopt.passes.pruning.reconstruction import with_tensors
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import build
from graphopt.testing import TensorSamples

_AXES: dict[str, dict[str, object]] = {"all": {}, "inner": {"kinds": ("channels",), "skip": ("conv1*",)}}
_PEER_HAS = ("l1", "l2", "lamp", "fpgm", "random", "taylor")


@dataclasses.dataclass(frozen=True)
class Row:
    """One pruned model; accuracies in percent, None where there is no such thing."""

    by: str
    criterion: str
    scope: str
    steps: int
    fewer_operations: float
    parameters: float | None  # share that is left
    plain: float
    statistics: float
    compensated: float | None
    seconds: float


def main() -> None:
    """Measure every combination and print the table."""
    options = _arguments()
    torch.set_num_threads(options.threads)
    test = tuple(tensor[: options.test] for tensor in images(options.data, "cifar10_test"))
    calibration = images(options.data, "cifar10_train_5k")[0][: options.samples]
    model = trained_resnet(options.data, options.depth)
    program = capture(model, (calibration[:2],))
    title = f"ResNet-{options.depth}, unpruned {top1(program, *test):.2f} %, {len(calibration)} unlabelled images"
    print(title, flush=True)
    rows = []
    for flops in options.flops:
        for criterion in options.criteria:
            rows.append(_ours(program, criterion, flops, options, calibration, test))
            print(rows[-1], flush=True)
            if options.peer and criterion in _PEER_HAS:
                rows.append(_peers(model, criterion, flops, options, calibration, test))
                print(rows[-1], flush=True)
    Console(width=150).print(_table(rows, title))
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


def _ours(
    program: Program,
    criterion: str,
    flops: float,
    options: argparse.Namespace,
    calibration: torch.Tensor,
    test: tuple[torch.Tensor, ...],
) -> Row:
    given = {
        **_AXES[options.axes],
        "flops": flops,
        "criterion": criterion,
        "scope": options.scope,
        "steps": options.steps,
        "samples": len(calibration),
        "round_to": 1,
    }
    pass_ = Prune(build("prune", PruneOptions, given))
    ctx = Context(original=program).with_data(TensorSamples((calibration,)))
    start = time.perf_counter()
    plan = pass_.plan(program, ctx)
    compensated = pass_.apply(program, plan)
    seconds = time.perf_counter() - start
    plain = pass_.apply(program, dataclasses.replace(plan, tensors={}))
    statistics = with_tensors(plain, estimate_statistics(plain, ctx.need_samples(pass_.name, "").batches(128)), "prune")
    before, after = cost(program), cost(plain)
    return Row(
        "graphopt",
        criterion,
        options.scope,
        options.steps,
        before.flops / after.flops,
        after.parameters / before.parameters,
        top1(plain, *test),
        top1(statistics, *test),
        top1(compensated, *test),
        seconds,
    )


def _peers(
    model: CifarResNet,
    criterion: str,
    flops: float,
    options: argparse.Namespace,
    calibration: torch.Tensor,
    test: tuple[torch.Tensor, ...],
) -> Row:
    blocks = [module for module in model.modules() if isinstance(module, BasicBlock)]
    whole = [model.conv1, model.linear, *(block.conv2 for block in blocks)]
    ignored = whole if options.axes == "inner" else [model.linear]
    start = time.perf_counter()
    pruned, left = pruned_by_peer(model, criterion, flops, options.scope, calibration, ignored)
    seconds = time.perf_counter() - start
    statistics = top1(with_statistics(pruned, calibration), *test)
    parameters = sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in model.parameters())
    plain = top1(pruned, *test)
    return Row("Torch-Pruning", criterion, options.scope, 1, 1 / left, parameters, plain, statistics, None, seconds)


def _table(rows: list[Row], title: str) -> Table:
    table = Table(title=f"{title}: top-1 in % before any training")
    for field in dataclasses.fields(Row):
        table.add_column(field.name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*map(_cell, dataclasses.astuple(row)))
    return table


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with CIFAR-10 and the trained ResNets")
    parser.add_argument("--depth", type=int, choices=[20, 56], default=56)
    parser.add_argument("--flops", type=float, nargs="+", default=[0.7, 0.476], help="shares of the operations to keep")
    parser.add_argument("--criteria", nargs="+", choices=list(CRITERIA), default=list(CRITERIA))
    parser.add_argument("--scope", choices=["local", "global"], default="local")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--axes", choices=list(_AXES), default="inner")
    parser.add_argument("--samples", type=int, default=1024, help="unlabelled calibration images, 5,120 at most")
    parser.add_argument("--test", type=int, default=10000, help="test images")
    parser.add_argument("--peer", action="store_true", help="measure Torch-Pruning beside")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    return parser.parse_args()


if __name__ == "__main__":
    main()

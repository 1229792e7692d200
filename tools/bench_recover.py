"""How much accuracy `recover` wins back on ResNet-20 after half of every block's inner channels are gone.

    python tools/bench_recover.py --data DIR [--seeds 0 1] [--recover epochs=4:augment=none] [--prune PIPELINE]

Prints one row per stage: parameters, top-1 on the 10,000 test images, seconds. No labels are used but to score.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from cifar10 import images, top1, trained_resnet

from graphopt.capturing.capture import capture
from graphopt.ir.program import Program
from graphopt.measure.cost import cost
from graphopt.pipeline.context import Context
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.runner import run
from graphopt.testing import TensorSamples

# The shortcuts of option A freeze the residual widths of stages 2 and 3; `skip` keeps that of stage 1 as well.
_PRUNE = "prune:ratio=0.5:criterion=l1:round_to=1:skip=conv1*"


def main() -> None:
    """Run the benchmark and print its table."""
    options = _arguments()
    torch.set_num_threads(options.threads)
    data, labels = images(options.data, "cifar10_test")
    unlabelled, _ = images(options.data, "cifar10_train_5k")
    original = capture(trained_resnet(options.data, 20), (unlabelled[:2],))
    recover = ":".join(["recover", *([options.recover] if options.recover else [])])
    print(f"{'':56s} {'parameters':>10s} {'top-1 %':>8s} {'seconds':>8s}")
    _row("unoptimised", original, data, labels, 0.0)
    pruned, _ = _optimise(options.prune, original, original, unlabelled, 0)
    _row(options.prune, pruned, data, labels, 0.0)
    _row("recover:epochs=0", *_timed("recover:epochs=0", pruned, original, unlabelled[:2560], 0, data, labels))
    for seed in options.seeds:
        _row(f"{recover} (seed {seed})", *_timed(recover, pruned, original, unlabelled, seed, data, labels))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with CIFAR-10 and the trained ResNets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prune", default=_PRUNE, help="pipeline that damages the model")
    parser.add_argument("--recover", default="", help="options of recover other than the defaults")
    return parser.parse_args()


def _optimise(
    passes: str, program: Program, original: Program, samples: torch.Tensor, seed: int
) -> tuple[Program, list[object]]:
    ctx = Context(original=original, seed=seed).with_data(TensorSamples((samples,)))
    outcome = run(Pipeline.parse(passes), program, ctx)
    return outcome.programs[""], [plan for _, plan in outcome.plans]


def _timed(
    passes: str,
    program: Program,
    original: Program,
    samples: torch.Tensor,
    seed: int,
    data: torch.Tensor,
    labels: torch.Tensor,
) -> tuple[Program, torch.Tensor, torch.Tensor, float]:
    start = time.perf_counter()
    result, plans = _optimise(passes, program, original, samples, seed)
    seconds = time.perf_counter() - start
    print(f"  held-out losses: {plans[0].measured}")  # type: ignore[attr-defined]
    return result, data, labels, seconds


def _row(what: str, program: Program, data: torch.Tensor, labels: torch.Tensor, seconds: float) -> None:
    shown = f"{seconds:8.0f}" if seconds else ""
    print(f"{what:56s} {cost(program).parameters:10,d} {top1(program, data, labels):8.2f} {shown}", flush=True)


if __name__ == "__main__":
    main()

"""How much accuracy `recover` wins back on a ResNet of CIFAR-10 after half of every block's inner channels are gone.

    python tools/bench_recover.py --data DIR [--seeds 0 1] [--recover epochs=4:lr=0.03 ...] [--prune PIPELINE]
                                  [--depth 20] [--images 5120]

Prints one row per stage and per set of options: parameters, top-1 on the 10,000 test images, how often the
unoptimised network says the same, seconds. No labels are used but to score.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from cifar10 import classes, images, trained_resnet, training_images

from graphopt.capturing.capture import capture
from graphopt.ir.program import Program
from graphopt.measure.cost import cost
from graphopt.pipeline.context import Context
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.plan import Plan
from graphopt.pipeline.runner import run
from graphopt.testing import TensorSamples

# The shortcuts of option A freeze the residual widths of stages 2 and 3; `skip` keeps that of stage 1 as well.
_PRUNE = "prune:ratio=0.5:criterion=l1:round_to=1:skip=conv1*"
_RECOVER = ["stages=statistics", "stages=blocks:epochs=4", "epochs=4:lr=0.02:batch_size=32:alpha=100"]


def main() -> None:
    """Run the benchmark and print its table."""
    options = _arguments()
    torch.set_num_threads(options.threads)
    data, labels = images(options.data, "cifar10_test")
    unlabelled = training_images(options.data, options.images)[0]
    original = capture(trained_resnet(options.data, options.depth), (unlabelled[:2],))
    said = classes(original, data)
    print(f"{'':56s} {'parameters':>10s} {'top-1 %':>8s} {'as before %':>11s} {'seconds':>8s}")

    def row(what: str, program: Program, seconds: float) -> None:
        found = classes(program, data)
        top1, agreed = (100 * float((found == other).float().mean()) for other in (labels, said))
        print(f"{what:56s} {cost(program).parameters:10,d} {top1:8.2f} {agreed:11.2f} {seconds:8.0f}", flush=True)

    row("unoptimised", original, 0.0)
    start = time.perf_counter()
    pruned, _ = _optimise(options.prune, original, original, unlabelled, 0)
    row(options.prune, pruned, time.perf_counter() - start)
    for seed in options.seeds:
        for text in options.recover:
            passes = ":".join(["recover", *([text] if text else [])])
            start = time.perf_counter()
            result, plan = _optimise(passes, pruned, original, unlabelled, seed)
            row(f"{passes} (seed {seed})", result, time.perf_counter() - start)
            print(f"  {plan.summary()}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with CIFAR-10 and the trained ResNets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=20, choices=[20, 56])
    parser.add_argument("--images", type=int, default=5120, help="of the training set; more than that need all of it")
    parser.add_argument("--prune", default=_PRUNE, help="pipeline that damages the model")
    parser.add_argument("--recover", nargs="+", default=_RECOVER, help="options of recover, one run for each")
    return parser.parse_args()


def _optimise(
    passes: str, program: Program, original: Program, samples: torch.Tensor, seed: int
) -> tuple[Program, Plan]:
    ctx = Context(original=original, seed=seed).with_data(TensorSamples((samples,)))
    outcome = run(Pipeline.parse(passes), program, ctx)
    return outcome.programs[""], outcome.plans[-1][1]


if __name__ == "__main__":
    main()

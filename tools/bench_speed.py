"""How much of the operations that pruning saves the runtime saves in time: ResNet-50 at 4x fewer, in ONNX Runtime.

    python tools/bench_speed.py [--model resnet50] [--flops 0.25] [--scope local] [--round-to N] [--seconds 10]

Weights are random: time does not depend on them. Prints the MAC ratio, the latency ratio (one thread, batch 1, median
and quartiles of paired runs) and the efficiency, latency ratio over MAC ratio.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import types
from pathlib import Path

import torch

from graphopt.capturing.capture import capture
from graphopt.measure.bench import Spread, compare
from graphopt.measure.cost import cost
from graphopt.passes.prune import Prune, PruneOptions
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import build
from graphopt.pipeline.registry import backend

# The PyPI wheel of torchvision imports beside a CPU build of torch once this module exists.
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))


def main() -> None:
    """Prune, lower both, time them in turn."""
    options = _arguments()
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(options.model, weights=None).eval()
    program = capture(model, (torch.randn(2, 3, 224, 224),))
    runtime = backend("onnxruntime")
    given = {"flops": options.flops, "scope": options.scope, "round_to": options.round_to, "criterion": "random"}
    pass_ = Prune(build("prune", PruneOptions, given))
    plan = pass_.plan(program, Context(original=program, targets=(runtime.description,)))
    pruned = pass_.apply(program, plan)
    fewer = cost(program).flops / cost(pruned).flops
    with tempfile.TemporaryDirectory() as home:
        before, after = (
            runtime.lower(one, Path(home) / f"{name}.onnx") for name, one in (("before", program), ("after", pruned))
        )
        pair = compare(before, after, seconds=options.seconds).recorded
    print(f"{options.model}: {fewer:.2f}x fewer operations, {len(plan.groups)} groups pruned, {plan.summary()}")
    for name, ratio in (("wall clock", pair.wall_ratio), ("CPU time", pair.cpu_ratio)):
        print(f"{name}: {_text(ratio)} faster, {ratio.median / fewer:.2f} of the operations saved")


def _text(spread: Spread) -> str:
    return f"{spread.median:.2f}x ({spread.lower:.2f}-{spread.upper:.2f})"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="a classification model of torchvision")
    parser.add_argument("--flops", type=float, default=0.25, help="share of the operations to keep")
    parser.add_argument("--scope", choices=["local", "global"], default="local")
    parser.add_argument("--round-to", type=int, help="multiple of channel counts; the runtime's alignment by default")
    parser.add_argument("--seconds", type=float, default=10.0, help="time to spend on each kind of session")
    return parser.parse_args()


if __name__ == "__main__":
    main()

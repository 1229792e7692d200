"""What a step of training costs: one group for each tensor, as each has a rate of its own, against one for all.

    python tools/bench_step.py [--device cuda] [--batch 64] [--rounds 20]

Both train a ResNet-20 as a captured program, in turn; median milliseconds with the lowest and the highest, of the whole
step and of the optimizer alone: of the processor on a CPU, which others may share, of the clock elsewhere.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from cifar10 import CifarResNet

from graphopt.capturing.capture import capture
from graphopt.distillation.optimizer import RelativeAdamW
from graphopt.ir.program import Program


def main() -> None:
    """Time steps of both and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    image = torch.randn(2, 3, 32, 32, device=options.device)
    program = capture(CifarResNet(20).eval().to(options.device), image)
    ways = {
        name: _step(program.copy(share_tensors=False).train(), optimizer, options.batch)
        for name, optimizer in {"a group for each tensor": _groups, "one for all, fused": _one}.items()
    }
    for step in ways.values():
        step()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, step in ways.items():
            times[name].append(step())
    for name, found in times.items():
        whole, part = ([1e3 * pair[at] for pair in found] for at in range(2))
        print(f"{name:24s} step {_shown(whole)}   optimizer {_shown(part)}")
    ratios = [one[1] / other[1] for one, other in zip(*times.values(), strict=True)]
    print(f"{'ratio of optimizers':24s} {_shown(ratios)}")


def _groups(program: Program) -> torch.optim.Optimizer:
    sizes = [(parameter, float(parameter.detach().square().mean().sqrt())) for parameter in program.parameters()]
    groups = [{"params": [parameter], "lr": 0.03 * max(size, 1e-3)} for parameter, size in sizes]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _one(program: Program) -> torch.optim.Optimizer:
    return RelativeAdamW(program.parameters(), 0.03)


def _step(
    program: Program, make: Callable[[Program], torch.optim.Optimizer], batch: int
) -> Callable[[], tuple[float, float]]:
    optimizer = make(program)
    x = torch.randn(batch, 3, 32, 32, device=program.device)

    def step() -> tuple[float, float]:
        """Return the seconds of a step, and of its optimizer."""
        began = _now(x)
        optimizer.zero_grad()
        program(x).square().mean().backward()
        between = _now(x)
        optimizer.step()
        ended = _now(x)
        return ended - began, ended - between

    return step


def _now(x: torch.Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
        return time.perf_counter()
    return time.process_time()


def _shown(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()

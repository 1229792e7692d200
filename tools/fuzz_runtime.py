"""Find what ONNX Runtime computes otherwise than torch: its optimizer turns operators into others, some of them wrong.

    python tools/fuzz_runtime.py --shard 0/4 --seed 0 --time 15          # minutes
    python tools/fuzz_runtime.py --only '*softmax*' --without-breakers   # what is known to be wrong is found again

Every operator that the optimizer knows, every pair of them, and every operator of torch's own tests becomes a program
with integers before, between and behind (`fuzz_runtime_cases`); it is lowered as users' programs are, with every
optimizer on, and verified as theirs are. Several cases make one program. What has no ONNX form, and what capture
refuses, is counted, no more. The exit code is 1 where something is wrong: it needs an entry in
`backends/onnxruntime/breakers.py`, or another way to be written.
"""

from __future__ import annotations

import collections
import itertools
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import onnxruntime
import torch
import typer
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from graphopt.backends.onnx_execution.session import SessionSettings
from graphopt.backends.onnxruntime import OnnxRuntimeBackend, breakers
from graphopt.backends.onnxruntime.fusion import kernel_counts
from graphopt.capturing.capture import capture
from graphopt.errors import GraphOptError, LoweringError
from tools.fuzz_runtime_cases import MAKERS, Case, described, pair

Make = Callable[[], Case | None]

_TOGETHER = 12  # cases of one program
_WRONG = ("computes other integers", "computes something else", "computes output")  # how verification complains


@dataclass
class Found:
    """What became of the cases.

    Attributes:
        wrong: name of the case, what verification says, and the kernels that ran.
        counts: "right", "wrong", "no form", or why there was no case.
    """

    wrong: list[tuple[str, str, str]] = field(default_factory=list)
    counts: collections.Counter[str] = field(default_factory=collections.Counter)


class Together(nn.Module):
    """Computes several cases."""

    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.cases = nn.ModuleList(cases)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """Compute each."""
        return [case(x) for case, x in zip(self.cases, xs, strict=True)]


def main(
    shard: Annotated[str, typer.Option(help="which part of how many to run: 0/4")] = "0/1",
    seed: Annotated[int, typer.Option(help="of every choice")] = 0,
    minutes: Annotated[float, typer.Option("--time", help="minutes to stop after")] = 60.0,
    only: Annotated[str, typer.Option(help="a glob of names of cases")] = "*",
    without_breakers: Annotated[bool, typer.Option("--without-breakers", help="avoid nothing that is known")] = False,
) -> None:
    """Run one part of the cases and print what is wrong."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if without_breakers:
        breakers.BREAKERS = {}
    part, parts = map(int, shard.split("/"))
    makers = _makers(seed, only)[part::parts]
    found, end = Found(), time.monotonic() + 60 * minutes
    for made in _programs(makers, found):
        known = len(found.wrong)
        examine(made, found)
        for name, said, kernels in found.wrong[known:]:
            print(f"{name}\n  {said}\n  {kernels}", flush=True)
        if time.monotonic() > end:
            break
    looked = f"onnxruntime {onnxruntime.__version__}: {found.counts.total()} of {len(makers)} cases looked at"
    counts = ", ".join(f"{count} {what}" for what, count in sorted(found.counts.items()))
    Console(stderr=True).print(escape(f"{looked}: {counts}"), soft_wrap=True)
    raise typer.Exit(bool(found.wrong))


def _makers(seed: int, only: str) -> list[Make]:
    """Return makers of every case, in an order in which any part of them is a sample."""
    singles = [((name,), seed + again) for name in MAKERS for again in range(16)]
    pairs = [(names, seed) for names in itertools.product(MAKERS, repeat=2)]
    chosen = [item for item in (*singles, *pairs) if fnmatchcase(" ".join(item[0]), only)]
    makers: list[Make] = [lambda item=item: pair(*item) for item in chosen]  # type: ignore[misc]
    if only == "*":
        makers += described(seed)
    random.Random(seed).shuffle(makers)
    return makers


def _programs(makers: Sequence[Make], found: Found) -> Iterator[list[Case]]:
    """Yield the cases of one program after the other."""
    waiting: dict[bool, list[Case]] = {True: [], False: []}
    for make in makers:
        case = make()
        if case is None:
            found.counts["that do not fit"] += 1
            continue
        held = waiting[case.fixed]
        held.append(case)
        if len(held) == _TOGETHER:
            yield held
            waiting[case.fixed] = []
    for held in waiting.values():
        if held:
            yield held


def examine(cases: Sequence[Case], found: Found) -> None:
    """Lower and verify cases as one program, and where that fails half by half."""
    with TemporaryDirectory() as folder:
        what, said, kernels = _examined(cases, Path(folder) / "onnxruntime.onnx")
    if what == "right" or len(cases) == 1:
        found.counts[what] += len(cases)
        if what == "wrong":
            found.wrong.append((cases[0].name, said, kernels))
        return
    half = len(cases) // 2
    examine(cases[:half], found)
    examine(cases[half:], found)


def _examined(cases: Sequence[Case], path: Path) -> tuple[str, str, str]:
    """Return what became of cases, what was said, and the kernels that ran."""
    backend = OnnxRuntimeBackend()
    data = [case.data for case in cases]
    fixed = {"xs": [{0: None} for _ in cases]} if cases[0].fixed else None
    examples = data if cases[0].fixed else [x[:2] for x in data]
    try:
        program = capture(Together(cases).eval(), (examples,), dynamic_shapes=fixed)
        artifact = backend.lower(program, path)
    except GraphOptError as err:
        return f"without an ONNX form ({type(err).__name__})", str(err), ""
    try:
        backend.verify(artifact, program, tuple(x.numpy() for x in data))
    except LoweringError as err:
        counts = kernel_counts(path, SessionSettings.of(artifact.session_options))
        kind = "wrong" if any(word in str(err) for word in _WRONG) else "that the runtime fails on"
        return kind, str(err), " ".join(f"{count}x{name}" for name, count in counts.items())
    return "right", "", ""


if __name__ == "__main__":
    typer.run(main)

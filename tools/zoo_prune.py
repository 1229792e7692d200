"""Prune every architecture of a zoo and prove each result right.

    python tools/zoo_prune.py --family torchvision
    python tools/zoo_prune.py --family timm --only 'swin*' --ratio 0.3

Each model is captured and put through `prune` with no hints, the result is run, its outputs' shapes
and its share of removed parameters are checked, and masked equivalence is proved in float64 with random parameters.
One model runs per process, so that memory is given back and a crash costs one row.
"""

from __future__ import annotations

import concurrent.futures
import enum
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import fx
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parent))

import zoo_models
from zoo_subject import Subject

from graphopt.axes.infer import infer
from graphopt.axes.proof.masked import check_masked_equivalence, check_slices
from graphopt.axes.proof.value import CannotProveError
from graphopt.capturing.capture import capture
from graphopt.errors import CaptureError, VerifyError
from graphopt.ir.program import Program
from graphopt.passes.prune import Prune, PruneOptions
from graphopt.pipeline.context import Context

_LEAST_REMOVED = 0.3  # of the parameters, at a ratio of one half
_EXACT = "exact"
_REFUSED = "refused"  # nothing may go, and it is said why


class Criterion(enum.Enum):
    """The criteria of `prune`."""

    L1 = "l1"
    L2 = "l2"
    RANDOM = "random"


@dataclass(slots=True)
class Row:
    """What was found out about one architecture."""

    family: str
    name: str
    verdict: str = "crashed"
    nodes: int = 0
    groups: int = 0
    before: int = 0
    after: int = 0
    capture_seconds: float = 0.0
    analysis_seconds: float = 0.0
    proof_seconds: float = 0.0
    error: float | None = None
    unknown: list[str] = field(default_factory=list)
    message: str = ""

    @property
    def removed(self) -> float:
        """Return the share of parameters that are gone."""
        return 1 - self.after / self.before if self.before else 0.0


def examine(family: str, name: str, ratio: float, criterion: Criterion) -> Row:
    """Capture, prune and prove one architecture."""
    row = Row(family, name)
    torch.manual_seed(0)
    subject = zoo_models.families()[family]()[name]()
    try:
        _examine(row, subject, ratio, criterion)
    except CaptureError as err:
        row.verdict, row.message = "capture failed", str(err)
    except CannotProveError as err:
        row.verdict, row.message = "cannot prove", str(err)
    except VerifyError as err:
        row.verdict, row.message = "not equal", str(err)
    except Exception as err:  # one row of the table: whatever went wrong is the finding
        row.verdict, row.message = "failed", f"{type(err).__name__}: {err}"
    return row


def _examine(row: Row, subject: Subject, ratio: float, criterion: Criterion) -> None:
    start = time.perf_counter()
    program = capture(subject.model, subject.args, subject.kwargs, share_tensors=True)
    row.capture_seconds = time.perf_counter() - start
    gm = program.graph_module
    row.nodes = len(gm.graph.nodes)
    row.before = _count(gm)
    start = time.perf_counter()
    axes = infer(gm)
    row.analysis_seconds = time.perf_counter() - start
    row.unknown = sorted(axes.unknown)
    row.groups = len(axes.groups())
    del axes
    prune = Prune(PruneOptions(ratio=ratio, criterion=criterion.value))
    plan = prune.plan(program, Context(program))
    pruned = prune.apply(program, plan).graph_module
    row.after = _count(pruned)
    _same_shapes(program, pruned)
    check_slices(gm, pruned, plan.kept)
    start = time.perf_counter()
    row.error = check_masked_equivalence(gm, pruned, plan.kept, program.example_args, program.example_kwargs)
    row.proof_seconds = time.perf_counter() - start
    enough = row.removed >= _LEAST_REMOVED * ratio / 0.5 or row.family in zoo_models.STRUCTURES
    row.verdict = _EXACT if enough else "too little removed"
    if not plan.groups:
        row.verdict = _REFUSED
        row.message = "; ".join(dict.fromkeys(refusal.reason for refusal in plan.refusals))


def _same_shapes(program: Program, pruned: fx.GraphModule) -> None:
    """Run both and compare the sizes of their outputs, but for those that depend on what the model computes."""
    fixed = [
        [isinstance(size, int) for size in value.meta["val"].shape]
        for value in program.graph.output_node().all_input_nodes
        if isinstance(value.meta["val"], torch.Tensor)
    ]

    def shapes(gm: Any) -> list[tuple[int, ...]]:
        with torch.no_grad():
            outputs = pytree.tree_leaves(gm(*program.example_args, **program.example_kwargs))
        tensors = [leaf for leaf in outputs if isinstance(leaf, torch.Tensor)]
        if len(tensors) != len(fixed):
            return [tuple(leaf.shape) for leaf in tensors]
        return [
            tuple(s if f else -1 for s, f in zip(t.shape, flags, strict=True))
            for t, flags in zip(tensors, fixed, strict=True)
        ]

    before, after = shapes(program.graph_module), shapes(pruned)
    if before != after:
        raise VerifyError(f"output shapes were {before} and are {after}")


def _count(gm: fx.GraphModule) -> int:
    return sum(parameter.numel() for parameter in gm.parameters())


def _in_process(family: str, name: str, ratio: float, criterion: Criterion, timeout: float) -> Row:
    """Examine one architecture in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "row.json"
        command = [sys.executable, __file__, "--family", family, "--one", name, "--ratio", str(ratio)]
        command += ["--criterion", criterion.value]
        environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **os.environ}
        try:
            done = subprocess.run(
                [*command, "--json", str(result)], capture_output=True, text=True, timeout=timeout, env=environment
            )
        except subprocess.TimeoutExpired:
            return Row(family, name, "timed out", message=f"after {timeout:.0f} s")
        if not result.exists():
            return Row(family, name, message=f"exit code {done.returncode}: {done.stderr[-500:]}")
        fields: dict[str, Any] = json.loads(result.read_text())
        return Row(**fields)


def _table(rows: list[Row]) -> Table:
    table = Table(title=f"{sum(row.verdict == _EXACT for row in rows)} of {len(rows)} exact")
    for column in ("model", "nodes", "groups", "parameters", "after", "removed", "analysis", "error", "verdict"):
        table.add_column(column, justify="left" if column in ("model", "verdict") else "right")
    for row in rows:
        table.add_row(
            row.name,
            str(row.nodes),
            str(row.groups),
            f"{row.before / 1e6:.2f} M",
            f"{row.after / 1e6:.2f} M",
            f"{row.removed:.1%}",
            f"{row.analysis_seconds:.2f} s",
            "" if row.error is None else f"{row.error:.1e}",
            row.verdict,
            style="" if row.verdict == _EXACT else "red",
        )
    return table


def main(
    family: Annotated[str, typer.Option(help=f"{', '.join(zoo_models.families())}, or all")] = "torchvision",
    only: Annotated[str, typer.Option(help="names to run, as a glob")] = "*",
    ratio: Annotated[float, typer.Option(help="share of each group to remove", min=0.0, max=1.0)] = 0.5,
    criterion: Annotated[Criterion, typer.Option(help="what decides which indices go")] = Criterion.L2,
    jobs: Annotated[int, typer.Option(help="models at a time", min=1)] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="where to write all figures")] = None,
    timeout: Annotated[float, typer.Option(help="seconds for one model")] = 900.0,
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Prune every architecture of a family and prove the results."""
    if one:
        assert json_path is not None
        json_path.write_text(json.dumps(asdict(examine(family, one, ratio, criterion))))
        return
    wanted = list(zoo_models.families()) if family == "all" else [family]
    todo = [(f, name) for f in wanted for name in zoo_models.families()[f]() if fnmatch.fnmatch(name, only)]
    rows: list[Row] = []
    console = Console(stderr=True)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool, Progress(console=console) as progress:
        task = progress.add_task("pruning", total=len(todo))
        for row in pool.map(lambda item: _in_process(item[0], item[1], ratio, criterion, timeout), todo):
            rows.append(row)
            progress.advance(task)
            if row.verdict != _EXACT:
                progress.console.print(f"{row.family}/{row.name}: {row.verdict}: {row.message}", markup=False)
            if json_path is not None:
                json_path.write_text(json.dumps([asdict(r) for r in rows], indent=1))
    Console(width=140).print(_table(rows))
    raise typer.Exit(0 if all(row.verdict in (_EXACT, _REFUSED) for row in rows) else 1)


if __name__ == "__main__":
    typer.run(main)

"""Every pass on the CPU and on an accelerator: whether both decide alike and come to the same.

    python tools/check_device.py --device cuda:0
    python tools/check_device.py --device cuda:0 --only '*recurrent*'

Some thirty small models go through pipelines that hold every built-in pass and every criterion, once from the CPU and
once from the device, and are lowered and verified both times. Where two channels are worth the same to the last digit
another may go, so what is compared is how many sites each step rewrites, and how far the artifact is off the model;
the table shows how much of the plans is the same. The exit code is 1 where a model fails on one side only, a step
rewrites more or fewer sites, a program comes back on another device, or its artifact is further off by a quarter and a
thousandth of the largest output.
"""

from __future__ import annotations

import copy
import fnmatch
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import graphopt
from graphopt.ir.devices import device_called
from graphopt.job.result import Result

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.models import Depthwise, FusedAttention, Residual
from tools.result_digests import cases, model_of

_FURTHER = (
    *(f"prune:criterion={name}:round_to=1" for name in ("l1", "fpgm", "bn_scale", "lamp", "activation", "obd")),
    "prune:ratio=0.4:scope=global:steps=2:round_to=1:compensate=no",
    "svd:rank=4,fold",
    "sparsity24:criterion=sqnr:force=yes",
    "int8:observer=percentile:weights=tensor",
    "equalize:gain=0,int8:observer=entropy:accuracy=best",
    "int8:observer=average:weight_bits=4",
    "drop_blocks:blocks=1:criterion=influence",
)
_CLOSE = 1.25  # errors of two roundings of one thing
_NOISE = 1e-3  # of the outputs' largest value


@dataclass(frozen=True)
class Compared:
    """What two runs of one pipeline made.

    Attributes:
        name: of the model.
        passes: the pipeline.
        decisions: how many numbers and names the plans of the CPU hold.
        same: how many of them those of the device hold too, numbers to a thousandth.
        errors: largest difference of an artifact to the model over the largest output, on the CPU and on the device.
        seconds: what each run took.
        wrong: what must not be, "" if all is well.
        note: why nothing was compared, "" where it was.
    """

    name: str
    passes: str
    decisions: int
    same: int
    errors: tuple[float, float]
    seconds: tuple[float, float]
    wrong: str
    note: str = ""


def main(
    device: Annotated[str, typer.Option(help="cuda:0, or auto for the accelerator that is there")] = "auto",
    only: Annotated[str, typer.Option(help="names of models, as a shell pattern")] = "*",
) -> None:
    """Compare and print a table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    chosen = device_called(device)
    if chosen.type == "cpu":
        raise typer.BadParameter("There is no accelerator here to compare the CPU with.")
    print(f"torch {torch.__version__}, {chosen}")
    table = Table("model", "passes", "decisions", "the same", "error, CPU", "device", "seconds", "device", "")
    failed = False
    for found in compare(chosen, only):
        shown = [f"{value:.2g}" for value in (*found.errors, *found.seconds)]
        table.add_row(
            found.name, found.passes, str(found.decisions), str(found.same), *shown, found.wrong or found.note
        )
        print(
            f"{found.name}, {found.passes}: {found.wrong or found.note or 'as on the CPU'}", file=sys.stderr, flush=True
        )
        failed |= bool(found.wrong)
    Console().print(table)
    sys.exit(failed)


def compare(device: torch.device, only: str = "*") -> Iterator[Compared]:
    """Run every case on the CPU and on a device."""
    further = [(kind.__name__, *model_of(kind), passes, None) for kind, passes in _further()]
    for name, model, data, passes, dynamic in (*cases(), *further):
        if not fnmatch.fnmatchcase(name, only):
            continue
        there = copy.deepcopy(model).to(device)
        if not _runs(there, data, device):
            yield Compared(name, passes, 0, 0, (0.0, 0.0), (0.0, 0.0), "", "the model itself does not run there")
            continue
        (one, first), (other, second) = (_run(side, data, passes, dynamic) for side in (model, there))
        if isinstance(one, str) or isinstance(other, str):
            wrong = "" if one == other else f"CPU: {_said(one)}; device: {_said(other)}"
            yield Compared(name, passes, 0, 0, (0.0, 0.0), (first, second), wrong, "" if wrong else _said(one))
            continue
        plans = [[_leaves(plan.to_json()) for plan in result.plans] for result in (one, other)]
        pairs = [(leaf, twin.get(path)) for plan, twin in zip(*plans, strict=False) for path, leaf in plan.items()]
        errors = tuple(map(_error_of_artifacts, (one, other)))
        same = sum(_alike(*pair) for pair in pairs)
        yield Compared(name, passes, len(pairs), same, errors, (first, second), _wrong(one, other, device, errors))


def _further() -> Iterator[tuple[Any, str]]:
    for passes in _FURTHER:
        yield (Depthwise if "bn_scale" not in passes and "drop" not in passes else Residual), passes
    yield FusedAttention, "prune:criterion=taylor:round_to=1,svd:energy=0.9"


def _run(model: Any, data: Any, passes: str, dynamic: Any) -> tuple[Result | str, float]:
    started = time.perf_counter()
    try:
        found: Result | str = graphopt.optimize(model, data, passes, dynamic_shapes=dynamic, bench=False, cache=False)
    except graphopt.GraphOptError as err:
        found = str(err)
    return found, time.perf_counter() - started


def _runs(model: Any, data: Any, device: torch.device) -> bool:
    """Whether a model runs on a device at all: one may make tensors on the CPU, or torch lack a kernel."""
    named = data if isinstance(data, dict) else {"": data}
    given = {name: tensor[:4].to(device) for name, tensor in named.items()}
    try:
        with torch.no_grad():
            model(**given) if isinstance(data, dict) else model(*given.values())
    except RuntimeError:
        return False
    return True


def _said(found: Result | str) -> str:
    return found if isinstance(found, str) else "it runs"


def _error_of_artifacts(result: Result) -> float:
    rows = [row for row in result.report.rows if row.target and row.size is not None]  # of a pass there is no file
    return max(row.error.relative for row in rows if row.error is not None)


def _wrong(one: Result, other: Result, device: torch.device, errors: tuple[float, ...]) -> str:
    elsewhere = {str(program.device) for program in other.programs.values()} - {str(device)}
    if elsewhere:
        return f"the program came back on {', '.join(elsewhere)}"
    steps, there = ([f"{plan.pass_name} {len(plan.sites)}" for plan in result.plans] for result in (one, other))
    if steps != there:
        return f"sites on the CPU: {', '.join(steps)}; on the device: {', '.join(there)}"
    if errors[1] > errors[0] * _CLOSE + _NOISE:
        return "the artifact is further off"
    return ""


def _leaves(data: Any, path: str = "") -> dict[str, Any]:
    if isinstance(data, dict):
        return {key: leaf for name, item in data.items() for key, leaf in _leaves(item, f"{path}/{name}").items()}
    if isinstance(data, list):
        return {key: leaf for at, item in enumerate(data) for key, leaf in _leaves(item, f"{path}/{at}").items()}
    return {path: data}


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, int | float):
        return abs(one - other) <= 1e-3 * max(abs(one), abs(other))
    return bool(one == other)


if __name__ == "__main__":
    typer.run(main)

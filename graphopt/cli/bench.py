"""`graphopt bench A [B]`: latency of artifacts, measured in turn."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli import arguments
from graphopt.cli.arguments import Data, Format, Input, ModelArguments, Seed, Trust
from graphopt.pipeline.registry import DEFAULT_TARGET

if TYPE_CHECKING:
    from graphopt.measure.bench import Comparison, TimedPair
    from graphopt.targets.backend import Artifact


def command(
    one: Annotated[Path, typer.Argument(metavar="A", help="An artifact (.onnx), or a model, which is lowered first.")],
    other: Annotated[Path | None, typer.Argument(metavar="B", help="What A is compared with.")] = None,
    data: Data = None,
    inputs: Input = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples per call.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="Threads of an operator; 0: the runtime's choice.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time to spend on each kind of session.")] = 5.0,
    target: Annotated[str, typer.Option(help="What models are lowered to before they are timed.")] = DEFAULT_TARGET,
    trust: Trust = False,
    seed: Seed = 0,
    format: Format = "text",
) -> None:
    """Time one artifact, or two in turn, on recorded and on plain session options."""
    from graphopt.files import ScratchDirectory
    from graphopt.measure.bench import compare

    arguments.check_format(format)
    with ScratchDirectory() as home:

        def opened(path: Path, name: str) -> Artifact:
            source = ModelArguments(model=path, data=data, inputs=inputs, trust=trust, seed=seed)
            return _artifact(path, Path(home), name, target, source)

        first = opened(one, "a")
        second = opened(other, "b") if other is not None else first
        feed = _feed(first, data, batch)
        found = compare(first, second, feed, batch=batch, threads=threads, seconds=seconds)
    if format == "json":
        json.dump(dataclasses.asdict(found), sys.stdout, indent=1)
        print()
    else:
        _print(found, str(one), str(other) if other is not None else None)


def _artifact(path: Path, home: Path, name: str, target: str, source: ModelArguments) -> Artifact:
    from graphopt.files import check_against_manifest
    from graphopt.pipeline.registry import backend

    chosen = backend(target)
    if path.suffix == chosen.suffix:
        check_against_manifest(path)
        return chosen.open(path)
    program, _ = source.load()
    return chosen.lower(program, chosen.path_in(home, name))


def _feed(artifact: Artifact, data: str | None, batch: int) -> tuple[Any, ...] | None:
    if data is None:
        return None
    from graphopt.data import Samples

    samples = Samples.open(data, [spec.name for spec in artifact.inputs])
    samples.check(artifact.inputs)
    return tuple(tensor.numpy() for tensor in samples.first(batch))


def _print(found: Comparison, one: str, other: str | None) -> None:
    from graphopt.cli.table import new_table, terminal

    console = terminal()
    for letter, name in (("A", one), ("B", other)):
        if name is not None:
            console.print(f"{letter}: {name}", soft_wrap=True)
    title = f"batch {found.batch}, {found.threads or 'all'} thread{'s' if found.threads != 1 else ''}"
    table = new_table(title)
    table.add_column("")
    paired = ("CPU ms (ratio)", "A over B (quartiles)") if other else ("CPU ms",)
    for column in ("session", "wall ms (quartiles)", *paired):
        table.add_column(column, justify="right")
    kinds: list[tuple[str, TimedPair]] = [("recorded", found.recorded), ("plain", found.plain)]
    for kind, pair in kinds:
        ratio = pair.wall_ratio
        rows = [("A", pair.first, "", "")]
        if other is not None:
            text = f"{ratio.median:.2f} ({ratio.lower:.2f}-{ratio.upper:.2f})"
            rows.append(("B", pair.second, f" ({pair.cpu_ratio.median:.2f})", text))
        for name, timing, by_cpu, text in rows:
            wall = f"{timing.wall.median:.3g} ({timing.wall.lower:.3g}-{timing.wall.upper:.3g})"
            cells = [name, kind, wall, f"{timing.cpu.median:.3g}{by_cpu}"]
            table.add_row(*cells, *([text] if other is not None else []))
    console.print(table)
    for note in found.doubts():
        console.print(f"note: {note}", soft_wrap=True)

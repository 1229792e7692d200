"""`graphopt apply`: the plans of a manifest again, on any machine, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli.arguments import (
    Data,
    Dynamic,
    Factory,
    Input,
    ModelArguments,
    ModelPath,
    Seed,
    Trust,
    Weights,
    check_output,
)


def command(
    model: ModelPath,
    manifest: Annotated[Path, typer.Argument(help="The manifest.json that `optimize` wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for the programs and artifacts.")],
    data: Data = None,
    inputs: Input = None,
    dynamic: Dynamic = None,
    factory: Factory = None,
    weights: Weights = None,
    trust: Trust = False,
    plugin: Annotated[list[Path] | None, typer.Option(help="A Python file with passes of your own.")] = None,
    seed: Seed = 0,
) -> None:
    """Carry out stored plans on the model they were made for, and lower the result."""
    from graphopt.files import replacing_directory
    from graphopt.job.replaying import replay
    from graphopt.pipeline.registry import PassRegistry, backend

    check_output(output)
    source = ModelArguments(
        model=model, data=data, inputs=inputs, dynamic=dynamic, factory=factory, weights=weights, trust=trust, seed=seed
    )
    program, _ = source.load()
    programs = replay(program, manifest, PassRegistry(plugin or ()))
    with replacing_directory(output) as directory:
        for target, result in programs.items():
            result.save(directory / ("program.pt2" if len(programs) == 1 else f"program.{target}.pt2"))
            if target:
                lowering = backend(target)
                lowering.verify(lowering.lower(result, lowering.path_in(directory)), result)
    for path in sorted(output.iterdir()):
        print(path)

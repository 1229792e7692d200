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
from graphopt.errors import UsageError


def command(
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for the programs and artifacts.")],
    model: ModelPath = None,
    manifest: Annotated[
        Path | None,
        typer.Argument(
            metavar="MANIFEST", help="The manifest.json that `optimize` wrote; the only path with --factory alone."
        ),
    ] = None,
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
    from graphopt.data.served import served_inputs
    from graphopt.job.job import Job
    from graphopt.job.manifest import read
    from graphopt.job.result import check_place
    from graphopt.pipeline.registry import PassRegistry, backends_named

    check_output(output)
    if manifest is None and factory is not None:
        model, manifest = None, model
    if manifest is None:
        raise UsageError(
            "Give a model and the manifest of its result, `graphopt apply MODEL manifest.json`, or in the model's "
            "place `--factory package.module:function`."
        )
    stored = read(manifest)
    backends = backends_named([target for target in stored.programs if target])
    check_place(output, backends)
    source = ModelArguments(
        model=model,
        data=data,
        inputs=inputs,
        dynamic=dynamic,
        served=stored.served,
        factory=factory,
        weights=weights,
        trust=trust,
        seed=seed,
    )
    program, samples = source.load()
    heads = served_inputs(stored.served)
    job = Job(program, samples, backends=backends, seed=stored.seed, name=stored.model, served=heads)
    outcome = job.replay(stored, manifest.parent, PassRegistry(plugin or ()))
    for path in sorted(job.deliver(outcome, bench=False).save(output)):
        print(path)

"""`graphopt verify A B`: do two models compute the same?"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli import arguments
from graphopt.cli.arguments import Data, Format, Seed, Trust
from graphopt.errors import VerifyError


def command(
    one: Annotated[Path, typer.Argument(metavar="A", help="The reference: a model or an artifact.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="What should compute the same.")],
    data: Data = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest output error allowed, relative to the largest output.")
    ] = 1e-4,
    samples: Annotated[int, typer.Option(help="How many samples of --data to compare on.")] = 256,
    trust: Trust = False,
    seed: Seed = 0,
    format: Format = "text",
) -> None:
    """Run two models or artifacts on the same inputs and compare their outputs."""
    from graphopt.job.contenders import common_inputs, open_contender, reordered
    from graphopt.measure.equivalence import compare_outputs

    arguments.check_format(format)
    pair = [open_contender(path, data=data, trust=trust, seed=seed) for path in (one, other)]
    batch = common_inputs(pair, data, samples)
    found = compare_outputs(pair[0].outputs, pair[0].call(batch), pair[1].call(batch))
    differs = [*found.differs, *reordered(pair)]
    equal = found.relative <= tolerance and not differs
    facts = {
        "max_error": _finite(found.max_error),
        "relative": _finite(found.relative),
        "sqnr": _finite(found.sqnr),
        "agreement": found.agreement,
        "tolerance": tolerance,
        "differs": differs,
        "equal": equal,
    }
    if format == "json":
        json.dump(facts, sys.stdout, indent=1)
        print()
    else:
        rows = "" if found.agreement is None else f", largest entry at the same place in {found.agreement:.2%} of rows"
        if found.of_integers:
            print(f"of an output of integers {found.relative:.2%} of the elements differ{rows}")
        else:
            print(f"largest error {found.max_error:.3g} ({found.relative:.3g} of the largest output){rows}")
    if differs:
        raise VerifyError(f"{other} does not return what {one} does: {'; '.join(differs)}.")
    if not equal:
        share = "of the elements of an output of integers" if found.of_integers else "of the largest output"
        error = f"error {found.relative:.3g} {share}"
        raise VerifyError(
            f"{other} does not compute what {one} does: {error}, allowed {tolerance:g}. "
            "Raise --tolerance if this is an approximation you accept."
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity

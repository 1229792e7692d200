"""Arguments that several commands share, and reading them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.errors import UsageError

if TYPE_CHECKING:
    from graphopt.data import Samples
    from graphopt.ir.program import Program

ModelPath = Annotated[
    Path | None, typer.Argument(metavar="MODEL", help="A .pt2 program, a pickled module, or weights for --factory.")
]
Data = Annotated[
    str | None,
    typer.Option(help="Calibration data: .npz, .npy, .safetensors, a folder of them, or module:function."),
]
Input = Annotated[
    list[str] | None,
    typer.Option("--input", help="Shape of an input where no data says it: name=1x3x224x224:float32."),
]
Dynamic = Annotated[
    list[str] | None,
    typer.Option("--dynamic", help="A further dynamic axis beside the batch: input:axis, such as tokens:1."),
]
Factory = Annotated[str | None, typer.Option(help="package.module:function that builds the model.")]
Weights = Annotated[Path | None, typer.Option(help="Weights for --factory: .safetensors or a state dict.")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Let the model file run code. Only for files you would run as a program.")
]
Seed = Annotated[int, typer.Option(help="Every random draw descends from it.")]
Format = Annotated[str, typer.Option("--format", help="What to print on stdout: text or json.")]

_DYNAMIC = re.compile(r"(?P<input>[^:=]+):(?P<axis>\d+)(=\w+)?$")


def load_program(model: Path | None, **named: Any) -> Program:
    """Load what the arguments name as a program; they are those of `load_program_and_data`."""
    return load_program_and_data(model, **named)[0]


def load_program_and_data(
    model: Path | None,
    *,
    data: str | None,
    inputs: Sequence[str] | None,
    dynamic: Sequence[str] | None,
    factory: str | None,
    weights: Path | None,
    trust: bool,
    seed: int,
) -> tuple[Program, Samples | None]:
    """Load what the arguments name as a program, and open its data."""
    from graphopt.capturing.load import load_with_data
    from graphopt.data import parse_input_spec

    return load_with_data(
        model,
        data=data,
        inputs=[parse_input_spec(text) for text in inputs or ()],
        trust=trust,
        factory=factory,
        weights=weights,
        dynamic_shapes=_dynamic_shapes(dynamic),
        seed=seed,
    )


def _dynamic_shapes(texts: Sequence[str] | None) -> dict[str, Any] | None:
    if not texts:
        return None
    shapes: dict[str, Any] = {}
    for text in texts:
        match = _DYNAMIC.match(text)
        if match is None:
            raise UsageError(f"Cannot read --dynamic {text}. Write input:axis, for example --dynamic tokens:1.")
        shapes.setdefault(match["input"], {})[int(match["axis"])] = match["axis"]
    return shapes


def check_format(value: str) -> str:
    """Return the output format, or say which there are."""
    if value not in ("text", "json"):
        raise UsageError(f"There is no format `{value}`. Use --format text or --format json.")
    return value

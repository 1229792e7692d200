"""Arguments that several commands share, and reading them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.errors import UsageError, cut

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
    typer.Option(
        "--dynamic",
        help="A further dynamic axis beside the batch: input:axis, such as tokens:1. With the sizes it may have: "
        "tokens:1:4-8, tokens:1:4- or tokens:1:-8; those of the batch likewise (x:0:4-8).",
    ),
]
Served = Annotated[
    list[str] | None,
    typer.Option(
        "--served",
        help="Let the result take an input as it is served, with bytes made floats inside: "
        "x:uint8:nhwc:scale=1/255:mean=0.5:std=0.5, or a mean and std for each channel. DATA are served likewise.",
    ),
]
Factory = Annotated[str | None, typer.Option(help="package.module:function that builds the model.")]
Weights = Annotated[Path | None, typer.Option(help="Weights for --factory: .safetensors or a state dict.")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Let the model file run code. Only for files you would run as a program.")
]
Preset = Annotated[str | None, typer.Option(help="What `graphopt presets` lists, in the place of --passes.")]
Evaluation = Annotated[
    str | None, typer.Option("--eval", help="Labelled data, DATA[:metric], or module:function. Higher is better.")
]
Target = Annotated[
    list[str] | None, typer.Option("--target", help="onnxruntime (default), tensorrt; repeat for several.")
]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="Directory for the results. Default: MODEL.graphopt/")
]
Plugin = Annotated[list[Path] | None, typer.Option(help="A Python file with passes of your own.")]
FailIf = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-if",
        help='End with exit code 1 if this holds: "drop>0.5" (points of --eval), "drop%>1", "size>0.5", "speedup<1", '
        '"error>0.1", "agreement<0.99".',
    ),
]
Check = Annotated[str, typer.Option(help="fast, or full: prove every rewrite, export after every pass.")]
Bench = Annotated[bool, typer.Option(help="Time the result against the original, and compare their files.")]
Device = Annotated[
    str | None, typer.Option(help="Where passes compute: cpu, cuda:0, or auto for the accelerator if there is one.")
]
Cache = Annotated[
    bool, typer.Option(help="Keep what passes decide, and use what they decided on the same things before.")
]
TensorBoardDirectory = Annotated[
    Path | None,
    typer.Option("--tensorboard", help="Write losses of training into this directory, as events for TensorBoard."),
]
Seed = Annotated[int, typer.Option(help="Every random draw descends from it.")]
Format = Annotated[str, typer.Option("--format", help="What to print on stdout: text or json.")]

_DYNAMIC = re.compile(r"(?P<input>[^:=]+):(?P<axis>\d{1,18})(:(?P<least>\d{0,18})-(?P<most>\d{0,18}))?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """Which model, and on which data: what the arguments of a command say."""

    model: Path | None
    data: str | None = None
    inputs: Sequence[str] | None = None
    dynamic: Sequence[str] | None = None
    served: Sequence[str] | None = None
    factory: str | None = None
    weights: Path | None = None
    trust: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        """What reports call the model."""
        return self.model.name if self.model is not None else str(self.factory)

    def load(self) -> tuple[Program, Samples | None]:
        """Load the model as a program, and open the data, once for both."""
        from graphopt.capturing.load import load_with_data
        from graphopt.data import parse_input_spec

        return load_with_data(
            self.model,
            data=self.data,
            inputs=[parse_input_spec(text) for text in self.inputs or ()],
            trust=self.trust,
            factory=self.factory,
            weights=self.weights,
            dynamic_shapes=_dynamic_shapes(self.dynamic),
            served=self.served or (),
            seed=self.seed,
        )


def _dynamic_shapes(texts: Sequence[str] | None) -> dict[str, Any] | None:
    if not texts:
        return None
    from graphopt.ir.dynamic_axes import bound_dim
    from graphopt.ir.sizes import SizeRange

    shapes: dict[str, Any] = {}
    for text in texts:
        match = _DYNAMIC.fullmatch(text)
        if match is None:
            raise UsageError(
                f"Cannot read --dynamic {cut(text, 80)}. Write input:axis, for example --dynamic tokens:1, and behind "
                "it which sizes the axis may have, as in tokens:1:4-8, tokens:1:4- or tokens:1:-8."
            )
        sizes = SizeRange(int(match["least"] or 0), int(match["most"]) if match["most"] else None)
        if sizes.most is not None and sizes.most <= max(sizes.least, 1):
            raise UsageError(f"--dynamic {text} leaves the axis one size or none. Let its range end further up.")
        shapes.setdefault(match["input"], {})[int(match["axis"])] = bound_dim(sizes)
    return shapes


def check_output(directory: Path, *, dump: Path | None = None, depfile: Path | None = None) -> None:
    """Say what cannot be written to before anything runs."""
    for option, folder in (("-o", directory), ("--dump", dump)):
        if folder is not None and os.path.lexists(folder) and not folder.is_dir():
            raise UsageError(
                f"{folder} is {'a file' if folder.exists() else 'a link to nothing'}. Give {option} a directory."
            )
    if depfile is not None and depfile.exists() and not depfile.is_file():
        raise UsageError(f"{depfile} is no file. Give --depfile the name of one.")


def check_format(value: str) -> str:
    """Return the output format, or say which there are."""
    if value not in ("text", "json"):
        raise UsageError(f"There is no format `{value}`. Use --format text or --format json.")
    return value

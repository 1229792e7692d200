r"""Whether artifacts compute on ARM what their programs do, under an emulator on a machine of another kind.

    python tools/check_arm.py -- qemu-aarch64 -cpu max -L ROOT ROOT/usr/bin/python3.11
    python tools/check_arm.py --only '*half*' -- qemu-aarch64 -cpu cortex-a53 -L ROOT ROOT/usr/bin/python3.11

The arguments are the command that runs a Python of aarch64 with numpy and onnxruntime. What that takes on Debian 12,
with nothing installed (its own qemu, 7.2, crashes where onnxruntime is loaded; that of Debian 13 does not), each
package unpacked by `dpkg -x FILE ROOT`:

    apt-get download qemu-user                                                     # of Debian 13, statically linked
    apt-get -o APT::Architecture=arm64 download python3.11-minimal libpython3.11-minimal libpython3.11-stdlib \
        libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libffi8 libbz2-1.0 liblzma5
    pip install --target ROOT/usr/lib/python3/dist-packages --only-binary=:all: --python-version 311 \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 onnxruntime==1.31.1

Small models go through every pass that changes which kernels run, for every target of ONNX Runtime, and are lowered
and verified here; then the same files are verified there, integer by integer. Emulated processors have the kernels of
what they are called: -cpu cortex-a53 has no products of integers, neoverse-n1 has dot products, max all there are. The
table says how many quantized operators run on integers there. No time is measured: an emulator's is nobody's.
"""

from __future__ import annotations

import fnmatch
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import graphopt
from graphopt.backends.onnx_execution.agreement import relative_error
from graphopt.backends.onnx_execution.session import OnnxSession, SessionSettings
from graphopt.backends.onnxruntime.fusion import quantized_layers
from graphopt.errors import GraphOptError, LoweringError
from graphopt.ir.program import Program
from graphopt.job.result import Result
from graphopt.targets.backend import Artifact
from tests.models import (
    Dense,
    Depthwise,
    FusedAttention,
    GroupedQuery,
    GroupedShuffle,
    Recurrent,
    Residual,
    TiedWeights,
    UNet,
    WeightNormed,
)
from tools.other_runtime import OtherRuntime, OtherSession, verified_by
from tools.result_digests import model_of

# Kernels there add up float16 in float16: 576 products at most, and each addition rounds by half an eps at most, in
# either direction.
_SUMMED_IN_HALF = math.sqrt(576) * torch.finfo(torch.float16).eps / 2
_TARGETS = ("onnxruntime", "onnxruntime-arm", "onnxruntime-x86-avx2")
_SAMPLES = 64


class Wide(nn.Module):
    """Every kind of convolution and activation, wide enough for the kernels of whole blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32)
        self.depthwise, self.point = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 64, 1)
        self.grouped, self.slope = nn.Conv2d(64, 64, 3, padding=1, groups=4), nn.PReLU(64)
        self.full, self.head = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(64, 33)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits of images."""
        x = nn.functional.hardswish(self.norm(self.stem(x)))
        x = nn.functional.relu6(self.depthwise(x))
        x = self.point(x)
        x = x + self.slope(self.grouped(x))
        x = nn.functional.max_pool2d(self.full(x).relu(), 2)
        return self.head(x.mean((2, 3)))


class Words(nn.Module):
    """A table, a layer of an encoder, and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(97, 64), nn.Linear(64, 97)
        self.layer = nn.TransformerEncoderLayer(64, 4, 160, batch_first=True, activation="gelu")

    def forward(self, ids: Tensor) -> Tensor:
        """Compute logits of words."""
        return self.head(self.layer(self.table(ids)))


_IMAGES = (Residual, Depthwise, GroupedShuffle, Dense, UNet, WeightNormed, Wide)
_PIPELINES = {
    "": (Wide, Words, Recurrent),
    "int8:guard=none": (*_IMAGES, FusedAttention, GroupedQuery, Words),
    "int8:guard=none:mode=dynamic": (FusedAttention, Words, Recurrent),
    "int8:guard=none:accuracy=best": (Residual, Words),
    "weights:bits=8": (GroupedQuery, Words),
    "weights": (GroupedQuery, TiedWeights, Words),
    "weights:bits=2:block=16": (Words,),
    "half": (Wide, Words, Recurrent),
    "half:compute=yes": (Wide, Words, FusedAttention),
}


def main(
    python: Annotated[list[str], typer.Argument(help="the command that runs the other Python")],
    only: Annotated[str, typer.Option(help="a glob of names of models, their passes and targets")] = "*",
) -> None:
    """Verify every artifact there and print a table; the exit code is 1 where one is wrong."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    table, wrong = Table("model", "passes", "target", "relative error here", "there", "on integers here", "there"), 0
    with OtherRuntime(python) as other:
        table.title = other.machine
        for name, passes, target, result in _results(only):
            row = [name, passes, target]
            try:
                row += _compared(other, result, target)
            except GraphOptError as err:
                row.append(str(err))
                wrong += 1
            print("  ".join(row), file=sys.stderr, flush=True)
            table.add_row(*row)
    Console(width=140).print(table)
    raise typer.Exit(bool(wrong))


def _results(only: str) -> Iterator[tuple[str, str, str, Result]]:
    """Yield models, pipelines and targets with what became of them here."""
    for passes, kinds in _PIPELINES.items():
        for kind in kinds:
            for target in _TARGETS:
                if fnmatch.fnmatchcase(f"{kind.__name__} {passes} {target}", only):
                    model, data = _subject(kind)
                    made = graphopt.optimize(model, data, passes, target, bench=False, cache=False)
                    yield kind.__name__, passes, target, made


def _subject(kind: type[nn.Module]) -> tuple[nn.Module, Any]:
    if kind not in (Wide, Words):
        model, data = model_of(kind)
        return model, data
    torch.manual_seed(0)
    data = torch.randn(_SAMPLES, 3, 24, 24) if kind is Wide else torch.randint(97, (_SAMPLES, 16))
    return kind().eval(), data


def _compared(other: OtherRuntime, result: Result, target: str) -> list[str]:
    """Verify the artifact here and there; return the errors and how much runs on integers.

    Raises:
        LoweringError: it computes something else there.
    """
    artifact, program = result.artifacts[target], result.programs[target]
    settings = SessionSettings.of(artifact.session_options)

    def looked_at(runtime: type[OnnxSession]) -> tuple[str, str]:
        try:
            error = artifact.backend.verify(artifact, program)
        except LoweringError:
            error = error_in(runtime, artifact, program)
            if "compute=yes" not in str(result.pipeline) or error > _SUMMED_IN_HALF:
                raise
        layers = quantized_layers(artifact.path, settings)
        return f"{error:.1e}", f"{sum(layer.integer for layer in layers)} of {len(layers)}"

    here = looked_at(OnnxSession)
    with verified_by(other):
        there = looked_at(OtherSession)
    return [here[0], there[0], here[1], there[1]]


def error_in(runtime: type[OnnxSession], artifact: Artifact, program: Program) -> float:
    """Return how far the artifact is off the program where a session runs, relative to its largest output."""
    session = runtime(artifact.path, SessionSettings.of(artifact.session_options))
    inputs = program.flat_examples()
    found = session(*(tensor.numpy() for tensor in inputs))
    pairs = zip(program.call_flat(inputs), found, strict=True)
    return max(relative_error(want.detach(), torch.from_numpy(have)) for want, have in pairs)


if __name__ == "__main__":
    typer.run(main)

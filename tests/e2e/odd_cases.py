"""The odd models with their data.

`ODD` lists them by trait; each entry builds a model and sixteen samples of every input (four for the fixed batch).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.e2e.odd_models import (
    AnyLength,
    AnySize,
    Attending,
    Bags,
    BatchStatistics,
    BrainFloats,
    Branching,
    Constants,
    Counter,
    Detector,
    Duplicates,
    Echo,
    FixedBatch,
    Generator,
    HandNormed,
    Masked,
    NoParameters,
    Normed,
    OptionalInput,
    Overwriting,
    Passthrough,
    RawImages,
    Recurrent,
    Regions,
    Reused,
    ScalarOutput,
    Scratch,
    Separable,
    SeveralInputs,
    Squeezed,
    TiedHead,
    Volume,
    Waveform,
    WeightNormed,
)

SAMPLES = 16


@dataclass(frozen=True, slots=True)
class Case:
    """A model and its data.

    Attributes:
        model: in eval mode.
        data: {input: samples}, in the order of the model's arguments.
        dynamic_shapes: axes beside the batch that are dynamic.
    """

    model: nn.Module
    data: Mapping[str, Tensor]
    dynamic_shapes: Mapping[str, Any] | None = None


def _attending() -> dict[str, Tensor]:
    return {"x": torch.randn(SAMPLES, 6, 16), "padding": torch.arange(6) >= torch.randint(1, 7, (SAMPLES, 1))}


def _images(size: int = 12) -> dict[str, Tensor]:
    return {"x": torch.randn(SAMPLES, 3, size, size)}


def _rows(width: int = 8) -> dict[str, Tensor]:
    return {"x": torch.randn(SAMPLES, width)}


def _tokens(length: int = 10) -> dict[str, Tensor]:
    return {"ids": torch.randint(0, 50, (SAMPLES, length))}


def _optional(*names: str) -> dict[str, Tensor]:
    sizes = {"bias": (10,), "scale": (1,)}
    return {"x": torch.randn(SAMPLES, 10), **{name: torch.randn(SAMPLES, *sizes[name]) for name in names}}


def _channels_last() -> dict[str, Tensor]:
    return {"x": torch.randn(SAMPLES, 3, 10, 10).to(memory_format=torch.channels_last)}


def _masked() -> dict[str, Tensor]:
    lengths = torch.randint(1, 8, (SAMPLES,))
    return {"steps": torch.randn(SAMPLES, 7, 6), "mask": torch.arange(7) < lengths[:, None], "lengths": lengths}


ODD: dict[str, Callable[[], Case]] = {
    "several inputs, nested outputs": lambda: Case(
        SeveralInputs(), {"image": torch.randn(SAMPLES, 3, 8, 8), "features": torch.randn(SAMPLES, 10)}
    ),
    "optional input after one left out": lambda: Case(OptionalInput(), _optional("scale")),
    "optional inputs given": lambda: Case(OptionalInput(), _optional("bias", "scale")),
    "tied head": lambda: Case(TiedHead(), _tokens()),
    "1-d convolutions": lambda: Case(Waveform(), {"wave": torch.randn(SAMPLES, 2, 32)}),
    "3-d convolutions": lambda: Case(Volume(), {"volume": torch.randn(SAMPLES, 1, 8, 8, 8)}),
    "transposed convolutions": lambda: Case(Generator(), {"latent": torch.randn(SAMPLES, 12)}),
    "grouped and depthwise": lambda: Case(Separable(), _images()),
    "lstm": lambda: Case(Recurrent(nn.LSTM), {"steps": torch.randn(SAMPLES, 4, 6)}),
    "gru": lambda: Case(Recurrent(nn.GRU), {"steps": torch.randn(SAMPLES, 3, 6)}),
    "input beside the output": lambda: Case(Passthrough(), _rows()),
    "input alone": lambda: Case(Echo(), _rows()),
    "branches": lambda: Case(Branching(), _rows()),
    "weight norm": lambda: Case(WeightNormed(), {"x": torch.randn(SAMPLES, 3, 12)}),
    "other norms": lambda: Case(Normed(), _images()),
    "norms by hand": lambda: Case(HandNormed(), _images(8)),
    "counter": lambda: Case(Counter(), _rows()),
    "scratch buffer": lambda: Case(Scratch(), _rows()),
    "scalar output": lambda: Case(ScalarOutput(), _rows()),
    "no parameters": lambda: Case(NoParameters(), _images(8)),
    "duplicate outputs": lambda: Case(Duplicates(), _rows()),
    "module used thrice": lambda: Case(Reused(), _rows()),
    "channels last": lambda: Case(Squeezed(), _channels_last()),
    "fixed batch": lambda: Case(FixedBatch(), {"x": torch.randn(4, 8)}),
    "any length": lambda: Case(AnyLength(), _tokens(), {"ids": {1: torch.export.Dim.DYNAMIC}}),
    "integer outputs": lambda: Case(Detector(), _images(8)),
    "masks and lengths": lambda: Case(Masked(), _masked()),
    "raw images": lambda: Case(RawImages(), {"pixels": torch.randint(0, 256, (SAMPLES, 3, 8, 8), dtype=torch.uint8)}),
    "any size": lambda: Case(AnySize(), _images(), {"x": {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}}),
    "padding mask": lambda: Case(Attending(), _attending()),
    "embedding bag": lambda: Case(Bags(), _tokens()),
    "writes its input": lambda: Case(Overwriting(), _rows()),
    "constant outputs": lambda: Case(Constants(), _rows()),
    "regions": lambda: Case(Regions(), _rows()),
    "batch statistics": lambda: Case(BatchStatistics(), _images(8)),
    "compiled": lambda: Case(torch.compile(Reused()), _rows()),
    "double precision": lambda: Case(Reused().double(), {"x": torch.randn(SAMPLES, 8, dtype=torch.float64)}),
    "half precision": lambda: Case(Reused().half(), {"x": torch.randn(SAMPLES, 8).half()}),
    "bfloat16": lambda: Case(Reused().bfloat16(), {"x": torch.randn(SAMPLES, 8).bfloat16()}),
    "bfloat16 inside": lambda: Case(BrainFloats(), _rows()),
}


def case(name: str, seed: int = 0) -> Case:
    """Build a case: the same numbers each time, norms with statistics of real batches."""
    torch.manual_seed(seed)
    made = ODD[name]()
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in made.model.modules()):
        with torch.no_grad():
            made.model.train()(**made.data)
    made.model.eval()
    return made

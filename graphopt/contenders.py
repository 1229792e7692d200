"""Models and artifacts side by side: whatever a file is, as something that flat inputs can be given to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphopt.backend import Artifact
from graphopt.context import Batch
from graphopt.data import Samples
from graphopt.deliver import flat
from graphopt.errors import UsageError
from graphopt.load import load
from graphopt.program import Program, TensorSpec
from graphopt.registry import backend

_ARTIFACT = ".onnx"


@dataclass(frozen=True)
class Contender:
    """A model or artifact read from a file.

    Attributes:
        path: the file.
        inputs: its flat inputs.
        outputs: its flat outputs.
        call: runs it on flat inputs.
        loaded: the program or the artifact itself.
    """

    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    call: Callable[[Batch], Batch]
    loaded: Program | Artifact


def open_contender(path: Path, *, data: Any, trust: bool, seed: int) -> Contender:
    """Open a model file or an artifact (`.onnx`; run by the onnxruntime backend)."""
    if path.suffix == _ARTIFACT:
        artifact = backend("onnxruntime").open(path)
        return Contender(path, artifact.inputs, artifact.outputs, flat(artifact.session()), artifact)
    program = load(path, data=data, trust=trust, seed=seed)

    def call(batch: Batch) -> Batch:
        with torch.no_grad():
            return program.call_flat(batch)

    return Contender(path, program.inputs, program.outputs, call, program)


def common_inputs(pair: Sequence[Contender], data: Any, samples: int, seed: int) -> Batch:
    """Return inputs that both contenders take: real samples, a program's examples, or random ones.

    Raises:
        UsageError: they take different inputs.
    """
    first, second = pair
    described = [[(spec.name, len(spec.shape), spec.dtype) for spec in one.inputs] for one in pair]
    if described[0] != described[1]:
        raise UsageError(
            f"{first.path} takes {', '.join(map(str, first.inputs))}; {second.path} takes "
            f"{', '.join(map(str, second.inputs))}. Only models with the same inputs can be compared."
        )
    if data is not None:
        source = Samples.open(data, [spec.name for spec in first.inputs])
        source.check(first.inputs)
        return source.first(samples)
    for one in pair:
        if isinstance(one.loaded, Program):
            return one.loaded.flat_examples()
    return random_inputs(first.inputs, seed)


def random_inputs(specs: Sequence[TensorSpec], seed: int, *, dynamic_size: int = 2) -> Batch:
    """Make random inputs: normal floats, integers 0 and 1 (valid ids, masks and labels of any model)."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for spec in specs:
        shape = [size if isinstance(size, int) else dynamic_size for size in spec.shape]
        if spec.dtype.is_floating_point:
            made.append(torch.randn(shape, generator=generator).to(spec.dtype))
        else:
            made.append(torch.randint(0, 2, shape, generator=generator).to(spec.dtype))
    return tuple(made)

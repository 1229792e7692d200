"""Models and artifacts side by side: whatever a file is, as something that flat inputs can be given to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphopt.capturing.load import load
from graphopt.data import Samples
from graphopt.data.batches import Batch
from graphopt.errors import UsageError
from graphopt.files import check_against_manifest
from graphopt.ir.batch_sizes import BatchSizes
from graphopt.ir.program import Program
from graphopt.ir.signature import TensorSpec
from graphopt.measure.bench import batch_of
from graphopt.pipeline.registry import DEFAULT_TARGET, backend_of
from graphopt.targets.backend import Artifact
from graphopt.targets.flat_session import flat

_SAMPLES = 8  # of made-up inputs


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
    """Open a model file or an artifact, run by the default target's backend where several have such files."""
    owner = backend_of(path, preferred=DEFAULT_TARGET)
    if owner is not None:
        check_against_manifest(path)
        artifact = owner.open(path)
        return Contender(path, artifact.inputs, artifact.outputs, flat(artifact.session()), artifact)
    program = load(path, data=data, trust=trust, seed=seed)

    def call(batch: Batch) -> Batch:
        with torch.no_grad():
            return program.call_flat(batch)

    return Contender(path, program.inputs, program.outputs, call, program)


def reordered(pair: Sequence[Contender]) -> list[str]:
    """Say so where both return outputs of the same names in another order."""
    first, second = ([spec.name for spec in one.outputs] for one in pair)
    if first == second or sorted(first) != sorted(second):
        return []
    return [f"its outputs are {', '.join(second)}, in the order {', '.join(first)} there"]


def common_inputs(pair: Sequence[Contender], data: Any, samples: int) -> Batch:
    """Return inputs that both contenders take: real samples, a program's examples, or made-up ones.

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
        return source.first(BatchSizes(first.inputs).taken(samples))
    for one in pair:
        if isinstance(one.loaded, Program):
            return one.loaded.flat_examples()
    return tuple(torch.from_numpy(array) for array in batch_of(first.inputs, None, _SAMPLES))

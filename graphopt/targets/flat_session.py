"""A session as something that takes and returns flat tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from graphopt.ir.contents import as_array
from graphopt.targets.backend import Session

FlatTensors = tuple[torch.Tensor, ...]


def flat(session: Session) -> Callable[[FlatTensors], FlatTensors]:
    """Let a session take and return flat tensors, as `Program.call_flat` does, on any device."""

    def call(batch: FlatTensors) -> FlatTensors:
        outputs = session(*map(as_array, batch))
        return tuple(torch.from_numpy(array).to(batch[0].device) for array in outputs)

    return call

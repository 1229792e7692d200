"""What a training has come to: everything that the next step depends on, and what was best so far."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphopt.distillation.weights import overwrite
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.ir.torch_internals import blend_each
from graphopt.pipeline.checkpoints import State


@dataclass
class History:
    """The held-out loss before training and after each epoch, and the tensors where it was lowest.

    Attributes:
        losses: of them.
        best: the tensors; empty where no epoch was better than what came in.
        stale: epochs since the lowest.
        stopped: why it ended before the last step, "" otherwise.
    """

    losses: list[float]
    best: dict[str, Tensor] = field(default_factory=dict)
    stale: int = 0
    stopped: str = ""

    def add(self, loss: float) -> bool:
        """Note the held-out loss of an epoch and return whether it is the lowest so far."""
        better = loss < min(self.losses)
        self.losses.append(loss)
        self.stale = 0 if better else self.stale + 1
        return better


@dataclass
class Averages:
    """Moving averages of parameters, which are judged in their place.

    Attributes:
        parameters: the parameters.
        kept: share of the averages that a step keeps; less at first, so that they forget where they began.
    """

    parameters: Sequence[Tensor]
    kept: float
    values: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        """Begin with the parameters."""
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def follow(self, at: int) -> None:
        """Take in the parameters after a step."""
        blend_each(self.values, self.parameters, 1 - min(self.kept, (1 + at) / (10 + at)))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averages in place of the parameters."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(held)


def packed(
    student: Program, optimizer: torch.optim.Optimizer, averages: Averages | None, history: History, step: int
) -> State:
    """Return all that the steps after `step` depend on."""
    gm = student.graph_module
    named = {
        "student": dict((*gm.named_parameters(), *gm.named_buffers())),
        "best": history.best,
        "averages": {str(at): value for at, value in enumerate(averages.values if averages else [])},
        "optimizer": {
            f"{at}.{key}": value for at, held in optimizer.state_dict()["state"].items() for key, value in held.items()
        },
        "history": {"losses": torch.tensor(history.losses, dtype=torch.float64)},  # JSON has no infinity
    }
    tensors = {
        f"{kind}.{name}": tensor.detach().cpu().clone() for kind, held in named.items() for name, tensor in held.items()
    }
    content: dict[str, Json] = {"step": step, "stale": history.stale, "stopped": history.stopped}
    return content, tensors


def unpack(
    state: State, student: Program, optimizer: torch.optim.Optimizer, averages: Averages | None
) -> tuple[History, int]:
    """Put a state of `packed` in place, and return the history and the step it is from."""
    content, tensors = state
    overwrite(student, _named(tensors, "student"))
    with torch.no_grad():
        for at, value in _named(tensors, "averages").items():
            assert averages is not None  # the same options made it
            averages.values[int(at)].copy_(value)
    moments: dict[int, dict[str, Any]] = {}
    for name, value in _named(tensors, "optimizer").items():
        at, _, key = name.partition(".")
        moments.setdefault(int(at), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    losses = [float(loss) for loss in tensors["history.losses"]]
    history = History(losses, _named(tensors, "best"), int(str(content["stale"])), str(content["stopped"]))
    return history, int(str(content["step"]))


def _named(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}."): tensor for name, tensor in tensors.items() if name.startswith(f"{kind}.")}

"""A lesson of a few numbers, and training by it; as a script, in two processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from graphopt.capturing.capture import capture
from graphopt.data.batches import Batch
from graphopt.distillation.history import History
from graphopt.distillation.loop import Precision, Schedule, Trainer
from graphopt.distillation.pool import Pool
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.pipeline.checkpoints import Checkpoints
from graphopt.pipeline.context import Context, NoProgress, Progress


class Numbers:
    """The student is to give the numbers beside its inputs."""

    def __init__(self) -> None:
        self.steps = 0

    def place(self, device: torch.device) -> None:
        pass

    def wanted(self, batch: Batch) -> None:
        return None

    def loss(self, outputs: Sequence[Tensor], wanted: Any, batch: Batch) -> Tensor:
        return mse_loss(outputs[0].float(), batch[1])

    def judged(self, outputs: Sequence[Tensor], wanted: Any, batch: Batch) -> Tensor:
        return mse_loss(outputs[0], batch[1])


class Kept:
    """Checkpoints in memory."""

    def __init__(self) -> None:
        self.held: dict[str, Any] = {}

    def load(self, stage: str) -> Any:
        return self.held.get(stage)

    def save(self, stage: str, content: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> None:
        self.held[stage] = content, tensors


def student(dropout: float = 0.0) -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )
    return capture(model.eval(), torch.randn(2, 6)).copy(share_tensors=False)


def fit(
    program: Program,
    schedule: Schedule,
    *,
    lesson: Numbers | None = None,
    progress: Progress | None = None,
    checkpoints: Checkpoints | None = None,
    precision: Precision = "float32",
) -> tuple[dict[str, Tensor], History]:
    """Train on 30 samples in batches of at most 8, and return the tensors after it and what it came to."""
    drawn = torch.Generator().manual_seed(1)
    x = torch.randn(46, 6, generator=drawn)
    y = torch.stack([x[:, 0] * x[:, 1], x.sum(1), x[:, 3].abs()], 1)
    trainer = Trainer(program, lesson or Numbers(), Pool(((x[30:], y[30:]),)), 8, precision=precision)

    def view(batch: Batch, generator: torch.Generator) -> Batch:
        noise = torch.randn(batch[0].shape, generator=generator)
        return batch[0] + 0.01 * noise, batch[1]

    history = trainer.fit(
        Pool(((x[:30], y[:30]),)),
        schedule,
        view,
        Context(original=program).generator,
        progress or NoProgress(),
        checkpoints=checkpoints,
    )
    return {name: tensor.detach().clone() for name, tensor in program.state_dict().items()}, history


if __name__ == "__main__":
    from accelerate import PartialState
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    one = student()
    other = os.fork()  # what takes long is done: imports, and a first capture
    rank = int(other == 0)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meeting", rank=rank, world_size=2)
    for _ in range(2):
        found, _ = fit(one, Schedule(2, 0.01, frozen=True))
    assert PartialState().num_processes == 2
    save_file(found, f"{sys.argv[1]}/{rank}.safetensors")
    if other:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))

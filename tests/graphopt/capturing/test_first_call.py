"""What a model does at its first call is done before it is traced, and what it remembers of its last is noticed."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.errors import CaptureError


class Rescaled(nn.Module):
    """Halves its weights when it is first called, as RWKV of transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.done = nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.done:
            with torch.no_grad():
                self.layer.weight.div_(2)
            self.done = True
        result: Tensor = self.layer(x)
        return result


@functools.lru_cache
def _table(size: int) -> Tensor:
    return torch.arange(float(size))


class Tabled(nn.Module):
    """Adds a table that is made when it is first asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "table"):
            self.register_buffer("table", torch.arange(4.0))
        result: Tensor = self.layer(x) + self.table + _table(x.shape[1])
        return result


class Remembering(nn.Module):
    """Goes on from its last call, unless the batch is of another size."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.state = nn.GRU(4, 4, batch_first=True), torch.zeros(1, 0, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.state.shape[1] != x.shape[0]:
            self.state = torch.zeros(1, x.shape[0], 4)
        result, self.state = self.layer(x, self.state)
        return result


@pytest.mark.parametrize("kind", [Rescaled, Tabled])
def test_what_is_done_once_is_no_part_of_the_program(kind: type[nn.Module]) -> None:
    _table.cache_clear()
    model, x = kind().eval(), torch.randn(2, 4)
    wanted = copy.deepcopy(model)(x)
    program = capture(model, x)
    assert program.inputs[0].shape[0] == "batch"
    for found in (program(x), program(x), model(x)):
        torch.testing.assert_close(found, wanted)


def test_what_is_remembered_of_the_last_batch_is_noticed() -> None:
    with pytest.raises(CaptureError, match=r"does not compute what the model does.*changes between calls"):
        capture(Remembering(), torch.randn(2, 3, 4))


class Counted(nn.Linear):
    """Notes how many samples it is run on."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.seen: list[int] = []

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            self.seen.append(len(input))
        return super().forward(input)


def test_a_model_is_run_once_on_inputs_of_one_size() -> None:
    model = Counted()
    capture(model, torch.randn(2, 4))
    assert sorted(model.seen) == [1, 2, 3]

"""Real model files, honest and hostile, for the loading tests."""

from __future__ import annotations

import copy
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

Edit = Callable[[dict[str, bytes]], None]


class TouchOnUnpickle:
    """Runs a shell command that creates `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


class Net(nn.Module):
    """A convolution, a linear layer, a buffer that is not saved, and a dynamic batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)
        self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor) -> dict[str, torch.Tensor]:
        y = (self.conv(x).relu() * self.scale[:, None, None]).flatten(2).mean(-1)
        return {"logits": self.head(y) + shift}


@pytest.fixture(scope="session")
def exported_members() -> dict[str, bytes]:
    """The members of an honest exported program, by name below `archive/`."""
    batch = torch.export.Dim("batch", min=1, max=64)
    args, kwargs = (torch.randn(2, 3, 6, 6),), {"shift": torch.randn(2, 2)}
    program = torch.export.export(
        Net().eval(), args, kwargs, dynamic_shapes={"x": {0: batch}, "shift": {0: batch}}, strict=False
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"note.txt": "hello"})
    with zipfile.ZipFile(io.BytesIO(buffer.getvalue())) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A path that only an executed payload creates."""
    return tmp_path / "payload-ran"


@pytest.fixture
def write_exported(tmp_path: Path, exported_members: dict[str, bytes]) -> Callable[[Edit], Path]:
    """Write an exported program after `edit` has changed its members."""

    def write(edit: Edit, name: str = "model.pt2") -> Path:
        members = dict(exported_members)
        edit(members)
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in members.items():
                archive.writestr(f"archive/{member}", data)
        return path

    return write


@pytest.fixture
def edit_program() -> Callable[[Callable[[dict[str, Any]], None]], Edit]:
    """Turn a change of the program's JSON into a change of the archive's members."""

    def make(change: Callable[[dict[str, Any]], None]) -> Edit:
        def edit(members: dict[str, bytes]) -> None:
            program = copy.deepcopy(json.loads(members["models/model.json"]))
            change(program)
            members["models/model.json"] = json.dumps(program).encode()

        return edit

    return make


@pytest.fixture
def touch_on_unpickle(marker: Path) -> TouchOnUnpickle:
    """An object whose unpickling creates `marker`."""
    return TouchOnUnpickle(marker)

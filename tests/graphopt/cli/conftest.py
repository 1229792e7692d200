"""A small model and its data as files, as a user has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from graphopt.cli.app import run


@dataclass(frozen=True)
class Files:
    """What lies in the folder.

    Attributes:
        folder: where everything is.
        model: an exported program with a static batch.
        data: 32 samples.
        labelled: the same with labels.
    """

    folder: Path
    model: Path
    data: Path
    labelled: Path


def small_net() -> nn.Module:
    """Return a CNN of two convolutions and a linear layer with settled statistics."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip
    net(torch.randn(64, 3, 8, 8))
    return net.eval()


@pytest.fixture(scope="session")
def original_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Write the files once."""
    folder = tmp_path_factory.mktemp("files")
    net = small_net()
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model = folder / "model.pt"
    with model.open("wb") as stream:
        torch.export.save(torch.export.export(net, (x[:2],)), stream)
    with torch.no_grad():
        labels = net(x).argmax(1).numpy()
    np.savez(folder / "data.npz", input=x.numpy())
    np.savez(folder / "labelled.npz", input=x.numpy(), labels=labels)
    return Files(folder, model, folder / "data.npz", folder / "labelled.npz")


@pytest.fixture
def files(original_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """Link the files into a folder of the test's own, which is the working directory."""
    for file in (original_files.model, original_files.data, original_files.labelled):
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return Files(tmp_path, Path("model.pt"), Path("data.npz"), Path("labelled.npz"))


Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a command line that must fail with a code, one sentence or two, and no traceback; return what it said."""

    def check(code: int, *arguments: object) -> str:
        capsys.readouterr()
        found = run([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        assert found == code, streams.err
        assert streams.err.count("graphopt: ") == 1
        assert "Traceback" not in streams.err + streams.out
        assert "This is a bug" not in streams.err
        said = streams.err.partition("graphopt: ")[2].strip()
        assert len(said.splitlines()) == 1
        return said

    return check

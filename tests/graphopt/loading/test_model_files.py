"""Files that are not models, and models that come from a factory."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from graphopt.errors import LoadError, UsageError
from graphopt.files import MANIFEST, sha256
from graphopt.loading import load_model

FACTORIES = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.head.weight

def build():
    return Net()

def broken():
    raise RuntimeError("no such config")

def wrong():
    return {"a": 1}

constant = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of factories in the current directory; returns its name."""
    name = f"factories_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return name


def torchscript() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "version", "code/__torch__.py"):
            archive.writestr(f"net/{name}", "")
    return buffer.getvalue()


def numpy_zip() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=np.ones(3))
    return buffer.getvalue()


def other_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    return buffer.getvalue()


ONNX = b"\x08\x0a\x12\x07pytorch\x1a\x052.0.0:\x10\x0a\x02\x0a\x01x"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "an empty file"),
        (b"just some text\n", "a text file"),
        ("Gewichte für später\n".encode(), "a text file"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (ONNX, "ONNX model; graphopt starts from PyTorch"),
        (torchscript(), "TorchScript archive; its Python is gone"),
        (safetensors.torch.save({"w": torch.ones(2)}), "weights without the model they belong to; add `--factory"),
        (numpy_zip(), "a NumPy file"),
        (other_zip(), "a zip archive that is not a model"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
        (b"\x1f\x8b\x08" + bytes(64), "unpack it first"),
        (b"GGUF" + bytes(64), "GGUF"),
        (bytes(range(256)), "a file of unknown kind"),
        (b"PK\x03\x04" + bytes(100), "no readable directory"),
    ],
)
@pytest.mark.parametrize("trust", [False, True])
def test_other_files(data: bytes, reason: str, trust: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    with pytest.raises(LoadError) as caught:
        load_model(path, trust=trust)
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 3


def test_missing_file_suggests_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "resnet.pt").write_bytes(b"")
    with pytest.raises(LoadError, match=r"There is no file .*Did you mean `.*resnet\.pt`"):
        load_model(tmp_path / "resnte.pt")


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="is a directory, not a model file"):
        load_model(tmp_path)


def test_what_is_no_file_is_neither_waited_for_nor_read(factories: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.pt")
    for path, said in ((tmp_path / "model.pt", "a FIFO"), (Path("/dev/zero"), "a device")):
        for given in ({}, {"trust": True}, {"factory": f"{factories}:build"}):
            with pytest.raises(LoadError, match=f"Cannot read `{path}`: it is {said}, not a regular file"):
                load_model(path, **given)  # type: ignore[arg-type]


def test_a_file_is_read_once_and_is_then_what_its_manifest_says(
    factories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read twice, it could be one file when it is checked and another when it is loaded."""
    path = tmp_path / "w.pt"
    torch.save(reference(), path)
    (tmp_path / MANIFEST).write_text(
        json.dumps({"schema": 2, "pipeline": "", "plans": [], "sha256": {"w.pt": sha256(path)}})
    )
    opened, open_file = [], Path.open

    def counted(file: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(file)
        return open_file(file, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counted)
    load_model(path, factory=f"{factories}:build")
    assert opened.count(path) == 1
    path.write_bytes(path.read_bytes() + b"\0")
    for given in ({"path": path}, {"weights": path}):
        with pytest.raises(LoadError, match=r"w.pt is not the file that manifest.json beside it was written with"):
            load_model(**given, factory=f"{factories}:build")


@pytest.mark.parametrize("given", [{}, {"trust": True}, {"factory": "FACTORIES:build"}], ids=str)
def test_real_torchscript_file(given: dict[str, Any], factories: str, tmp_path: Path) -> None:
    """Its members are compressed."""
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "model.pt")
    if "factory" in given:
        given = {"factory": f"{factories}:build"}
    with pytest.raises(LoadError, match="is a TorchScript archive; "):
        load_model(tmp_path / "model.pt", **given)


def test_a_compressed_archive_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/weights.bin", bytes(100))
    with pytest.raises(LoadError, match="it is a zip archive that is not a model"):
        load_model(tmp_path / "model.zip")


def test_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    with pytest.raises(LoadError, match="is compressed, which torch never does"):
        load_model(path)


def test_real_onnx_file(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "g", [], [])
    path = tmp_path / "model.pt"
    onnx.save(onnx.helper.make_model(graph), path)
    with pytest.raises(LoadError, match="it is an ONNX model"):
        load_model(path)


# --- factories


def reference() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    scope: dict[str, object] = {}
    exec(FACTORIES, scope)
    return scope["build"]().state_dict()  # type: ignore[operator,no-any-return]


def test_factory_without_weights(factories: str) -> None:
    loaded = load_model(factory=f"{factories}:build")
    assert isinstance(loaded.model, nn.Module)


@pytest.mark.parametrize("form", ["safetensors", "pt", "checkpoint"])
def test_factory_with_weights(factories: str, tmp_path: Path, form: str) -> None:
    state = reference()
    path = tmp_path / "weights.bin"
    if form == "safetensors":
        kept = {k: v.clone() for k, v in state.items() if k != "tied.weight" and "num_batches" not in k}
        safetensors.torch.save_file(kept, path)
    else:
        torch.save(state if form == "pt" else {"epoch": 1, "state_dict": state}, path)
    for loaded in (
        load_model(path, factory=f"{factories}:build"),
        load_model(factory=f"{factories}:build", weights=path),
    ):
        assert isinstance(loaded.model, nn.Module)
        torch.testing.assert_close(dict(loaded.model.state_dict()), dict(state))


def test_weights_that_do_not_fit(factories: str, tmp_path: Path) -> None:
    state = reference()
    state.pop("head.bias")
    state["body.0.weight"] = torch.ones(5, 3)
    state["extra"] = torch.ones(1)
    path = tmp_path / "w.pt"
    torch.save(state, path)
    with pytest.raises(LoadError) as caught:
        load_model(path, factory=f"{factories}:build")
    message = str(caught.value)
    assert "1 of the model's tensors are not in the file (head.bias)" in message
    assert "1 of the file's are not in the model (extra)" in message
    assert "1 differ in shape (body.0.weight is 5x3 in the file and 4x3 in the model)" in message


def test_weights_with_a_common_prefix(factories: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({f"module.{name}": value for name, value in reference().items() if "num_b" not in name}, path)
    with pytest.raises(LoadError, match=r"Every name in the file starts with `module\.`"):
        load_model(path, factory=f"{factories}:build")


def test_whole_module_as_weights(factories: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(LoadError, match="not weights alone"):
        load_model(path, factory=f"{factories}:build")


def test_hostile_weights(factories: str, tmp_path: Path, touch_on_unpickle: object, marker: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"w": touch_on_unpickle}, path)
    with pytest.raises(LoadError, match="not weights alone"):
        load_model(path, factory=f"{factories}:build")
    assert not marker.exists()


def test_onnx_file_as_weights(factories: str, tmp_path: Path) -> None:
    path = tmp_path / "w.onnx"
    path.write_bytes(ONNX)
    with pytest.raises(LoadError, match=r"is an ONNX model; with `--factory` it must be weights alone"):
        load_model(path, factory=f"{factories}:build")


@pytest.mark.parametrize(
    ("function", "kind", "reason"),
    [
        ("broken", LoadError, "raised RuntimeError: no such config"),
        ("wrong", LoadError, "returned a dict, not a torch.nn.Module"),
        ("biuld", UsageError, "Did you mean `build`?"),
        ("constant", UsageError, "is a int, not a function"),
    ],
)
def test_factories_that_fail(factories: str, function: str, kind: type[Exception], reason: str) -> None:
    with pytest.raises(kind) as caught:
        load_model(factory=f"{factories}:{function}")
    assert reason in str(caught.value)


@pytest.mark.parametrize("text", ["no_such_module_anywhere:build", "models/net.py:build", "justaname"])
def test_factories_that_are_not_found(text: str) -> None:
    with pytest.raises(UsageError):
        load_model(factory=text)


def test_arguments_that_contradict(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give the weights once"):
        load_model(tmp_path / "a", factory="m:f", weights=tmp_path / "b")
    with pytest.raises(UsageError, match="Weights alone"):
        load_model(weights=tmp_path / "b")
    with pytest.raises(UsageError, match="Give the path"):
        load_model()


def test_a_member_without_a_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name in ("archive/data.pkl", ""):
            archive.writestr(zipfile.ZipInfo(name), b"")
    with pytest.raises(LoadError, match="a member without a name"):
        load_model(tmp_path / "x.pt")

"""Files that are not models, and models that come from a factory."""

from __future__ import annotations

import argparse
import datetime
import enum
import io
import json
import os
import re
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

def linear():
    return nn.Linear(3, 3)

def nested():
    return nn.ModuleDict({"net": nn.ModuleDict({"body": Net()})})

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


@pytest.mark.parametrize("address", ["https://example.org/m.pt", "s3://bucket/m.pt", "hf://a/b"])
def test_addresses_are_to_be_downloaded_first(address: str, factories: str) -> None:
    for given in ({}, {"factory": f"{factories}:build"}):
        with pytest.raises(LoadError, match=f"`{address}` is an address, and graphopt reads files: download it first"):
            load_model(Path(address), **given)


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


def wrapped(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in reference().items()}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("averaged", [False, True])
def test_a_prefix_of_all_names_is_left_out(
    prefix: str, averaged: bool, factories: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {"n_averaged": torch.tensor(3), **wrapped(prefix)} if averaged else wrapped(prefix)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.pt")
    loaded = load_model(tmp_path / "w.pt", factory=f"{factories}:build").model
    assert isinstance(loaded, nn.Module)
    torch.testing.assert_close(dict(loaded.state_dict()), reference())
    assert caplog.messages == [f"The names in `{tmp_path / 'w.pt'}` start with `{prefix}`, which is left out."]


def test_prefixes_that_the_model_has_are_kept(factories: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(wrapped("net.body."), tmp_path / "w.pt")
    loaded = load_model(tmp_path / "w.pt", factory=f"{factories}:nested").model
    assert isinstance(loaded, nn.Module)
    torch.testing.assert_close(dict(loaded.state_dict()), wrapped("net.body."))
    assert not caplog.messages


def test_weights_that_do_not_fit_without_their_prefix_either(factories: str, tmp_path: Path) -> None:
    state = {**wrapped("module."), "module.body.0.weight": torch.ones(5, 3)}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(LoadError) as caught:
        load_model(tmp_path / "w.pt", factory=f"{factories}:build")
    assert "built: 1 differ in shape (body.0.weight is 5x3 in the file and 4x3 in the model). " in str(caught.value)
    assert "The names in the file start with `module.`, which was left out." in str(caught.value)
    torch.save({**wrapped("module."), "other.extra": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(LoadError, match=r"of the file's are not in the model \(module\.body"):
        load_model(tmp_path / "w.pt", factory=f"{factories}:build")


def test_names_of_many_parts_take_no_longer_and_are_cut(factories: str, tmp_path: Path) -> None:
    torch.save({"\x1b." * 500_000 + str(number): torch.ones(1) for number in range(20)}, tmp_path / "w.pt")
    with pytest.raises(LoadError, match="do not fit") as caught:
        load_model(tmp_path / "w.pt", factory=f"{factories}:build")
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


class Stranger(nn.Linear):
    """A module class that is not torch.nn's."""


@pytest.mark.parametrize("cls", [nn.Linear, Stranger])
@pytest.mark.parametrize("name", [None, "model"])
def test_whole_module_as_weights(cls: type[nn.Linear], name: str | None, factories: str, tmp_path: Path) -> None:
    """Without trust it is said what it is; with trust it has weights."""
    path, model = tmp_path / "w.pt", cls(3, 3)
    torch.save({"epoch": 1, name: model} if name else model, path)
    said = "it holds a whole module ({})" if name else "it is a whole module ({}), which goes without `--factory`"
    with pytest.raises(LoadError) as caught:
        load_model(path, factory=f"{factories}:linear")
    named = f"`{cls.__module__}.{cls.__qualname__}`"
    assert str(caught.value).startswith(f"`{path}` is not weights alone: {said.format(named)}.")
    loaded = load_model(path, factory=f"{factories}:linear", trust=True).model
    assert isinstance(loaded, nn.Linear)
    assert torch.equal(loaded.weight, model.weight)


class Color(enum.Enum):
    """A class of the user's own."""

    RED = 1


BESIDE = (argparse.Namespace(lr=0.1), datetime.datetime(2020, 1, 1), Path("runs"), Color.RED)


@pytest.mark.parametrize("beside", BESIDE, ids=str)
def test_objects_beside_the_weights_need_trust(beside: object, factories: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"state_dict": reference(), "args": beside}, path)
    with pytest.raises(LoadError, match=rf"it needs `.*{type(beside).__name__}`.*if you trust .*, pass `--trust`"):
        load_model(path, factory=f"{factories}:build")
    loaded = load_model(path, factory=f"{factories}:build", trust=True).model
    assert isinstance(loaded, nn.Module)
    torch.testing.assert_close(dict(loaded.state_dict()), reference())


def test_numbers_of_numpy_beside_the_weights_need_no_trust(factories: str, tmp_path: Path) -> None:
    beside = {"best": np.float64(0.5), "random": np.random.RandomState(0).get_state(), "curve": np.arange(3.0)}
    torch.save({"state_dict": reference(), **beside}, tmp_path / "w.pt")
    loaded = load_model(tmp_path / "w.pt", factory=f"{factories}:build").model
    assert isinstance(loaded, nn.Module)
    torch.testing.assert_close(dict(loaded.state_dict()), reference())


class Stateless(nn.Linear):
    """Fails when it is asked for its state dict."""

    def state_dict(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no\nstate")


def test_trusted_weights_that_fail_are_one_sentence(factories: str, tmp_path: Path) -> None:
    torch.save(Stateless(3, 3), tmp_path / "w.pt")
    with pytest.raises(LoadError, match=r"its module has no state dict \(RuntimeError: no\)\.$"):
        load_model(tmp_path / "w.pt", factory=f"{factories}:linear", trust=True)
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(LoadError, match="holds a list, not a state dict"):
        load_model(tmp_path / "w.pt", factory=f"{factories}:linear", trust=True)


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


def test_the_folder_of_a_result(tmp_path: Path) -> None:
    for name in ("manifest.json", "program.onnxruntime.pt2", "program.tensorrt.pt2"):
        (tmp_path / name).touch()
    said = f"`{tmp_path}` is the folder of a result, not a model file; give `{tmp_path}/program.onnxruntime.pt2`."
    with pytest.raises(LoadError, match=re.escape(said)):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["no_such_module_anywhere:build", "models/net.py:build", "justaname"])
def test_factories_that_are_not_found(text: str) -> None:
    with pytest.raises(UsageError):
        load_model(factory=text)


def test_arguments_that_contradict(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"give the weights once: as the model path, or with --weights"):
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

"""`load_model`: from a path, a factory, or both, to a model that graphopt can capture."""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from graphopt.errors import LoadError, UsageError, cut, foreign_code, printable
from graphopt.files import MANIFEST, check_against_manifest, read_file
from graphopt.loading.archive import Archive
from graphopt.loading.contents import FileKind, identify
from graphopt.loading.exported import load_archive, load_exported
from graphopt.loading.factories import apply_weights, build_model
from graphopt.loading.functions import check_origin, importable
from graphopt.loading.pickles import load_stock_pickle, load_trusted_pickle
from graphopt.loading.refusal import DamagedError, HostileError, untrusted
from graphopt.loading.state_dicts import describe, is_state_dict, read_weights

_ADVICE = {
    FileKind.SAFETENSORS: "it holds weights without the model they belong to; add `--factory package.module:function` "
    "to say what builds it",
    FileKind.ONNX: "graphopt starts from PyTorch; give the model it was exported from",
    FileKind.TORCHSCRIPT: "its Python is gone, and torch.export cannot capture it; save the original module with "
    "`torch.export.save` or `torch.save`",
    FileKind.EXPORTED_OLD: "save it again with `torch.export.save` of torch 2.8 or newer",
    FileKind.PICKLE: "save the model with `torch.export.save` or `torch.save`",
    FileKind.LFS_POINTER: "fetch the file itself with `git lfs pull`",
    FileKind.HTML: "the download went wrong; fetch the file again",
    FileKind.COMPRESSED: "unpack it first",
    FileKind.TAR: "unpack it first",
    FileKind.EMPTY: "whatever wrote it did not finish; save or copy it again",
}
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+:)/([^/].*)")  # a path has no two slashes in a row
_EXPECTED = (
    "graphopt reads exported programs (`torch.export.save`), modules (`torch.save(model, ...)`), and, with "
    "`--factory`, weights"
)


@dataclass(frozen=True)
class ExampleInputs:
    """Arguments that a file brings along for its program."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class LoadedModel:
    """A model read from a file, or built by a factory.

    Attributes:
        model: A module, or an exported program whose graph is safe to run.
        source: The path or the factory, for messages and reports.
        example_inputs: What the file holds as inputs to try, if anything.
        extra_files: Texts stored beside an exported program, by name.
    """

    model: nn.Module | ExportedProgram
    source: str
    example_inputs: ExampleInputs | None = None
    extra_files: Mapping[str, str] = field(default_factory=dict)


def load_model(
    path: Path | None = None,
    *,
    trust: bool = False,
    factory: str | None = None,
    weights: Path | None = None,
) -> LoadedModel:
    """Load a model without running anything that its file brings along.

    The file's contents decide what it is, never its name. Its bytes are read once, so what was checked is
    what is loaded.

    Args:
        path: A model file; with `factory`, the file of its weights.
        trust: Let the file run code: unpickle any class, skip every check. The file of the weights too.
        factory: `package.module:function` that builds the module, called without arguments.
        weights: The file of the weights, where `path` is not given; needs `factory`.

    Raises:
        LoadError: The file is missing, of another kind, damaged, or would run code; the message says what to do.
        UsageError: The arguments contradict each other, or there is no such factory.
    """
    if factory is not None:
        if path is not None and weights is not None:
            raise UsageError("With `--factory` give the weights once: as the model path, or with --weights.")
        return _load_from_factory(factory, path if path is not None else weights, trust)
    if weights is not None:
        raise UsageError("Weights alone are not a model: add `--factory package.module:function`.")
    if path is None:
        raise UsageError("Give the path of a model file, or `--factory package.module:function`.")
    data = _read(path)
    try:
        kind, archive = identify(data)
        if archive is not None and (kind is FileKind.EXPORTED or (trust and kind is FileKind.EXPORTED_OLD)):
            return _load_program(path, data, kind, archive, trust)
        if kind is FileKind.TORCH_PICKLE:
            return LoadedModel(_load_module(path, data, trust), str(path))
    except HostileError as err:
        raise untrusted(path, str(err)) from err
    except DamagedError as err:
        raise LoadError(f"Cannot load `{path}`: {err}.") from err
    raise LoadError(f"Cannot load `{path}`: it is {kind.value}; {_ADVICE.get(kind, _EXPECTED)}.")


def _read(path: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        LoadError: there is no such file, it cannot be read, or it is not what the manifest beside it says.
    """
    try:
        data = read_file(path)
    except FileNotFoundError as err:
        if address := _ADDRESS.fullmatch(str(path)):
            raise LoadError(
                f"`{address[1]}//{address[2]}` is an address, and graphopt reads files: download it first, and give "
                "the path of the copy."
            ) from err
        folder = path.parent
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, names, 1)
        hint = f" Did you mean `{folder / near[0]}`?" if near else ""
        raise LoadError(f"There is no file `{path}`.{hint}") from err
    except IsADirectoryError as err:
        if (path / MANIFEST).is_file():
            program = next(iter(sorted(path.glob("program*.pt2"))), path / "program.pt2")
            raise LoadError(f"`{path}` is the folder of a result, not a model file; give `{program}`.") from err
        raise LoadError(
            f"`{path}` is a directory, not a model file; give a file in it, or `--factory "
            "package.module:function` with a function that builds the model from it."
        ) from err
    except OSError as err:
        raise LoadError(f"Cannot read `{path}`: {err.strerror or err}.") from err
    check_against_manifest(path, data)
    return data


def _load_from_factory(factory: str, weights: Path | None, trust: bool) -> LoadedModel:
    data = None if weights is None else _read(weights)
    model = build_model(factory)
    if data is None:
        return LoadedModel(model, factory)
    try:
        apply_weights(model, read_weights(data, str(weights), trust=trust), str(weights))
    except HostileError as err:
        raise LoadError(
            f"`{weights}` is not weights alone: {err}. Save the weights with `torch.save(model.state_dict(), ...)` or "
            "as `.safetensors`, or, if you trust whoever made the file, pass `--trust` (it can run any code on this "
            "machine)."
        ) from err
    return LoadedModel(model, factory)


def _load_program(path: Path, data: bytes, kind: FileKind, archive: Archive, trust: bool) -> LoadedModel:
    if not trust:
        program, extra = load_exported(archive)
    elif kind is FileKind.EXPORTED:
        program, extra = load_archive(io.BytesIO(data))
    else:
        program, extra = _load_old_program(data), {}
    example = None
    if program.example_inputs:
        args, kwargs = program.example_inputs
        example = ExampleInputs(tuple(args), dict(kwargs))
    return LoadedModel(program, str(path), example, extra)


def _load_old_program(data: bytes) -> ExportedProgram:
    with foreign_code(lambda said, _: DamagedError(f"torch could not load it ({said})")):
        return torch.export.load(io.BytesIO(data))


def _load_module(path: Path, data: bytes, trust: bool) -> nn.Module:
    if trust:
        directory = Path.cwd()
        with importable(directory):
            value = load_trusted_pickle(data)
        for module in value.modules() if isinstance(value, nn.Module) else ():
            check_origin(type(module).__module__, directory)
    else:
        value = load_stock_pickle(data)
    if isinstance(value, nn.Module):
        return value
    modules = [key for key, item in value.items() if isinstance(item, nn.Module)] if isinstance(value, Mapping) else []
    advice = (
        f"save what it holds as {cut(printable(repr(modules[0])), 80)} alone, with `torch.export.save` or `torch.save`"
        if modules
        else "say what builds the model it belongs to with `--factory package.module:function`"
        if is_state_dict(value) or isinstance(value, Mapping)
        else "save the model itself with `torch.export.save` or `torch.save`"
    )
    raise LoadError(f"`{path}` holds {describe(value)}, not a model; {advice}.")

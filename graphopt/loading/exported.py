"""Exported programs (`.pt2`, whatever the file is called), checked before torch sees them.

`torch.export.load` unpickles sample inputs and any payload that says so, evaluates text, imports modules and
loads shared libraries. So torch never gets the stranger's file: its program is rebuilt from a schema
(`program_schema`), its tensors are raw bytes, its sample inputs are read without an unpickler and saved again, and
torch loads the fresh archive made of these. Two readings of one zip file cannot differ, and what was not
copied cannot run.

Members copied: `models/*.json`, `data/weights/weight_*`, `data/constants/tensor_*`, their two configs, and
sample inputs. Text under `extra/` is handed back. Anything else is refused, compiled libraries included.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from typing import Any

import torch
from torch.export import ExportedProgram

from graphopt.errors import cut, first_line, foreign_code
from graphopt.ir.torch_internals import load_pt2
from graphopt.loading.archive import Archive
from graphopt.loading.pickles import load_plain_pickle
from graphopt.loading.program_schema import clean_payloads, clean_program
from graphopt.loading.refusal import DamagedError, HostileError
from graphopt.loading.stored_tensors import MAX_REPEATED

ARCHIVE_VERSION = b"0"
_KNOWN = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)"
    r"|\.format_version|\.storage_alignment|extra/.+"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+",
    re.ASCII,
)
_PLAIN_TYPES = (
    *(bool, int, float, complex, str, type(None)),
    *(torch.Tensor, torch.nn.Parameter, torch.dtype, torch.device, torch.Size),
)


def load_exported(archive: Archive) -> tuple[ExportedProgram, dict[str, str]]:
    """Check an exported program and load it.

    Returns:
        The program, and the texts stored beside it (`extra_files` of `torch.export.save`).

    Raises:
        HostileError: It holds something that could run code.
        DamagedError: It is not a program that torch writes.
    """
    model = _model_name(archive)
    _check_members(archive, model)
    program, _ = load_archive(_rebuild(archive, model))
    return program, _extra_files(archive)


def load_archive(stream: io.BytesIO) -> tuple[ExportedProgram, dict[str, str]]:
    """Let torch load an archive as it is, which runs whatever is in it; raises `DamagedError`.

    `torch.export.load` would log the traceback of a failure and raise another, without the reason; its own
    `load_pt2` raises the reason. It is private: drop it for the public function once that is fixed.
    """
    # torch raises many types on a malformed program; all mean the same to a user
    with foreign_code(lambda said, _: DamagedError(f"torch could not rebuild its program ({said})")):
        programs, extra_files = load_pt2(stream)
        (program,) = programs.values()
    return program, extra_files


def _model_name(archive: Archive) -> str:
    names = [name for name in archive.names if name.startswith("models/")]
    models = [name.removeprefix("models/").removesuffix(".json") for name in names if name.endswith(".json")]
    if len(names) != 1 or len(models) != 1:
        raise DamagedError(
            f"it holds {len(models)} programs ({cut(', '.join(models), 200)}); save the one to optimize alone"
            if models
            else "it holds no program, only compiled code or weights"
        )
    if archive.read("archive_format") != b"pt2" or archive.read("archive_version") != ARCHIVE_VERSION:
        raise DamagedError(f"it is not in the format that torch {torch.__version__} reads")
    if "byteorder" in archive and archive.read("byteorder") != b"little":
        raise DamagedError("its tensors are stored in big-endian order")
    return models[0]


def _check_members(archive: Archive, model: str) -> None:
    known = {
        f"models/{model}.json",
        f"data/sample_inputs/{model}.pt",
        f"data/weights/{model}_weights_config.json",
        f"data/constants/{model}_constants_config.json",
    }
    for name in archive.names:
        if name in known or _KNOWN.fullmatch(name):
            continue
        if name.endswith(".pt"):
            raise HostileError(f"its member `{name[:120]}` is a pickle of an older format")
        if name.startswith("data/aotinductor/") or name.endswith((".so", ".dll", ".dylib", ".o")):
            raise HostileError(f"its member `{name[:120]}` is compiled code")
        if "custom_obj" in name or "opaque_obj" in name:
            raise HostileError(f"its member `{name[:120]}` is a pickled object")
        raise HostileError(f"its member `{name[:120]}` is not part of a plain exported program")


def _rebuild(archive: Archive, model: str) -> io.BytesIO:
    """Write a fresh archive of what was checked."""
    fresh = io.BytesIO()
    with zipfile.ZipFile(fresh, "w", zipfile.ZIP_STORED) as target:

        def write(name: str, data: bytes) -> None:
            target.writestr(zipfile.ZipInfo(f"archive/{name}"), data)

        write("archive_format", b"pt2")
        write("archive_version", ARCHIVE_VERSION)
        write("byteorder", b"little")
        write(".data/version", b"6\n")
        program = clean_program(_json(archive, f"models/{model}.json"))
        write("models/model.json", json.dumps(program).encode())
        for folder, prefix in (("weights", "weight_"), ("constants", "tensor_")):
            config = clean_payloads(_json(archive, f"data/{folder}/{model}_{folder}_config.json"), prefix)
            _check_sizes(archive, folder, config)
            write(f"data/{folder}/model_{folder}_config.json", json.dumps(config).encode())
            for name in sorted({entry["path_name"] for entry in config["config"].values()}):
                write(f"data/{folder}/{name}", archive.read(f"data/{folder}/{name}"))
        write("data/sample_inputs/model.pt", _sample_inputs(archive.read(f"data/sample_inputs/{model}.pt")))
    fresh.seek(0)
    return fresh


def _json(archive: Archive, name: str) -> Any:
    try:
        return json.loads(archive.read(name).decode("utf-8"))
    except (ValueError, RecursionError) as err:
        raise DamagedError(f"its member `{name}` is not JSON ({first_line(err)})") from err


def _check_sizes(archive: Archive, folder: str, config: dict[str, Any]) -> None:
    """Check that there are bytes behind what tensors say of their size, but for a few that repeat their elements."""
    repeated = 0
    for name, entry in config["config"].items():
        member = f"data/{folder}/{entry['path_name']}"
        if member not in archive:
            raise DamagedError(f"the values of `{name[:120]}` (`{member}`) are missing")
        sizes = [size["as_int"] for size in entry["tensor_meta"]["sizes"]]
        if archive.size(member) == 0 and 0 not in sizes:
            raise DamagedError(f"the values of `{name[:120]}`, of shape {sizes}, are missing")
        elements = math.prod(sizes)
        repeated += elements if elements > archive.size(member) else 0
    if repeated > MAX_REPEATED:
        raise HostileError(f"its tensors repeat the few elements they have to {repeated}, more than any model's")


def _sample_inputs(data: bytes) -> bytes:
    """Read sample inputs and save them again: torch never meets the stranger's pickle."""
    if not data:
        return b""
    try:
        value = load_plain_pickle(data)
    except HostileError as err:
        raise HostileError(f"its sample inputs are a pickle that holds more than tensors: {err}") from err
    if not isinstance(value, tuple | dict) or not _is_plain(value):
        raise HostileError("its sample inputs hold more than tensors and numbers")
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(_is_plain(item) for item in value)
    if type(value) is dict:
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return type(value) in _PLAIN_TYPES


def _extra_files(archive: Archive) -> dict[str, str]:
    names = [name for name in archive.names if name.startswith("extra/")]
    return {name.removeprefix("extra/"): archive.read(name).decode("utf-8", "replace") for name in names}

"""Manifest: what it takes to trust, repeat and run a result. Plain data, no times, no paths of one machine."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import UsageError
from graphopt.files import replacing, sha256

if TYPE_CHECKING:
    from graphopt.ir.program import Program
    from graphopt.pipeline.plan import Plan
    from graphopt.targets.backend import Artifact

SCHEMA = 1
_LIBRARIES = ("graphopt", "torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "numpy")
PAYLOAD = "plans.safetensors"


def library_versions() -> dict[str, str]:
    """Return the installed versions of what decides the bytes of an artifact."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def cpu_features() -> list[str]:
    """List the instruction sets that decide which integer kernels run, as the kernel names them."""
    known = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm")
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: the machine's type is all there is
        return [platform.machine()]
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    flags = set(line.partition(":")[2].split())
    return [platform.machine(), *(name for name in known if name in flags)]


def fingerprint(program: Program) -> str:
    """Return a SHA-256 over the graph's text and every tensor's bytes."""
    import torch

    digest = hashlib.sha256(program.graph_module.code.encode())
    for name, tensor in sorted(program.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write(
    directory: Path,
    *,
    model: str,
    original: Program,
    pipeline: str,
    seed: int,
    plans: Sequence[tuple[str, Plan]],
    artifacts: Mapping[str, Artifact],
    files: Sequence[Path],
) -> list[Path]:
    """Write `manifest.json` and, when plans carry tensors, `plans.safetensors`; return the paths."""
    from safetensors.torch import save

    payload = {
        f"{index}/{name}": tensor.detach().contiguous()
        for index, (_, plan) in enumerate(plans)
        for name, tensor in plan.tensors.items()
    }
    written = []
    if payload:
        with replacing(directory / PAYLOAD) as temporary:
            temporary.write_bytes(save(dict(sorted(payload.items()))))
        written.append(directory / PAYLOAD)
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "model": model,
        "original": fingerprint(original),
        "pipeline": pipeline,
        "seed": seed,
        "libraries": library_versions(),
        "cpu": cpu_features(),
        "plans": [{"target": target, **plan.to_json()} for target, plan in plans],
        "artifacts": {
            name: {"file": found.path.name, "session_options": dict(found.session_options), "facts": dict(found.facts)}
            for name, found in artifacts.items()
        },
        "sha256": {file.name: sha256(file) for file in [*files, *written]},
    }
    with replacing(directory / "manifest.json") as temporary:
        temporary.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
    return [directory / "manifest.json", *written]


def read(path: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        UsageError: it is missing, not JSON, or of another schema.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as err:
        raise UsageError(
            f"{path} is not a manifest: {err}. Give the manifest.json that `graphopt optimize` wrote."
        ) from err
    if data.get("schema") != SCHEMA:
        raise UsageError(
            f"{path} has manifest schema {data.get('schema')}; this version reads {SCHEMA}. Optimise again."
        )
    return data
